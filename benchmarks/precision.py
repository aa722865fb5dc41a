"""Measure the error of a meta-gradient in each precision of the convolutions.

    python -P -m pdd_fast.benchmarks.precision --output precision.json

The reference is the gradient in float64 through all steps. The meta-gradient is that of the
matching loss with respect to the images and the learning rate, through N SGD steps on random
images, all of them in every step. The table shows medians over seeds (of network, images and
target), with minimum and maximum.

On a CPU, TF32 is emulated: every operand of every convolution is rounded to 10 mantissa bits, to
nearest with ties to even, and convolved in float32. Tensor cores compute the same except for the
order of their sums. On a GPU that truncates the other 13 bits instead, the error is up to twice as
large. On a GPU, both real TF32 and the emulation are measured.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

import pdd_fast
from pdd_fast.benchmarks import formatting
from pdd_fast.benchmarks.machine import ask
from pdd_fast.engines import convolution
from pdd_fast.networks.parameters import initial_parameters
from pdd_fast.ops import convnet
from pdd_fast.runtime.devices import resolve_device
from pdd_fast.runtime.errors import UsageError
from pdd_fast.runtime.files import write_json

RATE, AWAY = 0.01, 0.01  # inner learning rate; scale of the target's distance from the start
EMULATED = "tf32, emulated"
MEASURES = ("images", "cosine", "rate", "theta")


def rounded(tensor: Tensor) -> Tensor:
    """Round float32 values to 10 mantissa bits, to nearest with ties to even."""
    bits = tensor.view(torch.int32)
    return ((bits + 0xFFF + ((bits >> 13) & 1)) & ~0x1FFF).view(torch.float32)


@contextmanager
def emulated() -> Iterator[None]:
    """Make the fused engine round the operands of its convolutions as TF32 does.

    Inside this context the convolutions are torch's, as on a GPU, and not the CPU's own kernel.
    """
    original = convolution._run

    def run(function: Callable[..., Tensor], *operands: Tensor) -> Tensor:
        return original(function, *map(rounded, operands))

    composed = mock.patch.object(convnet, "available", return_value=False)
    with composed, mock.patch.object(convolution, "_run", run):
        yield


def meta_gradient(
    args: Any, steps: int, seed: int, precision: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of images and learning rate, and the displacement θ_N − θ_0."""
    dtype = torch.float64 if precision == "float64" else torch.float32
    net = pdd_fast.ConvNet(3, 10, args.size, args.width, args.depth)
    generator = torch.Generator().manual_seed(seed)
    start = initial_parameters(net, seed)
    images = torch.randn(args.batch, 3, args.size, args.size, generator=generator)
    target = start + AWAY * torch.randn(start.shape, generator=generator)
    labels = torch.arange(args.batch) % 10
    start, images, target, labels = (t.to(args.device) for t in (start, images, target, labels))
    start, images, target = (t.to(dtype) for t in (start, images, target))
    rate = torch.tensor(RATE, dtype=dtype, device=args.device)
    images.requires_grad_()
    rate.requires_grad_()
    batches = [torch.arange(args.batch)] * steps
    name = precision if precision in ("tf32", "bfloat16") else "float32"
    with emulated() if precision == EMULATED else nullcontext():
        end = pdd_fast.unroll(
            net.to(args.device, dtype), start, images, labels, rate, batches, precision=name
        )
        loss = pdd_fast.trajectory_matching_loss(end, start, target)
        images_grad, rate_grad = torch.autograd.grad(loss, [images, rate])
    images_grad, rate_grad, way = (
        t.detach().double().cpu() for t in (images_grad, rate_grad, end - start)
    )
    return images_grad, rate_grad, way


def errors(found: tuple[Tensor, ...], truth: tuple[Tensor, ...]) -> dict[str, float]:
    """Return relative errors, and the cosine similarity of the images' gradient to the true one."""
    images, rate, theta = (
        float((f - t).norm() / t.norm()) for f, t in zip(found, truth, strict=True)
    )
    cosine = torch.nn.functional.cosine_similarity(found[0].flatten(), truth[0].flatten(), dim=0)
    return {"images": images, "cosine": float(cosine), "rate": rate, "theta": theta}


def measured(args: Any, names: list[str]) -> list[dict[str, Any]]:
    """Return one row per number of steps and precision."""
    rows = []
    for steps in args.steps:
        samples: dict[str, list[dict[str, float]]] = {name: [] for name in names}
        for seed in range(args.seeds):
            truth = meta_gradient(args, steps, seed, "float64")
            for name in names:
                samples[name].append(errors(meta_gradient(args, steps, seed, name), truth))
        for name in names:
            columns = {key: [sample[key] for sample in samples[name]] for key in MEASURES}
            rows.append(
                {"steps": steps, "precision": name}
                | {key: statistics.median(values) for key, values in columns.items()}
                | {f"{key}_all": values for key, values in columns.items()}
            )
            print(show(rows[-1:]).splitlines()[-1], flush=True)
    return rows


def show(rows: list[dict[str, Any]]) -> str:
    """Return a table with one row per number of steps and precision."""
    cells = [
        [
            str(row["steps"]),
            row["precision"],
            f"{row['images']:.1e}",
            f"{min(row['images_all']):.1e}–{max(row['images_all']):.1e}",
            f"{row['cosine']:.4f}",
            f"{row['rate']:.1e}",
            f"{row['theta']:.1e}",
        ]
        for row in rows
    ]
    return formatting.table(
        ["N", "precision", "images' gradient", "smallest–largest", "cosine", "rate's", "θ_N"], cells
    )


def device(name: str) -> torch.device:
    """Return the device called ``name``, for argparse."""
    try:
        return resolve_device(name)
    except UsageError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def main() -> None:
    """Run the program."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", type=device, default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument(
        "--steps",
        type=int,
        nargs="+",
        default=[5, 20, 50],
        help="numbers of steps (default 5 20 50)",
    )
    for name, default, text in (
        ("batch", 10, "images"),
        ("seeds", 5, "networks and images"),
        ("width", 128, "channels"),
        ("depth", 3, "blocks"),
        ("size", 32, "pixels of a side"),
        ("threads", 0, "0: torch's own number"),
    ):
        parser.add_argument(
            f"--{name}", type=int, default=default, help=f"{text} (default {default})"
        )
    parser.add_argument("--output", type=Path, help="where the JSON goes")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    on_gpu = args.device.type == "cuda"
    names = ["float32", *(["tf32"] if on_gpu else []), EMULATED, "bfloat16"]
    rows = measured(args, names)
    print(show(rows))
    case = {name: getattr(args, name) for name in ("batch", "seeds", "width", "depth", "size")}
    case |= {"rate": RATE, "device": str(args.device)}
    record = {
        "benchmark": "precision",
        "case": case,
        "machine": ask(on_gpu, args.threads),
        "results": rows,
    }
    if args.output:
        write_json(args.output, record)


if __name__ == "__main__":
    main()
