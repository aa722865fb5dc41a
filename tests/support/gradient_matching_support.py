"""Helpers of the tests of gradient matching."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import pdd_fast
from pdd_fast.functional.gradient_distance import COSINE_EPS

# "composed": the fused engine with the passes of a GPU, which are not one kernel.
ENGINES = pytest.mark.parametrize("engine", ["fused", "composed", "autograd"], indirect=True)


KEEP = pytest.mark.parametrize("keep", [False, True], ids=["made again", "kept"])


LEAST = {"convolutions": 3, "weights": 2, "all": 0}  # dimensions


def plain_distance(g: Tensor, t: Tensor, distance: str) -> Tensor:
    """Distance of one parameter's gradients."""
    if distance == "squared":
        return (g - t).square().sum()
    g, t = g.reshape(len(g), -1), t.reshape(len(t), -1)
    return (1 - (g * t).sum(1) / (g.norm(dim=1) * t.norm(dim=1) + COSINE_EPS)).sum()


def plain(
    net: nn.Module,
    theta: Tensor,
    real_images: Tensor,
    real_labels: Tensor,
    images: Tensor,
    labels: Tensor,
    distance: str = "squared",
    parameters: str = "auto",
) -> Tensor:
    """The textbook formula, differentiable to any order."""
    named = dict(net.named_parameters())
    parts = theta.split([p.numel() for p in named.values()])
    at = {
        name: part.view(p.shape).detach().requires_grad_()
        for (name, p), part in zip(named.items(), parts, strict=True)
    }

    def gradients(x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        loss = F.cross_entropy(torch.func.functional_call(net, at, (x,)), y)
        return torch.autograd.grad(
            loss, list(at.values()), create_graph=True, allow_unused=True, materialize_grads=True
        )

    if parameters == "auto":
        parameters = {"squared": "convolutions", "cosine": "weights"}[distance]
    target = [t.detach() for t in gradients(real_images, real_labels)]
    found = gradients(images, labels)
    chosen = [(g, t) for g, t in zip(found, target, strict=True) if g.dim() >= LEAST[parameters]]
    return torch.stack([plain_distance(g, t, distance) for g, t in chosen]).sum()


@dataclass
class Problem:
    """Arguments of one distance."""

    net: nn.Module
    theta: Tensor
    real_images: Tensor
    real_labels: Tensor
    images: Tensor
    labels: Tensor

    def to(self, dtype: torch.dtype, device: torch.device | str) -> Problem:
        def move(tensor: Tensor) -> Tensor:
            return tensor.to(device, dtype if tensor.is_floating_point() else tensor.dtype)

        moved = {name: move(value) for name, value in vars(self).items() if name != "net"}
        return replace(self, net=copy.deepcopy(self.net).to(device, dtype), **moved)

    @property
    def arguments(self) -> tuple[Any, ...]:
        return tuple(vars(self).values())

    def gradients(self, run: Any, **options: Any) -> dict[str, Tensor]:
        """The distance and its gradient in everything that has one."""
        images = self.images.detach().clone().requires_grad_()  # which keeps the memory format
        leaves = {"images": images}
        labels = self.labels
        if labels.is_floating_point():
            labels = leaves["labels"] = labels.detach().clone().requires_grad_()
        loss = run(
            self.net, self.theta, self.real_images, self.real_labels, images, labels, **options
        )
        assert loss.shape == ()
        found = torch.autograd.grad(loss, list(leaves.values()))
        return {"loss": loss.detach()} | dict(zip(leaves, found, strict=True))


def make(
    channels: int = 3,
    size: tuple[int, int] = (8, 8),
    classes: int = 3,
    width: int = 6,
    depth: int = 2,
    real: int = 7,
    images: int = 5,
    soft: bool = False,
    seed: int = 0,
) -> Problem:
    draw = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=draw, dtype=torch.float64)

    def labels(n: int) -> Tensor:
        return (
            randn(n, classes).softmax(1) if soft else torch.randint(classes, (n,), generator=draw)
        )

    net = pdd_fast.ConvNet(channels, classes, size, width, depth).double()
    theta = pdd_fast.flatten_parameters(net)
    theta = theta + 0.1 * randn(len(theta))  # norm weights and biases away from 1 and 0
    x, y = randn(real, channels, *size), randn(images, channels, *size)
    return Problem(net, theta, x, labels(real), y, labels(images))
