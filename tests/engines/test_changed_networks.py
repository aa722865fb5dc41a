"""Both engines' two computations, each against autograd and against finite differences."""

from __future__ import annotations

import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.utils.prune
from cases import relative_error
from torch import Tensor, nn
from torch.nn import functional as F

import pdd_fast
from pdd_fast import engines
from pdd_fast.engines import FusedEngine


def an_added_parameter(net: pdd_fast.ConvNet) -> None:
    net.temperature = nn.Parameter(torch.ones(3, dtype=torch.float64))


def weights_shared_by_two_blocks(net: pdd_fast.ConvNet) -> None:
    net.blocks[2][0].weight = net.blocks[1][0].weight


def parameters_in_another_order(net: pdd_fast.ConvNet) -> None:
    weight = net.blocks[0][0].weight
    del net.blocks[0][0].weight
    net.blocks[0][0].weight = weight


def an_own_forward(net: pdd_fast.ConvNet) -> None:
    original = net.forward
    net.forward = lambda images: 2 * original(images)  # type: ignore[method-assign]


def a_hook_on_the_network(net: pdd_fast.ConvNet) -> None:
    net.register_forward_hook(lambda module, inputs, output: 3 * output)


def leaky(net: pdd_fast.ConvNet) -> None:
    net.blocks[2][2] = nn.LeakyReLU(0.1)


def dilated(net: pdd_fast.ConvNet) -> None:
    net.blocks[0][0] = nn.Conv2d(2, net.width, 3, padding=2, dilation=2).double()


def grouped(net: pdd_fast.ConvNet) -> None:
    net.blocks[1][0] = nn.Conv2d(net.width, net.width, 3, padding=1, groups=5).double()


def a_larger_kernel(net: pdd_fast.ConvNet) -> None:
    net.blocks[1][0] = nn.Conv2d(net.width, net.width, 5, padding=2).double()


def a_deeper_classifier(net: pdd_fast.ConvNet) -> None:
    net.classifier = nn.Sequential(
        nn.Linear(net.classifier.in_features, 6), nn.Tanh(), nn.Linear(6, 4)
    ).double()


def weights_of_unit_norm(net: pdd_fast.ConvNet) -> None:
    nn.utils.parametrizations.weight_norm(net.blocks[0][0])


def pruned_classifier(net: pdd_fast.ConvNet) -> None:
    nn.utils.prune.random_unstructured(net.classifier, "weight", 0.4)


OTHER_NETWORKS = [
    an_added_parameter,
    weights_shared_by_two_blocks,
    parameters_in_another_order,
    an_own_forward,
    a_hook_on_the_network,
    leaky,
    dilated,
    grouped,
    a_larger_kernel,
    a_deeper_classifier,
    weights_of_unit_norm,
    pruned_classifier,
]


def three_blocks() -> pdd_fast.ConvNet:
    torch.manual_seed(3)
    return pdd_fast.ConvNet(2, 4, (9, 10), width=5, depth=3).double()


def by_hand(
    net: nn.Module, theta: Tensor, images: Tensor, labels: Tensor, lr: float, steps: int
) -> Tensor:
    """θ_N of plain autograd through all steps, by the network's own call."""
    for _ in range(steps):
        parts, start = {}, 0
        for name, parameter in net.named_parameters():
            parts[name] = theta[start : start + parameter.numel()].view(parameter.shape)
            start += parameter.numel()
        loss = F.cross_entropy(torch.func.functional_call(net, parts, (images,)), labels)
        (gradient,) = torch.autograd.grad(
            loss, theta, create_graph=True, allow_unused=True, materialize_grads=True
        )
        theta = theta - lr * gradient
    return theta


# ---- networks that are no longer what their constructor made ----


@pytest.mark.parametrize("change", OTHER_NETWORKS, ids=lambda change: change.__name__)
def test_a_changed_network_is_computed_as_it_is(change: Callable[[pdd_fast.ConvNet], None]) -> None:
    """By unroll and by gradient matching, whatever was exchanged; the fused engine says that it
    cannot.
    """
    net = three_blocks()
    change(net)
    theta, images = pdd_fast.flatten_parameters(net), torch.randn(6, 2, 9, 10, dtype=torch.float64)
    labels, batches = torch.arange(6) % 4, [list(range(6))] * 2
    results = []
    for run in (
        lambda x: pdd_fast.unroll(net, theta, x, labels, 0.1, batches),
        lambda x: by_hand(net, theta.clone().requires_grad_(), x, labels, 0.1, 2),
    ):
        x = images.clone().requires_grad_()
        end = run(x)
        results.append((end.detach(), *torch.autograd.grad(end.square().sum(), x)))
    for found, expected in zip(*results, strict=True):
        assert relative_error(found, expected) <= 1e-9
    for call in (
        lambda: pdd_fast.unroll(net, theta, images, labels, 0.1, batches, engine="fused"),
        lambda: pdd_fast.gradient_matching(
            net, theta, images, labels, images, labels, engine="fused"
        ),
    ):
        with pytest.raises(
            ValueError, match=r"net must be .* for engine 'fused', got one that was changed; use"
        ):
            call()
    matched = [
        pdd_fast.gradient_matching(net, theta, images + 1, labels, images, labels, engine=name)
        for name in ("auto", "autograd")
    ]
    assert torch.equal(*matched)
    assert isinstance(
        engines.choose(three_blocks()), FusedEngine
    )  # others of its shape are not disturbed


