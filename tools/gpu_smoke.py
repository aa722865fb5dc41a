"""Check in one process that the GPU path is right, a line per check as soon as it is known.

    python tools/gpu_smoke.py    # or --device cpu, for the checks themselves

The checks: every operator against the CPU, a gradient and a meta-gradient against float64, K
networks in parallel against one at a time, replayed graphs against calls, and one graph that
outlives forty others. Each check is independent of the others. Exit status: 0 if all pass.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial

import torch
from sanitizer_driver import run as run_operators
from torch import Tensor

import pdd_fast
from pdd_fast import engines
from pdd_fast.augmentation.dsa import DSA
from pdd_fast.benchmarks.measure import relative_error
from pdd_fast.training.cuda_graphs import CudaBackend, Replay
from pdd_fast.training.sgd import Loop, Sgd, TrainState

# Largest relative error of a gradient. A ConvNet in float32 has 1e-6 on a CPU; TF32 rounds operands
# to 2^-11 and bfloat16 to 2^-8.
LIMITS = {"float32": 1e-4, "tf32": 2e-2, "bfloat16": 1e-1}
WIDTH, SIZE, CLASSES = 16, 16, 10


class CheckError(Exception):
    """A check's result is wrong."""


def require(name: str, error: float | None, limit: float) -> str:
    """Return the error as a text, or raise CheckError if it is above ``limit`` or not finite."""
    text = f"{name} {math.nan if error is None else error:.1e}"
    if error is None or not error <= limit:
        raise CheckError(f"{text}, above {limit:.0e}")
    return text


def network(device: torch.device, dtype: torch.dtype = torch.float32) -> pdd_fast.ConvNet:
    """Return a network that is the same for every device and type."""
    torch.manual_seed(0)
    return pdd_fast.ConvNet(3, CLASSES, SIZE, WIDTH, 3).to(device, dtype)


