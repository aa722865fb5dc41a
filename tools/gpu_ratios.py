"""Compare a meta-gradient and a training step with plain PyTorch, by turns in one process.

    python tools/gpu_ratios.py --seconds 60

Every implementation runs once per round, with its own flags of cuDNN and of precision, so that a
change of the GPU's clock affects all of them. A line is printed as soon as an implementation is
ready or has failed, a line of seconds after every round, and a table when a case ends. "times ours"
is the median over rounds of the ratio to ours in the same round.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

import pdd_fast
from pdd_fast.benchmarks import cases, implementations, measure, training_step, unroll
from pdd_fast.benchmarks.cases import Case
from pdd_fast.benchmarks.implementations import Implementation
from pdd_fast.benchmarks.plain_dsa import PlainSampler
from pdd_fast.training.cuda_graphs import CudaBackend

CASES = ("unroll-b20-n50-w128-s32-dsa", "unroll-b100-n30-w128-s32-dsa", "step-b256-w128-s32-dsa")
SMALL = ("unroll-b4-n2-w4-s8-dsa", "step-b4-w4-s8-dsa")
UNROLL = (
    "ours, graph, recompute, tf32",
    "ours, graph, cache, tf32",
    "ours, graph, recompute, bfloat16",
    "plain autograd, tf32",
    "plain autograd, channels-last, tf32",
    "plain autograd, one graph, tf32",
    "plain autograd, one graph, bfloat16",
)
STEP = (
    "ours, graph, tf32",
    "ours, graph, bfloat16",
    "eager PyTorch, tf32",
    "eager PyTorch, channels-last, tf32",
)


@dataclass
class Row:
    """An implementation with its times."""

    implementation: Implementation
    call: Callable[[], object]
    gigabytes: float = 0.0  # peak of the warm-up
    seconds: list[float] = field(default_factory=list)


def prepared(case: Case, implementation: Implementation, device: torch.device) -> Row:
    """Return an implementation that has chosen its kernels and captured its graphs."""
    flags(implementation)
    CudaBackend.failure = ""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_reserved() if device.type == "cuda" else 0
    if case.kind == "unroll":
        call = unroll.prepared(implementation, unroll.problem_of(case, device, torch.float32))
    else:
        call = _steps(case, implementation, device)
    for _ in range(3):
        call()
    if CudaBackend.failure:  # its times would be those of another implementation
        raise RuntimeError(f"no graph was captured: {CudaBackend.failure}")
    peak = torch.cuda.max_memory_reserved() - before if device.type == "cuda" else 0
    return Row(implementation, call, peak / 1e9)


def _steps(
    case: Case, implementation: Implementation, device: torch.device
) -> Callable[[], object]:
    torch.manual_seed(0)
    net = pdd_fast.ConvNet(3, 10, case.size, case.width, case.depth).to(device)
    images = torch.randn(case.batch, 3, case.size, case.size, device=device)
    labels = torch.arange(case.batch, device=device) % 10
    if implementation.ours:
        return training_step.ours(implementation, net, images, labels, case.augment)[0]
    sampler = PlainSampler(pdd_fast.DSA(training_step.DSA), device, images.dtype)
    generator = torch.Generator(device).manual_seed(0)
    return training_step.plain(implementation, net, images, labels, sampler, generator)[0]


def flags(implementation: Implementation) -> None:
    """Set the flags that an implementation is measured with; ours sets its own in every pass."""
    measure.set_precision(implementation.precision)


def compare(name: str, wanted: Sequence[str], device: torch.device, seconds: float) -> None:
    """Measure the implementations of one case for about ``seconds`` and print their table."""
    case, began = cases.parse(name), time.monotonic()
    every = {c.name: c for c in implementations.implementations(case, "cuda")}
    rows: list[Row] = []
    print(f"\n## {name}\n", flush=True)
    for each in wanted:
        try:
            rows.append(prepared(case, every[each], device))
            print(f"{each}: ready after {time.monotonic() - began:.0f} s", flush=True)
        except Exception as error:  # the others still tell something
            line = (str(error).splitlines() or [""])[0]
            print(f"{each}: FAILED, {type(error).__name__}: {line}", flush=True)
    rounds = 0
    while rows and rounds < 30 and (rounds < 3 or time.monotonic() - began < seconds):
        for row in rows:
            flags(row.implementation)
            row.seconds.append(measure.timed(row.call, device)[0])
        rounds += 1
        print(f"round {rounds}, s:", *(f"{row.seconds[-1]:.4g}" for row in rows), flush=True)
    print(table(case, rows, rounds), flush=True)


def table(case: Case, rows: Sequence[Row], rounds: int) -> str:
    """Return the medians, spreads and ratios to the first implementation of ours."""
    steps = training_step.STEPS if case.kind == "step" else 1
    lines = [
        "",
        f"| {rounds} rounds | ms, median | smallest to largest | times ours | GB reserved |",
        "|---|---|---|---|---|",
    ]
    ours = rows[0].seconds if rows and rows[0].implementation.ours else None
    for row in rows:
        ratio = "—"
        if ours is not None:
            times = (a / b for a, b in zip(row.seconds, ours, strict=True))
            ratio = f"{statistics.median(times):.2f}"
        low, mid, high = (
            1e3 * value / steps
            for value in (min(row.seconds), statistics.median(row.seconds), max(row.seconds))
        )
        lines.append(
            f"| {row.implementation.name} | {mid:.2f} | {low:.2f} to {high:.2f} | {ratio} | "
            f"{row.gigabytes:.2f} |"
        )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program and return the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--seconds", type=float, default=60, help="per case (default 60)")
    parser.add_argument("--small", action="store_true", help="sizes for a trial run without a GPU")
    args = parser.parse_args(arguments)
    for name in SMALL if args.small else CASES:
        wanted = UNROLL if name.startswith("unroll") else STEP
        compare(name, wanted, torch.device(args.device), args.seconds)
    return 0


if __name__ == "__main__":
    sys.exit(main())
