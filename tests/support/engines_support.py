"""Helpers of the tests of engines."""

from __future__ import annotations

import pytest
import torch
import torch.nn.utils.prune
from torch import Tensor
from torch.nn import functional as F

import pdd_fast
from pdd_fast import engines
from pdd_fast.engines import Engine

BOTH = pytest.mark.parametrize("name", ["fused", "composed", "autograd"], indirect=True)


KEEP = pytest.mark.parametrize("keep", [False, True], ids=["made again", "kept"])


class Point:
    """A network, its parameters, a batch, and a direction, in float64."""

    def __init__(self, device: torch.device | str = "cpu", soft: bool = False) -> None:
        self.net = pdd_fast.ConvNet(2, 4, (9, 7), width=5, depth=2).double().to(device)
        theta = pdd_fast.flatten_parameters(self.net)
        self.theta = theta + 0.2 * torch.randn(len(theta), dtype=torch.float64).to(device)
        self.images = torch.randn(6, 2, 9, 7, dtype=torch.float64).to(device)
        labels = (
            torch.randn(6, 4, dtype=torch.float64).softmax(1) if soft else torch.randint(4, (6,))
        )
        self.labels = labels.to(device)
        self.direction = torch.randn(len(theta), dtype=torch.float64).to(device)

    def loss(self, theta: Tensor, images: Tensor, labels: Tensor) -> Tensor:
        pdd_fast.load_parameters(self.net, theta)
        return F.cross_entropy(self.net(images), labels)

    def engine(self, name: str) -> Engine:
        return engines.choose(self.net, name)
