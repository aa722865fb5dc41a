"""Measure a lower bound on the time of an implementation that uses direct convolutions.

The bound consists of the arithmetic and the bytes, at the rates that this machine reached in the
same run.

Convolutions are counted by layer and kind (forward, input gradient, weight gradient). Each counts
at the best rate that torch's own convolutions reached for that layer and kind, in planar or
channels-last memory, on the batch or on twice the batch, which is the size that a dual pass uses. F
is one forward pass of all convolutions. A trajectory step takes 3 F. A dual pass takes 8 F, or 6 F
if activations were saved. The total is 11 F with memory "recompute" and 9 F with "cache". Gradient
matching needs no Hessian-vector product: the synthetic images take 7 F, for a gradient and a dual
pass with saved activations, and the real images take 3 F for a gradient. The first layer takes
less: only the tangent pass computes the images' gradient, and images have no tangent.

Bytes are those moved between the convolutions, at the rate of a copy too large for any cache. In
the forward pass, norm, ReLU and pooling read z and write a quarter of it. In the backward pass they
read a quarter and z, and write z. A training step therefore moves 3.5 times the size of z. The dual
pass does both for values and tangents, which makes 10.5 times in all. The measured rate of the
convolutions includes their own bytes.

An algorithm with fewer operations than direct convolution (Winograd) can be faster than this bound.
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

CAPTURED = 20  # calls per graph: one launch costs as much as a small convolution
TRIES = 3  # the fastest one counts
AT_LEAST = 0.02  # seconds per try; a network of three layers has 36 convolutions to try


def replayed(call: Callable[[], object], device: torch.device) -> tuple[Callable[[], object], int]:
    """Return ``call`` without the gaps between launches, and the number of calls that it makes.

    On a GPU the result replays a graph of several calls.
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
    """Return the seconds of one call, the best of several tries."""
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
    """Return the best operations per second of a layer's convolution and its two gradients."""
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
    """Return the bytes per second, read and written, of a copy too large for any cache."""
    elements = (1 << 30 if device.type == "cuda" else 1 << 26) // 4
    source = torch.randn(elements, device=device)
    target = torch.empty_like(source)
    target.copy_(source)
    return 2 * 4 * elements / seconds(lambda: target.copy_(source), device)


def measured(case: Case, precisions: Sequence[str], job: Job) -> dict[str, Any]:
    """Return the rates from which a case's roofline is computed."""
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
