"""Gradient matching's value and gradient against plain autograd with ``create_graph=True``."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from cases import layouts, relative_error
from gradient_matching_support import ENGINES, KEEP, LEAST, make, plain, plain_distance
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import pdd_fast
from pdd_fast.functional.gradient_distance import GradientDistance

DISTANCES = pytest.mark.parametrize(
    ("distance", "parameters"),
    [
        ("squared", "auto"),
        ("squared", "weights"),
        ("squared", "all"),
        ("cosine", "auto"),
        ("cosine", "convolutions"),
    ],
)


CASES: dict[str, dict[str, Any]] = {
    "hard labels": {},
    "soft labels": {"soft": True},
    "gray, odd and oblong": {"channels": 1, "size": (13, 9)},
    "one image, one block": {"images": 1, "real": 1, "depth": 1, "size": (5, 5)},
    "32 x 32": {"size": (32, 32), "depth": 3, "width": 17},
}


@ENGINES
@KEEP
@DISTANCES
@pytest.mark.parametrize("case", CASES)
def test_equals_plain_autograd_in_float64(
    case: str, distance: str, parameters: str, keep: bool, engine: str, device: torch.device
) -> None:
    problem = make(**CASES[case]).to(torch.float64, device)
    expected = problem.gradients(plain, distance=distance, parameters=parameters)
    found = problem.gradients(
        pdd_fast.gradient_matching,
        distance=distance,
        parameters=parameters,
        engine=engine,
        keep=keep,
    )
    assert found.keys() == expected.keys()
    for name, truth in expected.items():
        assert relative_error(found[name], truth) <= 1e-9, name


@ENGINES
@pytest.mark.parametrize("distance", ["squared", "cosine"])
def test_images_may_lie_in_memory_as_they_like(
    distance: str, engine: str, device: torch.device
) -> None:
    problem = make().to(torch.float64, device)
    expected = problem.gradients(plain, distance=distance)
    for images, real in zip(
        layouts(problem.images.cpu()), layouts(problem.real_images.cpu()), strict=True
    ):
        laid = replace(problem, images=images.to(device), real_images=real.to(device))
        found = laid.gradients(pdd_fast.gradient_matching, distance=distance, engine=engine)
        for name, truth in expected.items():
            assert relative_error(found[name], truth) <= 1e-9, name


@given(
    channels=st.integers(1, 4),
    height=st.integers(4, 11),
    width=st.integers(4, 11),
    classes=st.integers(2, 6),
    filters=st.integers(1, 20),
    real=st.integers(1, 6),
    images=st.integers(1, 6),
    soft=st.booleans(),
    keep=st.booleans(),
    distance=st.sampled_from(["squared", "cosine"]),
    parameters=st.sampled_from(["auto", "weights", "convolutions"]),
    seed=st.integers(0, 1000),
)
def test_equals_plain_autograd_whatever_the_sizes(
    channels: int,
    height: int,
    width: int,
    classes: int,
    filters: int,
    real: int,
    images: int,
    soft: bool,
    keep: bool,
    distance: str,
    parameters: str,
    seed: int,
) -> None:
    problem = make(channels, (height, width), classes, filters, 2, real, images, soft, seed)
    options = {"distance": distance, "parameters": parameters}
    expected = problem.gradients(plain, **options)
    found = problem.gradients(pdd_fast.gradient_matching, keep=keep, **options)
    for name, truth in expected.items():
        # If a gradient vanishes, only rounding is left of it; hence the absolute term beside the
        # relative one.
        error = float((found[name] - truth).norm())
        assert error <= 1e-9 * float(truth.norm()) + 1e-12, name


@ENGINES
@pytest.mark.parametrize("distance", ["squared", "cosine"])
def test_gradcheck(distance: str, engine: str) -> None:
    problem = make(channels=1, size=(4, 4), width=2, depth=1, real=3, images=2, soft=True)

    def run(images: Tensor, labels: Tensor) -> Tensor:
        arguments = replace(problem, images=images, labels=labels).arguments
        return pdd_fast.gradient_matching(*arguments, distance, engine=engine)

    leaves = (problem.images.requires_grad_(), problem.labels.requires_grad_())
    assert torch.autograd.gradcheck(run, leaves, eps=1e-6, atol=1e-5, rtol=1e-4)


@ENGINES
@pytest.mark.parametrize("distance", ["squared", "cosine"])
def test_float32_is_as_close_to_the_truth_as_plain_float32_autograd(
    distance: str, engine: str, device: torch.device
) -> None:
    exact = make(soft=True, size=(16, 16), real=20, images=20)
    truth = exact.gradients(plain, distance=distance)
    rounded = exact.to(torch.float32, device)
    by_plain = rounded.gradients(plain, distance=distance)
    found = rounded.gradients(pdd_fast.gradient_matching, distance=distance, engine=engine)
    for name, gradient in found.items():
        assert gradient.dtype == torch.float32
        # An activation that crosses zero by rounding changes the gradient by its whole share: up to
        # 1e-3.
        assert relative_error(gradient, truth[name]) <= max(
            3 * relative_error(by_plain[name], truth[name]), 1e-5
        ), name


@ENGINES
def test_same_bits_again(engine: str, device: torch.device) -> None:
    problem = make(width=16, real=30, images=30, soft=True).to(torch.float32, device)
    for distance in ("squared", "cosine"):
        first, second = (
            problem.gradients(pdd_fast.gradient_matching, distance=distance, engine=engine)
            for _ in range(2)
        )
        for name, value in first.items():
            assert torch.equal(value, second[name]), name


def random_gradients(net: nn.Module, seed: int, count: int = 2) -> list[Tensor]:
    draw = torch.Generator().manual_seed(seed)
    size = len(pdd_fast.flatten_parameters(net))
    return [torch.randn(size, generator=draw, dtype=torch.float64) for _ in range(count)]


# ---- the distances ----


@given(
    distance=st.sampled_from(["squared", "cosine"]),
    parameters=st.sampled_from(["auto", "convolutions", "weights"]),
    scale=st.floats(0.5, 2),
    seed=st.integers(0, 1000),
)
def test_what_a_distance_is(distance: str, parameters: str, scale: float, seed: int) -> None:
    net = pdd_fast.ConvNet(1, 3, 4, 2, 1).double()
    measured = GradientDistance(net, distance, parameters)
    a, b = random_gradients(net, seed)
    (there, slope), (back, _) = measured(a, b), measured(b, a)
    assert float(there) > 0
    assert relative_error(there, back) <= 1e-12
    itself, flat = measured(a, a.clone())
    rows = sum(len(p) for p in net.parameters() if p.dim() >= LEAST[measured.parameters])
    if distance == "squared":
        assert float(itself) == 0
        assert not flat.any()
        assert relative_error(measured(scale * a, scale * b)[0], scale**2 * there) <= 1e-12
    else:
        # The 1e-6 takes at most a hundredth of rows with a norm of at least 0.01; these have more.
        assert 0 <= float(itself) <= 1e-2 * rows
        assert float(there) <= 2 * rows
        assert relative_error(measured(scale * a, b)[0], there) <= 1e-2
    # The direction is the derivative, by torch.
    followed = a.clone().requires_grad_()
    parts = zip(
        *(v.split([p.numel() for p in net.parameters()]) for v in (followed, b)),
        net.parameters(),
        strict=True,
    )
    chosen = [
        (g.view(p.shape), t.view(p.shape))
        for g, t, p in parts
        if p.dim() >= LEAST[measured.parameters]
    ]
    torch.stack([plain_distance(g, t, distance) for g, t in chosen]).sum().backward()
    assert followed.grad is not None
    assert relative_error(slope, followed.grad) <= 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gradients_of_zero_have_finite_distances_and_slopes(dtype: torch.dtype) -> None:
    net = pdd_fast.ConvNet(1, 3, 4, 2, 1)
    something = random_gradients(net, 0, 1)[0].to(dtype)
    nothing, tiny = torch.zeros_like(something), something * 1e-30
    rows = 2 + 3  # of the convolution and of the linear layer
    for distance in ("squared", "cosine"):
        measured = GradientDistance(net, distance)
        for a in (nothing, tiny, something):
            for b in (nothing, tiny, something):
                loss, slope = measured(a, b)
                assert loss.isfinite()
                assert slope.isfinite().all()
    loss, slope = measured(nothing, nothing)
    assert float(loss) == rows
    assert not slope.any()


def test_a_network_that_has_learned_all_there_is_has_no_gradient() -> None:
    """Labels that are the network's own opinions: g = 0 but for rounding, and a slope that is
    finite.
    """
    problem = make(images=2)
    net = problem.net
    pdd_fast.load_parameters(net, problem.theta)
    problem = replace(problem, labels=net(problem.images).softmax(1).detach())
    for distance in ("squared", "cosine"):
        found = problem.gradients(pdd_fast.gradient_matching, distance=distance)
        assert all(value.isfinite().all() for value in found.values())
    same = replace(problem, real_images=problem.images, real_labels=problem.labels)
    assert all(
        float(value.abs().max()) <= 1e-20
        for value in same.gradients(pdd_fast.gradient_matching).values()
    )


def test_what_counts() -> None:
    """Numbers of parameters that the direction is not zero at."""
    net = pdd_fast.ConvNet(1, 3, 4, 2, 1)
    a, b = random_gradients(net, 0)
    sizes = [
        p.numel() for p in net.parameters()
    ]  # convolution and bias, norm's weight and bias, linear and bias
    assert sizes == [18, 2, 2, 2, 24, 3]
    for distance, parameters, expected in (
        ("squared", "auto", [18, 0, 0, 0, 0, 0]),
        ("squared", "weights", [18, 0, 0, 0, 24, 0]),
        ("squared", "all", sizes),
        ("cosine", "auto", [18, 0, 0, 0, 24, 0]),
        ("cosine", "convolutions", [18, 0, 0, 0, 0, 0]),
    ):
        _, slope = GradientDistance(net, distance, parameters)(a, b)
        assert [int(part.count_nonzero()) for part in slope.split(sizes)] == expected
