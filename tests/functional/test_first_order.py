"""A second derivative through what has only a first one is an error, whichever way it is
reached."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

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
        self.lr = torch.tensor(0.05, dtype=torch.float64, requires_grad=True)

    def end(self, engine: str) -> Tensor:
        return pdd_fast.unroll(
            network(), self.theta, self.images, self.labels, self.lr, BATCHES, engine=engine
        )


LOSSES: dict[str, Callable[[Tensor], Tensor]] = {
    "linear": torch.Tensor.sum,  # its incoming gradient is a constant
    "square": lambda end: end.square().sum(),
}


@ENGINE
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("first", ["theta", "images", "labels", "lr"])
@pytest.mark.parametrize("then", ["theta", "images", "labels", "lr"])
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
    """create_graph=True where nothing but the first derivative is used, as optimizers with closures
    ask for it.
    """
    leaves = Leaves()
    expected = torch.autograd.grad(leaves.end(engine).square().sum(), leaves.images)[0]
    (found,) = torch.autograd.grad(
        leaves.end(engine).square().sum(), leaves.images, create_graph=True
    )
    assert torch.equal(found.detach(), expected)


@ENGINE
@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpoint_gives_the_same_with_and_without_create_graph(
    engine: str, reentrant: bool
) -> None:
    leaves = Leaves()
    expected = torch.autograd.grad(leaves.end(engine).square().sum(), leaves.images)[0]
    for create_graph in (False, True) if not reentrant else (False,):
        end = checkpoint(leaves.end, engine, use_reentrant=reentrant, preserve_rng_state=False)
        if reentrant:  # which needs an argument that requires gradients
            end = checkpoint(lambda _: leaves.end(engine), leaves.images, use_reentrant=True)
            end.square().sum().backward()
            found = leaves.images.grad
        else:
            (found,) = torch.autograd.grad(
                end.square().sum(), leaves.images, create_graph=create_graph
            )
        assert found is not None
        assert torch.equal(found.detach(), expected)


@ENGINE
def test_transforms_and_forward_mode_are_refused_by_name(engine: str) -> None:
    leaves = Leaves()
    net, theta, images = network(), leaves.theta.detach(), leaves.images.detach()

    def unrolled(x: Tensor) -> Tensor:
        return pdd_fast.unroll(net, theta, x, LABELS, 0.1, BATCHES, engine=engine).sum()

    def matched(x: Tensor) -> Tensor:
        return pdd_fast.gradient_matching(net, theta, x, LABELS, images, LABELS, engine=engine)

    for function in (unrolled, matched):
        for use in (
            lambda f: torch.func.grad(f)(images),
            lambda f: torch.func.vmap(f)(images[None]),
            lambda f: torch.func.vmap(lambda s: s * f(images))(torch.ones(2)),
            lambda f: torch.func.jvp(f, (images,), (images,)),
            in_forward_mode,
        ):
            with pytest.raises(
                RuntimeError, match=r"must be called outside of torch\.func's transforms"
            ):
                use(function)


def in_forward_mode(function: Callable[[Tensor], Tensor]) -> Tensor:
    images = torch.randn(6, 3, 8, 8, dtype=torch.float64)
    with forward_ad.dual_level():
        return function(forward_ad.make_dual(images, torch.ones_like(images)))


@ENGINE
@pytest.mark.parametrize("distance", ["squared", "cosine"])
def test_gradient_matching(engine: str, distance: str) -> None:
    leaves = Leaves()
    real = torch.randn(7, 3, 8, 8, dtype=torch.float64)
    for by in (leaves.images, leaves.labels):
        loss = pdd_fast.gradient_matching(
            network(),
            leaves.theta.detach(),
            real,
            torch.arange(7) % 4,
            leaves.images,
            leaves.labels,
            distance,
            engine=engine,
        )
        for value in (loss, loss.square()):
            (gradient,) = torch.autograd.grad(value, by, create_graph=True)
            with pytest.raises(RuntimeError, match=f"gradient_matching: {MESSAGE}"):
                torch.autograd.grad(
                    gradient.square().sum() + leaves.images.square().sum(), leaves.images
                )


def test_a_constant_start_may_be_written_to_before_the_backward_pass() -> None:
    leaves = Leaves()
    leaves.theta = leaves.theta.detach()
    expected = torch.autograd.grad(leaves.end("fused").sum(), leaves.images)[0]
    end = leaves.end("fused")
    leaves.theta.zero_()
    assert torch.equal(torch.autograd.grad(end.sum(), leaves.images)[0], expected)
