"""Helpers of the tests of network kernels."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import pdd_fast

CALLED: list[str] = []


def network(size: tuple[int, int] = (9, 11), width: int = 6, depth: int = 2) -> pdd_fast.ConvNet:
    torch.manual_seed(0)
    net = pdd_fast.ConvNet(3, 4, size, width, depth).double()
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.5)
    return net


def batch(net: pdd_fast.ConvNet, count: int = 5, requires_grad: bool = True) -> Tensor:
    images = torch.randn(count, 3, *net.image_size, dtype=torch.float64)
    return images.requires_grad_(requires_grad)


def assert_close(found: list[Tensor], expected: list[Tensor]) -> None:
    scale = max(float(part.detach().abs().max()) for part in expected)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12 * scale)
