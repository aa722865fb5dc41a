"""Helpers of the tests of convnet."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import pdd_fast
from pdd_fast.networks.convnet import kernel_shape
from pdd_fast.networks.parameters import parameter_count, views
from pdd_fast.ops import convnet
from pdd_fast.ops._buffers import Buffer
from pdd_fast.ops.convnet import CONVOLUTIONS, ConvNetPasses

CONVOLUTION = pytest.mark.parametrize("convolution", CONVOLUTIONS)


Found = dict[str, Tensor]


@dataclass(frozen=True)
class Shape:
    in_channels: int
    size: tuple[int, int]
    width: int
    depth: int
    batch: int
    classes: int = 4

    def net(self) -> pdd_fast.ConvNet:
        return pdd_fast.ConvNet(self.in_channels, self.classes, self.size, self.width, self.depth)

    def kernel(self) -> convnet.ConvNetShape:
        return convnet.ConvNetShape(
            self.in_channels, *self.size, self.width, self.depth, self.classes
        )


@dataclass(frozen=True)
class Problem:
    """A point of a network's passes."""

    net: pdd_fast.ConvNet
    theta: Tensor
    images: Tensor
    labels: Tensor
    direction: Tensor
    grad_logits: Tensor

    @classmethod
    def of(cls, shape: Shape, soft: bool = False, seed: int = 0) -> Problem:
        """In float64. Norms have weights of both signs, so that a gradient of the wrong sign does
        not cancel.
        """
        draw = torch.Generator().manual_seed(seed)

        def normal(*size: int) -> Tensor:
            return torch.randn(size, generator=draw, dtype=torch.float64)

        net = shape.net()
        parameters = parameter_count(net)
        labels = normal(shape.batch, shape.classes).softmax(1)
        hard = torch.randint(shape.classes, (shape.batch,), generator=draw)
        return cls(
            net,
            0.3 * normal(parameters),
            normal(shape.batch, shape.in_channels, *shape.size),
            labels if soft else hard,
            normal(parameters),
            normal(shape.batch, shape.classes),
        )

    @property
    def kernel(self) -> convnet.ConvNetShape:
        shape = kernel_shape(self.net)
        assert shape is not None
        return shape

    @property
    def soft(self) -> bool:
        return self.labels.is_floating_point()

    def to(self, dtype: torch.dtype) -> Problem:
        names = ("theta", "images", "direction", "grad_logits", *(["labels"] if self.soft else []))
        return replace(self, **{name: getattr(self, name).to(dtype) for name in names})

    def by_autograd(self) -> Found:
        """All that the passes give, by plain torch operators, differentiated twice."""
        theta, images, labels = (
            t.clone().requires_grad_(t.is_floating_point()) for t in self.arguments
        )
        names = [name for name, _ in self.net.named_parameters()]
        parameters = dict(zip(names, views(theta, self.net.parameters()), strict=True))
        logits = torch.func.functional_call(self.net, parameters, (images,))
        losses = F.cross_entropy(logits, labels, reduction="none")
        back = torch.autograd.grad(
            (logits * self.grad_logits).sum(), [theta, images], retain_graph=True
        )
        # The losses' tangents J v without forward mode: what J^T u, which is linear in u, times v
        # has for a gradient.
        u = torch.zeros_like(losses, requires_grad=True)
        (pulled,) = torch.autograd.grad(losses, theta, u, create_graph=True)
        (slopes,) = torch.autograd.grad(pulled @ self.direction, u)
        (gradient,) = torch.autograd.grad(losses.mean(), theta, create_graph=True)
        leaves = {"theta": theta, "images": images} | ({"labels": labels} if self.soft else {})
        tangents = torch.autograd.grad(gradient @ self.direction, list(leaves.values()))
        found = {
            "logits": logits,
            "theta by logits": back[0],
            "images by logits": back[1],
            "losses": losses,
        }
        found |= {"gradient": gradient, "slopes": slopes}
        found |= {
            f"tangent of {name}": tangent for name, tangent in zip(leaves, tangents, strict=True)
        }
        return {name: tensor.detach() for name, tensor in found.items()}

    @property
    def arguments(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.theta, self.images, self.labels

    def dual(
        self,
        passes: ConvNetPasses,
        kept: Buffer | None = None,
        want_theta: bool = True,
        rows: Tensor | None = None,
    ) -> Found:
        """Results of the dual pass, by autograd's names."""
        found = passes.dual(*self.arguments, self.direction, kept, want_theta, rows)
        names = ("slopes", "tangent of theta", "tangent of images", "tangent of labels")
        wanted = (True, want_theta, rows is None or len(rows) > 0, self.soft)
        assert tuple(tensor is not None for tensor in found) == wanted
        return {
            name: tensor for name, tensor in zip(names, found, strict=True) if tensor is not None
        }

    def by(self, passes: ConvNetPasses, kept: bool = False) -> Found:
        """All that the passes give, by the passes."""
        logits, between = passes.forward(self.theta, self.images, keep=True)
        assert between is not None
        theta, images = passes.backward(
            self.theta, self.images, between, self.grad_logits, want_images=True
        )
        assert images is not None
        losses, gradient, step = passes.gradient(*self.arguments, keep=kept)
        assert (step is not None) == kept
        found = {
            "logits": logits,
            "theta by logits": theta,
            "images by logits": images,
            "losses": losses,
        }
        return found | {"gradient": gradient} | self.dual(passes, step)


def assert_close(found: Found, expected: Found, tolerance: float = 1e-10) -> None:
    for name, tensor in found.items():
        truth = expected[name]
        assert tensor.shape == truth.shape, name
        # Gradients of small planes vanish where all of their pixels are active, and only rounding
        # is left of them.
        error = float((tensor - truth).norm())
        assert error <= tolerance * (float(truth.norm()) + 0.1), (name, error, float(truth.norm()))


def assert_same(found: Found, expected: Found) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        assert torch.equal(tensor, expected[name]), name


def passes_of(problem: Problem, convolution: str) -> ConvNetPasses:
    return ConvNetPasses(problem.kernel, convolution)


# Channels that fill no block of 16, one too many for it, and sides that fill no tile of 4 and no
# window of 2.
SHAPES = {
    "the least": Shape(1, (2, 2), 1, 1, 2, 2),
    "two by two after three blocks": Shape(3, (16, 19), 16, 4, 2),
    "one image": Shape(3, (8, 8), 16, 3, 1),
    "tall": Shape(4, (35, 4), 20, 2, 2),
    "wide": Shape(1, (5, 33), 33, 2, 2, 3),
    "many channels of an image": Shape(17, (9, 7), 5, 2, 7, 5),
    "large": Shape(3, (33, 35), 20, 3, 2, 10),
    "one channel": Shape(3, (12, 10), 1, 2, 7),
    "one class": Shape(2, (6, 6), 17, 1, 3, 1),
    "more images than are convolved at once": Shape(1, (20, 18), 17, 2, 130, 11),
    "blocks in and out": Shape(4, (8, 12), 48, 2, 3, 17),
}


@cache
def truth(name: str, soft: bool) -> tuple[Problem, Found]:
    problem = Problem.of(SHAPES[name], soft)
    return problem, problem.by_autograd()


ROUNDED = Shape(3, (16, 16), 32, 3, 6, 10)
