"""Gradient matching's value and gradient against plain autograd with ``create_graph=True``."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from cases import layouts, relative_error
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

import pdd_fast
from pdd_fast import engines
from pdd_fast.functional.gradient_matching import (
    COSINE_EPS,
    GradientDistance,
    class_gradients,
    matched_gradients,
)

# "composed": the fused engine with the passes of a GPU, which are not one kernel.
ENGINES = pytest.mark.parametrize("engine", ["fused", "composed", "autograd"], indirect=True)
KEEP = pytest.mark.parametrize("keep", [False, True], ids=["made again", "kept"])
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
LEAST = {"convolutions": 3, "weights": 2, "all": 0}  # dimensions


def plain_distance(g: Tensor, t: Tensor, distance: str) -> Tensor:
    """Of one parameter's gradients."""
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
    """What a textbook writes, differentiable to any order."""
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
        # Where a gradient vanishes by itself only rounding is left of it, hence the term beside the
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


# ---- the distances ----


def random_gradients(net: nn.Module, seed: int, count: int = 2) -> list[Tensor]:
    draw = torch.Generator().manual_seed(seed)
    size = len(pdd_fast.flatten_parameters(net))
    return [torch.randn(size, generator=draw, dtype=torch.float64) for _ in range(count)]


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
        # Of rows with a norm of at least 0.01 the 1e-6 takes a hundredth at most; these have more.
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


# ---- several classes ----


def stacked(count: int, **changes: Any) -> list[Problem]:
    """``count`` problems of one network."""
    found = [make(seed=seed, **changes) for seed in range(count)]
    return [replace(each, net=found[0].net, theta=found[0].theta) for each in found]


@ENGINES
@KEEP
@pytest.mark.parametrize("form", ["stacked", "lists", "ragged"])
@pytest.mark.parametrize("soft", [False, True], ids=["hard", "soft"])
def test_several_classes_are_the_sum_of_each(
    soft: bool, form: str, keep: bool, engine: str, device: torch.device
) -> None:
    problems = [each.to(torch.float64, device) for each in stacked(3, soft=soft)]
    if form == "ragged":
        problems[1] = replace(
            problems[1],
            real_images=problems[1].real_images[:4],
            real_labels=problems[1].real_labels[:4],
            images=problems[1].images[:2],
            labels=problems[1].labels[:2],
        )
    each = [p.gradients(plain, distance="squared") for p in problems]
    net, theta = problems[0].net, problems[0].theta
    images = [p.images.clone().requires_grad_() for p in problems]
    labels = [p.labels.clone().requires_grad_() if soft else p.labels for p in problems]
    together = torch.stack if form == "stacked" else list
    arguments = [
        [p.real_images for p in problems],
        [p.real_labels for p in problems],
        images,
        labels,
    ]
    loss = pdd_fast.gradient_matching(
        net, theta, *map(together, arguments), engine=engine, keep=keep
    )  # type: ignore[operator,arg-type]
    loss.backward()
    assert relative_error(loss, sum(one["loss"] for one in each)) <= 1e-9  # type: ignore[arg-type]
    for k, one in enumerate(each):
        assert images[k].grad is not None
        assert relative_error(images[k].grad, one["images"]) <= 1e-9
        if soft:
            assert labels[k].grad is not None
            assert relative_error(labels[k].grad, one["labels"]) <= 1e-9


