"""Show where a GPU's time goes, and time the choices that only a GPU can make.

    python tools/gpu_profile.py

First, tables of kernels by name: one matching iteration in tf32 and in bfloat16, and one training
step. Then two ways each for the first layer (convolution, or a product with unfolded images) and
for K networks side by side (grouped convolutions, or K convolutions in one graph). The last lines
name the faster way of each. Results are printed as soon as they are known.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from pdd_fast.benchmarks import measure, unroll
from pdd_fast.benchmarks.baselines import Iteration, Problem
from pdd_fast.training.cuda_graphs import Replay

ROWS = 25  # kernels per table
ROUNDS = 15  # timed calls of each way, by turns


def iteration(name: str, device: torch.device, size: tuple[int, int, int, int]) -> Iteration:
    """Return a matching iteration in precision ``name``; ``size``: images, steps, side, width."""
    images, steps, side, width = size
    depth = 3 if side >= 8 else 1
    problem = Problem.draw(images, steps, side, width, depth, device, torch.float32)
    return unroll.matching(problem, graph=device.type == "cuda", precision=name)


def kernels(title: str, call: Callable[[], object], device: torch.device) -> None:
    """Print the kernels of one call by their total time, and how many launches there were."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    call()
    call()
    with torch.profiler.profile(activities=activities) as profile:
        began = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize()
        took = time.perf_counter() - began
    on_gpu = device.type == "cuda"
    rows = sorted(
        (
            (event.self_device_time_total if on_gpu else event.self_cpu_time_total)
            / 1e3,  # from microseconds
            event.count,
            event.key,
        )
        for event in profile.key_averages()
        if not on_gpu or str(event.device_type).endswith("CUDA")
    )[::-1]
    total, launches = sum(row[0] for row in rows), sum(row[1] for row in rows)
    print(f"\n## {title}: {1e3 * took:.2f} ms, of which kernels {total:.2f} ms in {launches}\n")
    print("| ms | share | launches | kernel |\n|---|---|---|---|")
    for spent, count, name in rows[:ROWS]:
        print(f"| {spent:.3f} | {100 * spent / max(total, 1e-9):.1f}% | {count} | {name[:110]} |")
    sys.stdout.flush()


def by_turns(title: str, ways: dict[str, Callable[[], object]], device: torch.device) -> None:
    """Time ``ways`` by turns and print their medians in milliseconds.

    On a GPU each is replayed as a graph, so that no time of the host is in them.
    """
    taken: dict[str, list[float]] = {name: [] for name in ways}
    replays = {name: Replay(partial(_call, call), device) for name, call in ways.items()}
    for replay in replays.values():
        for _ in range(3):
            replay()
    for _ in range(ROUNDS):
        for name, replay in replays.items():
            taken[name].append(timed(replay, device))
    medians = {name: statistics.median(times) for name, times in taken.items()}
    winner = min(medians, key=lambda name: medians[name])
    text = ", ".join(f"{name} {median:.3f} ms" for name, median in medians.items())
    print(f"{title}: {text}; the faster is {winner}", flush=True)


def _call(function: Callable[[], object]) -> None:
    function()


def timed(call: Callable[[], object], device: torch.device) -> float:
    """Return the milliseconds of one call, between idle states of the device."""
    if device.type != "cuda":
        began = time.perf_counter()
        call()
        return 1e3 * (time.perf_counter() - began)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    begin.record()
    call()
    end.record()
    torch.cuda.synchronize()
    return float(begin.elapsed_time(end))


def use(name: str) -> None:
    """Let convolutions and matrix products use precision ``name``, with the engines' flags."""
    measure.set_precision(name)
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False


def first_layer(device: torch.device, images: int, side: int, width: int) -> None:
    """Time the forward pass and the weight gradient of a 3×3 convolution of 3 channels."""
    x = torch.randn(images, 3, side, side, device=device).contiguous(
        memory_format=torch.channels_last
    )
    w = torch.randn(width, 3, 3, 3, device=device).contiguous(memory_format=torch.channels_last)
    grad = torch.randn(images, width, side, side, device=device).contiguous(
        memory_format=torch.channels_last
    )

    # Once a step, and then read by every product: [B*H*W, 32], of which 27 columns are used.
    def unfold() -> Tensor:
        return F.pad(F.unfold(x, 3, padding=1).transpose(1, 2).reshape(-1, 27), (0, 5))

    unfolded = unfold()
    flat_w = F.pad(w.contiguous().view(width, 27), (0, 5))
    rows = grad.permute(0, 2, 3, 1).reshape(-1, width)

    def weight_gradient() -> Tensor:
        return torch.ops.aten.convolution_backward(
            grad, x, w, None, [1, 1], [1, 1], [1, 1], False, [0, 0], 1, [False, True, False]
        )[1]

    title = f"first layer, {images} images of {side}x{side}, width {width}"
    replay = Replay(partial(_call, unfold), device)
    for _ in range(3):
        replay()
    once = statistics.median(timed(replay, device) for _ in range(ROUNDS))
    print(f"{title}: to unfold the images once a step takes {once:.3f} ms", flush=True)
    for name in ("float32", "tf32"):
        use(name)
        by_turns(
            f"{title}, forward, {name}",
            {
                "convolution": lambda: F.conv2d(x, w, padding=1),
                "product": lambda: unfolded @ flat_w.T,
            },
            device,
        )
        by_turns(
            f"{title}, weight gradient, {name}",
            {"convolution": weight_gradient, "product": lambda: rows.T @ unfolded},
            device,
        )


def networks(device: torch.device, count: int, images: int, side: int, width: int) -> None:
    """Time one hidden convolution of ``count`` networks, grouped and one by one in a graph."""
    weights = torch.randn(count * width, width, 3, 3, device=device).contiguous(
        memory_format=torch.channels_last
    )
    separate = [part.contiguous(memory_format=torch.channels_last) for part in weights.split(width)]
    together = torch.randn(images, count * width, side, side, device=device).contiguous(
        memory_format=torch.channels_last
    )
    stacked = [
        part.contiguous(memory_format=torch.channels_last) for part in together.split(width, 1)
    ]

    def grouped() -> None:
        F.conv2d(together, weights, padding=1, groups=count)

    def one_by_one() -> None:
        for x, w in zip(stacked, separate, strict=True):
            F.conv2d(x, w, padding=1)

    for name in ("float32", "tf32"):
        use(name)
        by_turns(
            f"{count} networks, {images} images of {side}x{side}, width {width}, {name}",
            {"grouped": grouped, "one by one": one_by_one},
            device,
        )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program and return the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--small", action="store_true", help="sizes for a trial run without a GPU")
    args = parser.parse_args(arguments)
    device = torch.device(args.device)
    size, step, layer, side_by_side = (
        ((4, 2, 8, 4), (4, 1, 8, 4), (4, 8, 4), (2, 4, 8, 4))
        if args.small
        else ((20, 10, 32, 128), (256, 1, 32, 128), (256, 32, 128), (10, 64, 16, 128))
    )
    for name in ("tf32", "bfloat16"):
        title = f"iteration, {size[0]} images, N = {size[1]}, {name}"
        kernels(title, iteration(name, device, size), device)
    kernels(
        f"one step of {step[0]} images and its adjoint, tf32",
        iteration("tf32", device, step),
        device,
    )
    print("\n## two ways each\n", flush=True)
    first_layer(device, *layer)
    networks(device, *side_by_side)
    return 0


if __name__ == "__main__":
    sys.exit(main())
