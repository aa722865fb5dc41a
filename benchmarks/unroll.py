"""Seconds, peak memory and gradient error of one meta-gradient: ours against the loop that MTT's scripts write.

    python benchmarks/unroll.py --batch 50 --steps 50 --output benchmarks/results/unroll.json

Every engine runs in a process of its own, round after round in turn, so that a slow minute of the machine hits all of
them. Reported are medians over rounds with the smallest and largest beside. The error is that of the images' gradient
against float64 through all steps.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import pdd_fast

ENGINES = {
    "fused, recompute": "exact; keeps the parameters of every step",
    "fused, cache": "exact; keeps the activations too",
    "autograd, recompute": "exact for any module; one step's graph at a time",
    "plain autograd": "create_graph=True through all steps, as MTT's scripts do",
    "plain autograd, channels-last": "the same with the better memory format",
}


def plain_loop(
    net: torch.nn.Module, theta: Tensor, images: Tensor, labels: Tensor, rate: Tensor, batches: list[Tensor],
    last: bool,
) -> Tensor:  # fmt: skip
    """θ_N with the graph of every step kept."""
    shapes = {name: parameter.shape for name, parameter in net.named_parameters()}
    for batch in batches:
        x = images[batch]
        if last:
            x = x.contiguous(memory_format=torch.channels_last)
        parts = theta.split([shape.numel() for shape in shapes.values()])
        parameters = {name: part.view(shape) for (name, shape), part in zip(shapes.items(), parts, strict=True)}
        loss = F.cross_entropy(torch.func.functional_call(net, parameters, (x,)), labels[batch])
        (gradient,) = torch.autograd.grad(loss, theta, create_graph=True)
        theta = theta - rate * gradient
    return theta


def problem(args: argparse.Namespace, dtype: torch.dtype) -> tuple[Any, ...]:
    """Network, start, images, labels, rate, batches, target: the same for every engine."""
    torch.manual_seed(0)
    net = pdd_fast.ConvNet(3, 10, args.size, args.width, args.depth)
    start = pdd_fast.flatten_parameters(net)
    images = torch.randn(args.batch, 3, args.size, args.size)
    batches = [torch.randperm(args.batch) for _ in range(args.steps)]
    target = start + 0.01 * torch.randn_like(start)
    labels = torch.arange(args.batch) % 10
    cast = (tensor.to(dtype) for tensor in (start, images, torch.tensor(0.01), target))
    start, images, rate, target = cast
    return net.to(dtype), start, images, labels, rate, batches, target


def meta_gradient(name: str, args: argparse.Namespace, dtype: torch.dtype = torch.float32) -> tuple[Tensor, float]:
    """The images' gradient of the matching loss, and the seconds it took."""
    net, start, images, labels, rate, batches, target = problem(args, dtype)
    images.requires_grad_()
    rate.requires_grad_()
    began = time.perf_counter()
    if name.startswith("plain"):
        end = plain_loop(net, start.requires_grad_(), images, labels, rate, batches, name.endswith("last"))
    else:
        engine, memory = name.split(", ")
        end = pdd_fast.unroll(net, start, images, labels, rate, batches, engine=engine, memory=memory)
    loss = pdd_fast.trajectory_matching_loss(end, start.detach(), target)
    gradient, _ = torch.autograd.grad(loss, [images, rate])
    return gradient, time.perf_counter() - began