@pytest.mark.parametrize("classes", [2, 9])
def test_a_classifier_of_another_size_is_fused(classes: int) -> None:
    net = three_blocks()
    net.classifier = nn.Linear(net.classifier.in_features, classes).double()
    theta, images = pdd_fast.flatten_parameters(net), torch.randn(6, 2, 9, 10, dtype=torch.float64)
    found = [
        pdd_fast.unroll(
            net, theta, images, torch.arange(6) % classes, 0.1, [range(6)] * 2, engine=engine
        )
        for engine in ("fused", "autograd")
    ]
    assert relative_error(*found) <= 1e-9
    with pytest.raises(
        ValueError, match=rf"labels must lie in \[0, {classes}\), got 0\.\.{classes}"
    ):
        pdd_fast.unroll(net, theta, images, torch.arange(6) % 2 * classes, 0.1, [range(6)])


def test_logits_of_another_module_are_checked_by_name() -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(12, 3))
    theta, images = pdd_fast.flatten_parameters(net), torch.randn(4, 3, 2, 2)
    for labels, message in (
        (torch.tensor([0, 1, 2, 3]), r"labels must lie in \[0, 3\), got 0\.\.3"),
        (torch.zeros(4, 2), r"labels must have shape \(4, 3\), got \(4, 2\)"),
    ):
        with pytest.raises(ValueError, match=message):
            pdd_fast.unroll(net, theta, images, labels, 0.1, [range(4)])
    flat = nn.Sequential(nn.Flatten(0), nn.Linear(48, 3))
    with pytest.raises(ValueError, match=r"net must give logits \[4, classes\], got \(3,\)"):
        pdd_fast.unroll(
            flat, pdd_fast.flatten_parameters(flat), images, torch.arange(4) % 3, 0.1, [range(4)]
        )


@pytest.mark.parametrize("engine", ["fused", "autograd"])
def test_threads_may_share_a_network(engine: str) -> None:
    """Each with parameters of its own, which torch puts into the module for the time of a call."""
    net = three_blocks()
    images, labels = torch.randn(6, 2, 9, 10, dtype=torch.float64), torch.arange(6) % 4
    starts = [pdd_fast.flatten_parameters(net) + 0.1 * number for number in range(4)]

    def end(start: Tensor) -> tuple[Tensor, Tensor]:
        x = images.clone().requires_grad_()
        result = pdd_fast.unroll(net, start, x, labels, 0.1, [range(6)] * 3, engine=engine)
        return result.detach(), torch.autograd.grad(result.square().sum(), x)[0]

    expected = [end(start) for start in starts]
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(4) as pool:
            for _ in range(5):
                for found, truth in zip(pool.map(end, starts), expected, strict=True):
                    assert all(map(torch.equal, found, truth))
    finally:
        sys.setswitchinterval(before)
    assert all(
        torch.equal(a, b)
        for a, b in zip(net.parameters(), three_blocks().parameters(), strict=True)
    )


def with_statistics() -> nn.Sequential:
    torch.manual_seed(0)
    layers = (
        nn.Conv2d(2, 4, 3),
        nn.BatchNorm2d(4),
        nn.Dropout(0.5),
        nn.Softplus(),
        nn.Flatten(),
        nn.Linear(4 * 56, 4),
    )
    return nn.Sequential(*layers).double().eval()


@pytest.mark.parametrize("memory", ["recompute", "cache"])
def test_buffers_are_those_of_the_call_until_the_backward_pass(memory: str) -> None:
    images, labels = torch.randn(6, 2, 9, 10, dtype=torch.float64), torch.arange(6) % 4
    found = []
    for changed in (False, True):
        net, x = with_statistics(), images.clone().requires_grad_()
        end = pdd_fast.unroll(
            net, pdd_fast.flatten_parameters(net), x, labels, 0.1, [range(6)] * 2, memory=memory
        )
        if changed:
            net[1].running_var.mul_(4)
        found.append(torch.autograd.grad(end.square().sum(), x)[0])
    assert torch.equal(*found)


def test_a_change_of_mode_before_the_backward_pass_is_an_error() -> None:
    net, x = with_statistics(), torch.randn(6, 2, 9, 10, dtype=torch.float64, requires_grad=True)
    end = pdd_fast.unroll(
        net, pdd_fast.flatten_parameters(net), x, torch.arange(6) % 4, 0.1, [range(6)] * 2
    )
    net.train()
    with pytest.raises(
        RuntimeError,
        match="net must stay in training or in evaluation mode until its steps are diff",
    ):
        end.sum().backward()


@pytest.mark.parametrize("engine", ["fused", "autograd"])
def test_autocast_of_the_caller_does_not_reach_the_steps(engine: str) -> None:
    net, images = three_blocks().float(), torch.randn(6, 2, 9, 10)
    theta, labels = pdd_fast.flatten_parameters(net), torch.arange(6) % 4

    def found() -> list[Tensor]:
        x = images.clone().requires_grad_()
        end = pdd_fast.unroll(net, theta, x, labels, 0.1, [range(6)] * 2, engine=engine)
        loss = pdd_fast.gradient_matching(net, theta, images + 1, labels, x, labels, engine=engine)
        return [
            end.detach(),
            *torch.autograd.grad(end.square().sum(), x),
            *torch.autograd.grad(loss, x),
        ]

    expected = found()
    with torch.autocast("cpu", torch.bfloat16):
        again = found()
    assert all(map(torch.equal, again, expected))
