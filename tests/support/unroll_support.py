"""Helpers of the tests of unroll."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pdd_fast
from pdd_fast.augmentation.parameters import AugmentParameters

# "composed": the fused engine with the passes of a GPU, which are not one kernel.
ENGINES = pytest.mark.parametrize("engine", ["fused", "composed", "autograd"], indirect=True)


@dataclass
class Problem:
    """Arguments of one unroll, and the vector that its result is multiplied by to have a scalar to
    differentiate.
    """

    net: nn.Module
    theta: Tensor
    images: Tensor
    labels: Tensor
    lrs: Tensor
    batches: list[Tensor]
    augmentations: list[AugmentParameters] | None
    direction: Tensor

    def to(self, dtype: torch.dtype, device: torch.device | str) -> Problem:
        def move(tensor: Tensor) -> Tensor:
            return tensor.to(device, dtype if tensor.is_floating_point() else tensor.dtype)

        moved = {
            name: move(getattr(self, name))
            for name in ("theta", "images", "labels", "lrs", "direction")
        }
        return replace(self, net=copy.deepcopy(self.net).to(device, dtype), **moved)

    def gradients(self, run: Callable[..., Tensor], **options: Any) -> dict[str, Tensor]:
        """θ_N and the gradient of θ_N · direction in everything that has one."""
        names = ["theta", "images", "lrs"] + (["labels"] if self.labels.is_floating_point() else [])
        leaves = {name: getattr(self, name).detach().clone().requires_grad_() for name in names}
        labels = leaves.get("labels", self.labels)
        result = run(
            self.net,
            leaves["theta"],
            leaves["images"],
            labels,
            leaves["lrs"],
            self.batches,
            self.augmentations,
            **options,
        )
        grads = torch.autograd.grad(result @ self.direction, list(leaves.values()))
        return {"theta_N": result.detach()} | dict(zip(names, grads, strict=True))


def make(
    steps: int = 3,
    channels: int = 3,
    size: int | tuple[int, int] = 8,
    classes: int = 3,
    width: int = 6,
    depth: int = 2,
    images: int = 7,
    batch: int = 5,
    soft: bool = False,
    per_step: bool = False,
    dsa: pdd_fast.DSA | None = None,
    seed: int = 0,
) -> Problem:
    draw = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=draw, dtype=torch.float64)

    H, W = (size, size) if isinstance(size, int) else size
    net = pdd_fast.ConvNet(channels, classes, (H, W), width, depth).double()
    theta = pdd_fast.flatten_parameters(net)
    theta = theta + 0.1 * randn(len(theta))  # norm weights and biases away from 1 and 0
    labels = (
        randn(images, classes).softmax(1)
        if soft
        else torch.randint(classes, (images,), generator=draw)
    )
    lrs = 0.02 + 0.02 * torch.rand(steps, generator=draw, dtype=torch.float64)
    # With replacement, so that an image occurs twice in one batch and in several.
    batches = [torch.randint(images, (batch,), generator=draw) for _ in range(steps)]
    augmentations = None if dsa is None else [dsa.sample(batch, (H, W), draw) for _ in range(steps)]
    return Problem(
        net,
        theta,
        randn(images, channels, H, W),
        labels,
        lrs if per_step else lrs[0],
        batches,
        augmentations,
        randn(len(theta)),
    )


SINGLE, MULTIPLE = pdd_fast.DSA(), pdd_fast.DSA(mode="multiple")
