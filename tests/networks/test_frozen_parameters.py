"""Parameters that do not require gradients stay where they are, and count for nothing where
gradients are compared.
"""

from __future__ import annotations

import pytest
import torch
from cases import relative_error
from torch import Tensor, nn
from torch.nn import functional as F

import pdd_fast
from pdd_fast.networks.parameters import views

ENGINE = pytest.mark.parametrize("engine", ["fused", "autograd"])
MEMORY = pytest.mark.parametrize("memory", ["recompute", "cache"])
FROZEN = {
    "the first convolution": ("blocks.0.0.weight",),
    "all norms": tuple(f"blocks.{i}.1.{name}" for i in range(2) for name in ("weight", "bias")),
    "the first block": tuple(f"blocks.0.{j}.{name}" for j in (0, 1) for name in ("weight", "bias")),
    "the last bias": ("classifier.bias",),
}


def network(frozen: tuple[str, ...]) -> pdd_fast.ConvNet:
    torch.manual_seed(0)
    net = pdd_fast.ConvNet(3, 4, (9, 8), width=5, depth=2).double()
    for name in frozen:
        net.get_parameter(name).requires_grad_(False)
    return net


def moves(net: nn.Module) -> Tensor:
    return torch.cat([torch.full((p.numel(),), p.requires_grad) for p in net.parameters()])


def plain_unroll(
    net: nn.Module, theta: Tensor, images: Tensor, labels: Tensor, lr: Tensor, steps: int
) -> Tensor:
    """Gradients of the parameters that require one, as an optimizer that was given those would take
    its steps.
    """
    names = [name for name, _ in net.named_parameters()]
    moving = [p.requires_grad for p in net.parameters()]
    parts = views(theta, net.parameters())
    for _ in range(steps):
        loss = F.cross_entropy(
            torch.func.functional_call(net, dict(zip(names, parts, strict=True)), (images,)), labels
        )
        chosen = [part for part, move in zip(parts, moving, strict=True) if move]
        found = iter(torch.autograd.grad(loss, chosen, create_graph=True))
        parts = [
            part - lr * next(found) if move else part
            for part, move in zip(parts, moving, strict=True)
        ]
    return torch.cat([part.flatten() for part in parts])


@ENGINE
@MEMORY
@pytest.mark.parametrize("frozen", FROZEN)
def test_unroll_leaves_them_and_its_gradients_are_exact(
    frozen: str, memory: str, engine: str
) -> None:
    net = network(FROZEN[frozen])
    images, labels = torch.randn(6, 3, 9, 8, dtype=torch.float64), torch.arange(6) % 4
    direction, results = torch.randn(len(moves(net)), dtype=torch.float64), []
    for ours in (True, False):
        theta, x = (
            pdd_fast.flatten_parameters(net).requires_grad_(),
            images.clone().requires_grad_(),
        )
        lr = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
        if ours:
            end = pdd_fast.unroll(
                net, theta, x, labels, lr, [range(6)] * 3, engine=engine, memory=memory
            )
            assert torch.equal(end[~moves(net)], theta[~moves(net)])
            assert not torch.equal(end[moves(net)], theta[moves(net)])
        else:
            end = plain_unroll(net, theta, x, labels, lr, 3)
        results.append((end.detach(), *torch.autograd.grad(end @ direction, (theta, x, lr))))
    for found, expected in zip(*results, strict=True):
        assert relative_error(found, expected) <= 1e-9


@ENGINE
def test_batch_norm_without_gradients_stays(engine: str) -> None:
    net = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 4)
    ).double()
    net[1].requires_grad_(False)
    theta, images = pdd_fast.flatten_parameters(net), torch.randn(6, 3, 8, 8, dtype=torch.float64)
    if engine == "fused":
        with pytest.raises(ValueError, match=r"net must be .* for engine 'fused', got"):
            pdd_fast.unroll(net, theta, images, torch.arange(6) % 4, 0.1, [range(6)], engine=engine)
        return
    end = pdd_fast.unroll(
        net, theta, images, torch.arange(6) % 4, 0.1, [range(6)] * 2, engine=engine
    )
    assert torch.equal(end[~moves(net)], theta[~moves(net)])


@ENGINE
def test_a_network_that_is_frozen_whole_cannot_take_steps(engine: str) -> None:
    net = network(()).requires_grad_(False)
    theta, images = pdd_fast.flatten_parameters(net), torch.randn(6, 3, 9, 8, dtype=torch.float64)
    with pytest.raises(
        ValueError, match=r"net must have a parameter that requires gradients, .*requires_grad_"
    ):
        pdd_fast.unroll(net, theta, images, torch.arange(6) % 4, 0.1, [range(6)], engine=engine)
    with pytest.raises(
        ValueError, match=r"parameters must be such that the network has some .* require gradients"
    ):
        pdd_fast.gradient_matching(
            net, theta, images, torch.arange(6) % 4, images, torch.arange(6) % 4, engine=engine
        )


@ENGINE
@pytest.mark.parametrize(
    ("distance", "parameters"), [("squared", "all"), ("squared", "auto"), ("cosine", "auto")]
)
@pytest.mark.parametrize("frozen", ["the first convolution", "all norms"])
def test_gradient_matching_does_not_count_them(
    frozen: str, distance: str, parameters: str, engine: str
) -> None:
    """Replacing the frozen parameters' gradients by anything changes nothing: those of the real
    images' are.
    """
    free, net = network(()), network(FROZEN[frozen])
    theta = pdd_fast.flatten_parameters(net)
    images, real = torch.randn(2, 6, 3, 9, 8, dtype=torch.float64)
    labels = torch.arange(6) % 4
    least = {"all": 0, "auto": 3 if distance == "squared" else 2}[parameters]

    def gradient(x: Tensor) -> list[Tensor]:
        names = [name for name, _ in free.named_parameters()]
        parts = [part.clone().requires_grad_() for part in views(theta, free.parameters())]
        loss = F.cross_entropy(
            torch.func.functional_call(free, dict(zip(names, parts, strict=True)), (x,)), labels
        )
        found = torch.autograd.grad(loss, parts, create_graph=True)
        return [
            g
            for g, p in zip(found, net.parameters(), strict=True)
            if p.requires_grad and g.dim() >= least
        ]

    x = images.clone().requires_grad_()
    total = torch.zeros((), dtype=torch.float64)
    for g, t in zip(gradient(x), gradient(real), strict=True):
        t = t.detach()
        if distance == "squared":
            total = total + (g - t).square().sum()
        else:
            g, t = g.flatten(1), t.flatten(1)
            total = total + (1 - (g * t).sum(1) / (g.norm(dim=1) * t.norm(dim=1) + 1e-6)).sum()
    y = images.clone().requires_grad_()
    found = pdd_fast.gradient_matching(
        net, theta, real, labels, y, labels, distance, parameters=parameters, engine=engine
    )
    assert relative_error(found.detach(), total.detach()) <= 1e-9
    assert (
        relative_error(torch.autograd.grad(found, y)[0], torch.autograd.grad(total, x)[0]) <= 1e-9
    )
