"""What no implementation of the iteration can be much faster than: its arithmetic and its bytes at measured rates.

Convolutions: a trajectory step takes 3 F (F = one forward pass of all convolutions), the dual pass 8 F, or 6 F where
activations were kept; so 11 F in all with memory "recompute" and 9 F with "cache". Bytes: what lies between the
convolutions. Going forward, norm, ReLU and pooling read z and write a quarter of it; going backward they read a quarter
and z and write z: 3.5 times the size of z. The dual pass does both for values and tangents: 10.5 times in all. The
convolutions' own bytes are in their measured rate. Operations are those of the direct convolution; a library that takes
fewer (Winograd) shows a higher rate.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from measure import seconds_per_call, set_precision
from torch.nn import functional as F

BYTES = {"float32": 4, "tf32": 4, "bfloat16": 2}
PASSES = 10.5
CAPTURED = 20  # convolutions in one graph: one launch costs as much as a small convolution


@dataclass(frozen=True)
class Size:
    """What one iteration works on."""

    n: int
    steps: int
    size: int
    width: int
    depth: int

    def forward(self) -> float:
        """F: floating-point operations of one forward pass of all convolutions."""
        channels = [3] + [self.width] * (self.depth - 1)
        sides = [self.size >> i for i in range(self.depth)]
        return float(sum(2 * 9 * c * self.width * side**2 for c, side in zip(channels, sides, strict=True)) * self.n)

    def activations(self) -> int:
        """Numbers in all convolutions' results of one forward pass."""
        return sum(self.n * self.width * (self.size >> i) ** 2 for i in range(self.depth))


def replayed(call: Callable[[], object], device: torch.device) -> tuple[Callable[[], object], int]:
    """``call`` without the gaps between launches, and how often it is run: on a GPU a graph of several."""
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


def convolution_rate(size: Size, precision: str, device: torch.device) -> float:
    """Operations a second of a 3×3 convolution, width to width, at the second layer's resolution, channels-last.

    That layer does three quarters of the work. The better of the batch and twice the batch, which is what the dual pass
    calls with: on a GPU the larger one fills more of the chip.
    """
    set_precision(precision)
    dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
    side, rates = max(size.size // 2, 1), []
    weight = torch.randn(size.width, size.width, 3, 3, device=device, dtype=dtype)
    weight = weight.contiguous(memory_format=torch.channels_last)
    for batch in (size.n, 2 * size.n):
        x = torch.randn(batch, size.width, side, side, device=device, dtype=dtype)
        x = x.contiguous(memory_format=torch.channels_last)
        call, times = replayed(partial(F.conv2d, x, weight, padding=1), device)
        operations = 2 * 9 * size.width**2 * side**2 * batch * times
        call()
        rates.append(operations / seconds_per_call(call, device))
    return max(rates)


def copy_rate(device: torch.device) -> float:
    """Bytes a second, read and written, of a copy too large for any cache."""
    numbers = (1 << 30 if device.type == "cuda" else 1 << 26) // 4
    source = torch.randn(numbers, device=device)
    target = torch.empty_like(source)
    target.copy_(source)
    return 2 * 4 * numbers / seconds_per_call(lambda: target.copy_(source), device)


def rates(size: Size, precisions: list[str], device: torch.device) -> dict[str, Any]:
    with torch.no_grad():
        convolution = {precision: convolution_rate(size, precision, device) for precision in precisions}
        return {"convolution": convolution, "copy": copy_rate(device)}


def floor(size: Size, measured: dict[str, Any], precision: str) -> dict[str, float]:
    """Seconds of an iteration's parts at the measured rates."""
    forward = size.forward() * size.steps / measured["convolution"][precision]
    passes = PASSES * size.activations() * BYTES[precision] * size.steps / measured["copy"]
    return {"9 F": 9 * forward, "11 F": 11 * forward, "passes": passes}
