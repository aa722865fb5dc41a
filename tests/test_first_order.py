"""A second derivative through what has only a first one is an error, whichever way it is reached."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import pdd_fast

ENGINE = pytest.mark.parametrize("engine", ["fused", "autograd"])
MESSAGE = "second derivatives must not be asked for"
LABELS, BATCHES = torch.arange(6) % 4, [list(range(6))] * 2


def network() -> pdd_fast.ConvNet:
    torch.manual_seed(0)
    return pdd_fast.ConvNet(3, 4, 8, width=5, depth=2).double()


class Leaves:
    """Everything that an unroll is differentiated by."""

    def __init__(self) -> None:
        self.theta = pdd_fast.flatten_parameters(network()).requires_grad_()
        self.images = torch.randn(6, 3, 8, 8, dtype=torch.float64).requires_grad_()
        self.labels = torch.randn(6, 4, dtype=torch.float64).softmax(1).requires_grad_()
        self.rate = torch.tensor(0.05, dtype=torch.float64, requires_grad=True)

    def end(self, engine: str) -> Tensor:
        return pdd_fast.unroll(network(), self.theta, self.images, self.labels, self.rate, BATCHES, engine=engine)


LOSSES: dict[str, Callable[[Tensor], Tensor]] = {
    "linear": torch.Tensor.sum,  # its incoming gradient is a constant
    "square": lambda end: end.square().sum(),
}


@ENGINE
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("first", ["theta", "images", "labels", "rate"])
@pytest.mark.parametrize("then", ["theta", "images", "labels", "rate"])
def test_unroll(engine: str, loss: str, first: str, then: str) -> None:
    leaves = Leaves()
    value = LOSSES[loss](leaves.end(engine))
    (gradient,) = torch.autograd.grad(value, getattr(leaves, first), create_graph=True)
    other = getattr(leaves, then)
    total = gradient.square().sum() + other.square().sum()  # the input is reached directly too
    with pytest.raises(RuntimeError, match=f"unroll: {MESSAGE}"):
        torch.autograd.grad(total, other)


@ENGINE
def test_backward_of_a_penalty(engine: str) -> None:
    leaves = Leaves()
    leaves.theta = leaves.theta.detach()
    (gradient,) = torch.autograd.grad(leaves.end(engine).sum(), leaves.images, create_graph=True)
    with pytest.raises(RuntimeError, match=MESSAGE):
        (gradient.norm() + leaves.images.norm()).backward()


@ENGINE
def test_a_constant_gradient_does_not_need_one(engine: str) -> None:
    """create_graph=True where nothing but the first derivative is used, as optimizers with closures ask for it."""
    leaves = Leaves()
    expected = torch.autograd.grad(leaves.end(engine).square().sum(), leaves.images)[0]
    (found,) = torch.autograd.grad(leaves.end(engine).square().sum(), leaves.images, create_graph=True)
    assert torch.equal(found.detach(), expected)
    (found * 2).detach()
    other = torch.zeros((), requires_grad=True)
    assert torch.autograd.grad(found.detach().sum() * other, other)[0].isfinite()


@ENGINE
@pytest.mark.parametrize("distance", ["squared", "cosine"])
def test_gradient_matching(engine: str, distance: str) -> None:
    leaves = Leaves()
    real = torch.randn(7, 3, 8, 8, dtype=torch.float64)
    for by in (leaves.images, leaves.labels):
        loss = pdd_fast.gradient_matching(
            network(), leaves.theta.detach(), real, torch.arange(7) % 4, leaves.images, leaves.labels, distance,
            engine=engine,
        )  # fmt: skip
        for value in (loss, loss.square()):
            (gradient,) = torch.autograd.grad(value, by, create_graph=True)
            with pytest.raises(RuntimeError, match=f"gradient_matching: {MESSAGE}"):
                torch.autograd.grad(gradient.square().sum() + leaves.images.square().sum(), leaves.images)


def test_a_constant_start_may_be_written_to_before_the_backward_pass() -> None:
    leaves = Leaves()
    leaves.theta = leaves.theta.detach()
    expected = torch.autograd.grad(leaves.end("fused").sum(), leaves.images)[0]
    end = leaves.end("fused")
    leaves.theta.zero_()
    assert torch.equal(torch.autograd.grad(end.sum(), leaves.images)[0], expected)