@ENGINES
@pytest.mark.parametrize("together", [1, 2, 5])
def test_gradients_of_classes_in_groups_of_any_size(
    together: int, engine: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    problems = [each.to(torch.float64, device) for each in stacked(5)]
    chosen = engines.choose(problems[0].net, engine)
    monkeypatch.setattr(
        "pdd_fast.runtime.device_memory.largest_group",
        lambda size, where, most: min(together, most),
    )
    images, labels = (
        torch.stack([getattr(p, n) for p in problems]) for n in ("real_images", "real_labels")
    )
    theta = problems[0].theta
    expected = torch.stack(
        [chosen.gradient(theta, x, y)[1] for x, y in zip(images, labels, strict=True)]
    )
    for form in (lambda batches: batches, list):
        found = class_gradients(chosen, theta, form(images), form(labels))  # type: ignore[no-untyped-call]
        assert found.shape == (5, len(theta))
        assert relative_error(found, expected) <= 1e-12
        if together == 1:
            assert torch.equal(found, expected)


# ---- what is asked for, and what is not ----


@ENGINES
def test_without_autograd_the_same(engine: str, device: torch.device) -> None:
    problem = make(soft=True).to(torch.float64, device)
    for distance in ("squared", "cosine"):
        by_autograd = problem.gradients(
            pdd_fast.gradient_matching, distance=distance, engine=engine
        )
        chosen = engines.choose(problem.net, engine)
        target = chosen.gradient(problem.theta, problem.real_images, problem.real_labels)[1]
        measured = GradientDistance(problem.net, distance)
        images = problem.images.clone().requires_grad_()  # no graph is made of it
        found = matched_gradients(chosen, problem.theta, target, images, problem.labels, measured)
        for name, value in by_autograd.items():
            assert torch.equal(getattr(found, name), value), name
        assert not found.loss.requires_grad
        only_labels = matched_gradients(
            chosen,
            problem.theta,
            target,
            images,
            problem.labels,
            measured,
            rows=torch.empty(0, dtype=torch.int64),
        )
        assert only_labels.images is None
        assert only_labels.labels is not None
        assert relative_error(only_labels.labels, by_autograd["labels"]) <= 1e-12
        rows = torch.tensor([2, 0])
        some = matched_gradients(
            chosen, problem.theta, target, images, problem.labels, measured, rows=rows
        )
        assert some.images is not None
        assert relative_error(some.images, by_autograd["images"][rows]) <= 1e-12


def test_only_what_is_asked_for_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = make(soft=True)
    everything = problem.gradients(pdd_fast.gradient_matching)
    asked = list[tuple[bool, bool]]()
    original = engines.FusedEngine.dual

    def dual(*args: Any, want_theta: bool = True, rows: Tensor | None = None) -> Any:
        asked.append((want_theta, rows is None))
        return original(*args, want_theta=want_theta, rows=rows)

    monkeypatch.setattr(engines.FusedEngine, "dual", dual)
    for name, wants_images in (("images", True), ("labels", False)):
        leaf = getattr(problem, name).clone().requires_grad_()
        pdd_fast.gradient_matching(*replace(problem, **{name: leaf}).arguments).backward()
        assert relative_error(leaf.grad, everything[name]) <= 1e-12
        assert asked.pop() == (False, wants_images)
    result = pdd_fast.gradient_matching(*problem.arguments)
    assert not result.requires_grad
    with torch.no_grad():
        other = pdd_fast.gradient_matching(
            *replace(problem, images=problem.images.requires_grad_()).arguments
        )
    assert torch.equal(result, other)
    assert torch.equal(result, everything["loss"])
    assert not asked


def test_one_of_several_batches_may_be_held() -> None:
    problems = stacked(2)
    images = [problems[0].images, problems[1].images.clone().requires_grad_()]
    loss = pdd_fast.gradient_matching(
        problems[0].net,
        problems[0].theta,
        [p.real_images for p in problems],
        [p.real_labels for p in problems],
        images,
        [p.labels for p in problems],
    )
    loss.backward()
    assert images[1].grad is not None
    assert relative_error(images[1].grad, problems[1].gradients(plain)["images"]) <= 1e-9


def test_real_images_are_constants_even_where_a_graph_lies_behind_them() -> None:
    """As where real and synthetic images go through one augmentation together."""
    problem = make()
    expected = problem.gradients(plain)["images"]
    images = problem.images.clone().requires_grad_()
    both = 1.0 * torch.cat([problem.real_images, images])
    found = replace(problem, real_images=both[:7], images=both[7:])
    pdd_fast.gradient_matching(*found.arguments).backward()
    assert images.grad is not None
    assert relative_error(images.grad, expected) <= 1e-9


def test_the_gradient_scales_with_what_comes_after() -> None:
    problem = make()
    images = problem.images.clone().requires_grad_()
    loss = pdd_fast.gradient_matching(*replace(problem, images=images).arguments)
    (3 * loss.square()).backward()
    assert images.grad is not None
    assert (
        relative_error(images.grad, 6 * loss.detach() * problem.gradients(plain)["images"]) <= 1e-9
    )


@KEEP
def test_any_module_with_batch_norm(keep: bool) -> None:
    net = nn.Sequential(
        nn.Conv2d(3, 4, 3, bias=False),
        nn.BatchNorm2d(4),
        nn.Softplus(),
        nn.Flatten(),
        nn.Linear(4 * 36, 3),
    ).double()
    problem = replace(make(soft=True), net=net, theta=pdd_fast.flatten_parameters(net))
    buffers = {name: buffer.clone() for name, buffer in net.named_buffers()}
    for distance in ("squared", "cosine"):
        # functional_call of the plain form writes to the module's buffers; it is given a copy.
        expected = replace(problem, net=copy.deepcopy(net)).gradients(plain, distance=distance)
        found = problem.gradients(pdd_fast.gradient_matching, distance=distance, keep=keep)
        for name, truth in expected.items():
            assert relative_error(found[name], truth) <= 1e-9, name
    for name, buffer in net.named_buffers():
        assert torch.equal(buffer, buffers[name]), name


def test_arguments_and_the_network_are_left_alone() -> None:
    problem = make(soft=True)
    before = copy.deepcopy(problem)
    for engine in ("fused", "autograd"):
        problem.gradients(pdd_fast.gradient_matching, engine=engine)
    for name in ("theta", "real_images", "real_labels", "images", "labels"):
        assert torch.equal(getattr(problem, name), getattr(before, name)), name
    for after, kept in zip(problem.net.parameters(), before.net.parameters(), strict=True):
        assert torch.equal(after, kept)
        assert after.grad is None


WRONG: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "theta of another length": (
        {"theta": torch.zeros(5).double()},
        ValueError,
        r"theta must have shape \(\d+,\)",
    ),
    "half theta": (
        {"theta": torch.zeros(5).half()},
        TypeError,
        "theta must be float32 or float64, got torch.float16",
    ),
    "images of another type": (
        {"images": torch.zeros(5, 3, 8, 8)},
        TypeError,
        "images must be torch.float64, got",
    ),
    "real images of another type": (
        {"real_images": torch.zeros(7, 3, 8, 8)},
        TypeError,
        "real_images must be torch.float64, got torch.float32",
    ),
    "real images of another size": (
        {"real_images": torch.zeros(7, 3, 9, 8).double()},
        ValueError,
        r"real_images must have shape \[n, 3, 8, 8\]",
    ),
    "images without channels": (
        {"images": torch.zeros(5, 8, 8).double()},
        ValueError,
        "images must have shape",
    ),
    "no images": (
        {"images": torch.zeros(0, 3, 8, 8).double()},
        ValueError,
        "images must have shape",
    ),
    "too few labels": (
        {"labels": torch.zeros(4, dtype=torch.int64)},
        ValueError,
        r"labels must have shape \(5,\)",
    ),
    "a real label too large": (
        {"real_labels": torch.full((7,), 3)},
        ValueError,
        r"real_labels must lie in \[0, 3\), got 3..3",
    ),
    "soft labels of other classes": (
        {"labels": torch.zeros(5, 4).double()},
        ValueError,
        r"labels must have shape \(5, 3\), got \(5, 4\)",
    ),
    "bool labels": (
        {"labels": torch.zeros(5, dtype=torch.bool)},
        TypeError,
        "labels must be .*int64",
    ),
    "an unknown distance": (
        {"distance": "l1"},
        ValueError,
        "distance must be squared or cosine, got 'l1'",
    ),
    "unknown parameters": (
        {"parameters": "bias"},
        ValueError,
        "parameters must be one of auto, convolutions, weights, all where .*'bias'",
    ),
    "cosine of biases": (
        {"distance": "cosine", "parameters": "all"},
        ValueError,
        "parameters must be one of auto, convolutions, weights where distance is 'cosine', got "
        "'all'",
    ),
    "images as numbers": (
        {"images": 3},
        TypeError,
        "images must be a tensor or a sequence of tensors, got int",
    ),
    "labels as a list": (
        {"labels": [torch.zeros(5, dtype=torch.int64)]},
        TypeError,
        "labels must be a tensor, as images is",
    ),
    "no batches": (
        {"images": [], "labels": []},
        ValueError,
        "images must hold a batch at least, got none",
    ),
    "one batch against two": (
        {
            "images": torch.zeros(2, 5, 3, 8, 8).double(),
            "labels": torch.zeros(2, 5, dtype=torch.int64),
        },
        ValueError,
        "images must hold 1 batches, as real_images does, got 2",
    ),
    "labels of another number of batches": (
        {
            "images": torch.zeros(2, 5, 3, 8, 8).double(),
            "labels": torch.zeros(3, 5, dtype=torch.int64),
        },
        ValueError,
        r"labels must hold 2 batches, as images does, got shape \(3, 5\)",
    ),
    "a wrong batch of several": (
        {
            "images": [torch.zeros(5, 3, 8, 8).double(), torch.zeros(5, 3, 8, 7).double()],
            "labels": [torch.zeros(5, dtype=torch.int64)] * 2,
        },
        ValueError,
        r"images\[1\] must have shape \[n, 3, 8, 8\]",
    ),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_arguments_are_named(wrong: str) -> None:
    changes, error, message = WRONG[wrong]
    arguments = vars(make()) | changes
    with pytest.raises(error, match=f"^gradient_matching: {message}") as caught:
        pdd_fast.gradient_matching(**arguments)
    assert "\n" not in str(caught.value)


def test_what_has_no_such_parameters_and_parameters_that_are_followed() -> None:
    problem = make()
    linear = nn.Sequential(nn.Flatten(), nn.Linear(192, 3)).double()
    theta = pdd_fast.flatten_parameters(linear)
    with pytest.raises(
        ValueError, match=r"parameters must be such that the network has some \(of 3 .* got 'auto'"
    ):
        pdd_fast.gradient_matching(*replace(problem, net=linear, theta=theta).arguments)
    found = replace(problem, net=linear, theta=theta).gradients(
        pdd_fast.gradient_matching, parameters="weights"
    )
    assert float(found["loss"]) > 0
    with pytest.raises(
        ValueError, match="theta must be a constant, got one that requires a gradient; detach it"
    ):
        pdd_fast.gradient_matching(
            *replace(problem, theta=problem.theta.clone().requires_grad_()).arguments
        )