def batch(count: int, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return images and labels that are the same for every device and type."""
    images = torch.randn(count, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1))
    return images.to(device, dtype), (torch.arange(count) % CLASSES).to(device)


def operators(device: torch.device) -> str:
    """Check every operator against the CPU, at odd sizes and both layouts."""
    with torch.no_grad():
        return f"{run_operators(device)} calls"


def gradient(device: torch.device) -> str:
    """Check a gradient in every precision against autograd in float64 on the CPU."""
    cpu = torch.device("cpu")
    net = network(cpu, torch.float64)
    images, labels = batch(32, cpu, torch.float64)
    truth = engines.choose(net, "autograd").gradient(
        pdd_fast.flatten_parameters(net), images, labels
    )[1]
    found = []
    for name, limit in LIMITS.items():
        own = network(device)
        result = engines.choose(own, "fused", name).gradient(
            pdd_fast.flatten_parameters(own), *batch(32, device, torch.float32)
        )[1]
        found.append(require(name, relative_error(result, truth), limit))
    return ", ".join(found)


def meta_gradient(device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return the gradient of a matching loss through eight augmented steps."""
    net = network(device, dtype)
    images, labels = batch(20, device, dtype)
    start = pdd_fast.flatten_parameters(net)
    generator = torch.Generator().manual_seed(2)
    dsa = DSA("color_crop_cutout_flip_scale_rotate")
    batches = [torch.randperm(20, generator=generator) for _ in range(8)]
    augmentations = [dsa.sample(20, SIZE, generator) for _ in batches]
    target = start + 0.01 * torch.randn(start.shape, generator=generator).to(device, dtype)
    images.requires_grad_()
    lr = torch.tensor(0.02, device=device, dtype=dtype)
    end = pdd_fast.unroll(net, start, images, labels, lr, batches, augmentations)
    loss = pdd_fast.trajectory_matching_loss(end, start, target)
    return torch.autograd.grad(loss, images)[0]


def unrolled(device: torch.device) -> str:
    """Check a meta-gradient against float64 on the CPU, and that a second one has the same bits."""
    found = meta_gradient(device)
    if not torch.equal(found, meta_gradient(device)):
        raise CheckError("two runs differ")
    truth = meta_gradient(torch.device("cpu"), torch.float64)
    return require("float32", relative_error(found, truth), 1e-3)


def side_by_side(device: torch.device) -> str:
    """Check that the gradients of four networks have the bits of one at a time."""
    net = network(device)
    engine = engines.choose(net, "fused")
    start = pdd_fast.flatten_parameters(net)
    theta = torch.stack([start * (1 + 0.1 * k) for k in range(4)])
    images, labels = batch(80, device, torch.float32)
    x, y = images.unflatten(0, (4, 20)), labels.unflatten(0, (4, 20))
    together = engine.gradients(theta, x, y)[1]
    alone = torch.stack([engine.gradient(theta[k], x[k], y[k])[1] for k in range(4)])
    if not torch.equal(together, alone):
        error = relative_error(together, alone.cpu().double())
        raise CheckError(f"they differ by {error}")
    return "the same bits"


def training(device: torch.device, graph: bool) -> Tensor:
    """Return the parameters of two networks after three epochs."""
    net = network(device)
    images, labels = batch(50, device, torch.float32)
    theta = pdd_fast.flatten_parameters(net).repeat(2, 1)
    state = TrainState.start(theta)
    sgd = Sgd(engines.choose(net, "fused"), DSA("color_crop_flip"), 20, 0.9, 5e-4, graph=graph)
    loop = Loop(sgd, state, images, labels)
    generators = [torch.Generator().manual_seed(seed) for seed in (3, 4)]
    for _ in range(3):
        loop.epoch(0.02, generators)
    return state.theta


def graphs(device: torch.device) -> str:
    """Check that replayed training steps give the bits of steps that run kernel by kernel."""
    replayed, called = training(device, True), training(device, False)
    if not torch.equal(replayed, called):
        error = relative_error(replayed, called.cpu().double())
        raise CheckError(f"replays differ by {error}")
    return "the same bits"


def product(device: torch.device) -> tuple[Tensor, Replay]:
    """Return an output, and a matrix product that adds to it.

    The sum over 65536 elements is long enough for cuBLAS to split it, in a workspace.
    """
    matrix = torch.randn(64, 65536, generator=torch.Generator().manual_seed(5)).to(device)
    out = torch.zeros(64, 64, device=device)
    return out, Replay(partial(_add_product, matrix, out), device)


def _add_product(matrix: Tensor, out: Tensor) -> None:
    out.add_(matrix @ matrix.T)


def forty_graphs(device: torch.device) -> str:
    """Check that a graph's product is right after forty other graphs were made and destroyed."""
    out, replay = product(device)
    for _ in range(3):
        replay()
    expected = out.clone()
    for _ in range(40):
        other = product(device)
        for _ in range(3):
            other[1]()
        del other
        if device.type == "cuda":
            torch.cuda.empty_cache()
    filler = [torch.full((1 << 20,), float("nan"), device=device) for _ in range(16)]
    out.zero_()
    for _ in range(3):
        replay()
    if not torch.equal(out, expected) or not all(bool(part.isnan().all()) for part in filler):
        raise CheckError("a replay read or wrote memory that is not its own")
    return "the same bits"


CHECKS: dict[str, Callable[[torch.device], str]] = {
    "operators against the CPU": operators,
    "gradient against float64": gradient,
    "meta-gradient against float64": unrolled,
    "networks in parallel": side_by_side,
    "graphs against calls": graphs,
    "forty other graphs": forty_graphs,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the checks and return the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda")
    device = torch.device(parser.parse_args(arguments).device)
    failed = 0
    for name, check in CHECKS.items():
        began, CudaBackend.failure = time.monotonic(), ""
        try:
            found = check(device)
            if CudaBackend.failure:  # the check then ran kernel by kernel
                raise CheckError(f"no graph was captured: {CudaBackend.failure}")
            outcome = f"ok      {found}"
        except Exception as error:  # the other checks still tell something
            failed += 1
            line = (str(error).splitlines() or [""])[0]
            outcome = f"FAILED  {type(error).__name__}: {line}"
        print(f"{name:32s} {outcome}  ({time.monotonic() - began:.1f} s)", flush=True)
    print(f"{len(CHECKS) - failed} of {len(CHECKS)} checks passed", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