def peak_bytes() -> int:
    """Peak resident memory of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM:")).split()[1]) * 1024


def child(args: argparse.Namespace) -> None:
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.engine == "float64":
        gradient, seconds = meta_gradient("fused, recompute", args, torch.float64)
        torch.save(gradient, args.truth)
    else:
        # Libraries choose and compile their kernels at the first call; two steps are enough to have it behind.
        meta_gradient(args.engine, argparse.Namespace(**vars(args) | {"steps": 2}))
        gradient, seconds = meta_gradient(args.engine, args)
    truth = torch.load(args.truth)
    error = float((gradient.double() - truth).norm() / truth.norm())
    print(json.dumps({"seconds": seconds, "peak_bytes": peak_bytes(), "error": error}))


def run_child(engine: str, truth: Path, arguments: list[str]) -> dict[str, float] | None:
    """One measurement; None where the process was killed, which is what running out of memory looks like."""
    command = [sys.executable, __file__, *arguments, "--engine", engine, "--truth", str(truth)]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode < 0 or "out of memory" in result.stderr.lower() or "can't allocate" in result.stderr.lower():
        return None
    if result.returncode:
        sys.exit(result.stderr)
    return json.loads(result.stdout)


def machine() -> dict[str, Any]:
    cpu = next(
        (line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line),
        platform.processor(),
    )
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], capture_output=True, text=True, cwd=Path(__file__).parent
    ).stdout.strip()
    from pdd_fast.ops import _native

    library = _native.load("cpu")
    return {
        "cpu": cpu,
        "instruction_set": library.capabilities()["instruction set"] if library else "none",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "pdd_fast": pdd_fast.__version__,
        "commit": commit,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default, text in (
        ("batch", 50, "images, all of them in every step"), ("steps", 50, "N"), ("width", 128, "channels"),
        ("depth", 3, "blocks"), ("size", 32, "pixels of a side"), ("threads", 0, "0: torch's own number"),
        ("rounds", 3, "measurements of every engine"),
    ):  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=default, help=f"{text} (default {default})")
    parser.add_argument("--skip", action="append", default=[], choices=list(ENGINES), help="an engine to leave out")
    parser.add_argument("--output", type=Path, help="where the JSON goes")
    parser.add_argument("--engine", help=argparse.SUPPRESS)
    parser.add_argument("--truth", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.engine:
        child(args)
        return

    arguments = [f"--{n}={getattr(args, n)}" for n in ("batch", "steps", "width", "depth", "size", "threads")]
    names = [name for name in ENGINES if name not in args.skip]
    with tempfile.TemporaryDirectory() as folder:
        truth = Path(folder) / "gradient.pt"
        if run_child("float64", truth, arguments) is None:
            sys.exit("not enough memory for the float64 gradient that the errors are measured against")
        measured: dict[str, list[dict[str, float]]] = {name: [] for name in names}
        failed: set[str] = set()
        for number in range(args.rounds):
            for name in names:
                if name in failed:
                    continue
                print(f"round {number + 1}/{args.rounds}: {name}", file=sys.stderr, flush=True)
                found = run_child(name, truth, arguments)
                if found is None:
                    failed.add(name)
                else:
                    measured[name].append(found)

    rows: dict[str, Any] = {}
    base = [m["seconds"] for m in measured.get("fused, recompute", [])]
    print(f"| {'engine':30} | seconds | min-max | times ours | peak memory | error |\n|---|---|---|---|---|---|")
    for name in names:
        if name in failed:
            rows[name] = {"failed": "out of memory"}
            print(f"| {name:30} | out of memory | | | | |")
            continue
        seconds = [m["seconds"] for m in measured[name]]
        # Pair by pair, so that the machine's drift cancels.
        ratio = statistics.median(a / b for a, b in zip(seconds, base, strict=False)) if base else float("nan")
        rows[name] = {
            "seconds": statistics.median(seconds), "seconds_all": seconds, "times_ours": ratio,
            "peak_bytes": max(m["peak_bytes"] for m in measured[name]), "error": measured[name][0]["error"],
        }  # fmt: skip
        print(
            f"| {name:30} | {rows[name]['seconds']:.2f} | {min(seconds):.2f}-{max(seconds):.2f} | {ratio:.2f} "
            f"| {rows[name]['peak_bytes'] / 1e9:.2f} GB | {rows[name]['error']:.1e} |"
        )
    if args.output:
        case = {n: getattr(args, n) for n in ("batch", "steps", "width", "depth", "size", "rounds")}
        record = {"benchmark": "unroll", "case": case, "machine": machine(), "engines": ENGINES, "results": rows}
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
