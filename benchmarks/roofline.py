"""What no implementation can be much faster than with direct convolutions: its arithmetic and its
bytes, at the rates that this machine reached in the same run.

Convolutions are counted layer by layer and kind by kind (forward, input gradient, weight gradient),
each at the best rate that torch's own convolutions reached for that layer and kind, in planar or
channels-last memory, on the batch or on twice the batch, which is what a dual pass calls with. With
F for one forward pass of all convolutions, a trajectory step takes 3 F, a dual pass 8 F, or 6 F
where activations were kept: 11 F in all with memory "recompute", 9 F with "cache". Gradient
matching wants no Hessian-vector product: of its synthetic images a gradient and a dual pass with
activations kept take 7 F, of its real ones a gradient takes 3 F. The first layer takes less: the
images' gradient is wanted in the tangents alone, and images have no tangent.

Bytes are what lies between the convolutions, at the rate of a copy too large for any cache. Going
forward, norm, ReLU and pooling read z and write a quarter of it; going backward they read a quarter
and z and write z: 3.5 times the size of z in a training step. The dual pass does both for values
and tangents: 10.5 times in all. The convolutions' own bytes are in their measured rate.

Fewer operations than the direct convolution's (Winograd) can go below this roofline.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from pdd_fast.benchmarks.cases import Case
from pdd_fast.benchmarks.measure import Job, set_precision, timed
from pdd_fast.benchmarks.roofline_counts import Layer, layers

CAPTURED = 20  # calls in one graph: one launch costs as much as a small convolution
TRIES = 3  # of which the fastest counts
AT_LEAST = 0.02  # seconds of one; there are 36 convolutions to try for a network of three layers


def replayed(call: Callable[[], object], device: torch.device) -> tuple[Callable[[], object], int]:
    """``call`` without the gaps between launches, and how often it is run: on a GPU a graph of
    several.
    """
    if device.type != "cuda":
        return call, 1
    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        for _ in range(3):
            call()
    torch.cuda.current_stream(device).wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(CAPTURED):
            call()
    return graph.replay, CAPTURED


def seconds(call: Callable[[], object], device: torch.device) -> float:
    """Of one call, at best."""
    call()
    repeated, times = replayed(call, device)
    first, _ = timed(repeated, device)
    calls = max(1, math.ceil(AT_LEAST / first))

    def several() -> None:
        for _ in range(calls):
            repeated()

    return min(first, *(timed(several, device)[0] / calls for _ in range(TRIES))) / times


def _gradient(which: int, grad: Tensor, x: Tensor, w: Tensor) -> Tensor:
    mask = [which == 0, which == 1, False]
    return torch.ops.aten.convolution_backward(
        grad, x, w, None, [1, 1], [1, 1], [1, 1], False, [0, 0], 1, mask
    )[which]


def convolution_rates(layer: Layer, precision: str, device: torch.device) -> dict[str, float]:
    """Operations a second of a layer's convolution and its two gradients, at best."""
    set_precision(precision)
    dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
    rates: dict[str, list[float]] = {}
    for memory in (torch.channels_last, torch.contiguous_format):
        w = torch.randn(layer.width, layer.channels, 3, 3, device=device, dtype=dtype).contiguous(
            memory_format=memory
        )
        for batch in (layer.batch, 2 * layer.batch):
            x = torch.randn(
                batch, layer.channels, layer.side, layer.side, device=device, dtype=dtype
            )
            x = x.contiguous(memory_format=memory)
            grad = torch.randn_like(F.conv2d(x, w, padding=1)).contiguous(memory_format=memory)
            calls: dict[str, Callable[[], object]] = {
                "forward": partial(F.conv2d, x, w, padding=1),
                "input gradient": partial(_gradient, 0, grad, x, w),
                "weight gradient": partial(_gradient, 1, grad, x, w),
            }
            for kind, call in calls.items():
                rates.setdefault(kind, []).append(layer.operations(batch) / seconds(call, device))
    return {kind: max(found) for kind, found in rates.items()}


def copy_rate(device: torch.device) -> float:
    """Bytes a second, read and written, of a copy too large for any cache."""
    numbers = (1 << 30 if device.type == "cuda" else 1 << 26) // 4
    source = torch.randn(numbers, device=device)
    target = torch.empty_like(source)
    target.copy_(source)
    return 2 * 4 * numbers / seconds(lambda: target.copy_(source), device)


def measured(case: Case, precisions: Sequence[str], job: Job) -> dict[str, Any]:
    """The rates that a case's roofline is counted with."""
    with torch.no_grad():
        found: dict[str, Any] = {"copy": copy_rate(job.device)}
        if case.kind != "dsa":
            found["convolution"] = {
                precision: [
                    convolution_rates(layer, precision, job.device) for layer in layers(case)
                ]
                for precision in precisions
            }
    return found
