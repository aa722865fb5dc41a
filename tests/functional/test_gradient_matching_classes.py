"""Gradient matching's value and gradient against plain autograd with ``create_graph=True``."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from cases import relative_error
from gradient_matching_support import ENGINES, KEEP, Problem, make, plain
from torch import Tensor, nn

import pdd_fast
from pdd_fast import engines
from pdd_fast.functional.gradient_distance import (
    GradientDistance,
    class_gradients,
    matched_gradients,
)


def stacked(count: int, **changes: Any) -> list[Problem]:
    """``count`` problems of one network."""
    found = [make(seed=seed, **changes) for seed in range(count)]
    return [replace(each, net=found[0].net, theta=found[0].theta) for each in found]


# ---- several classes ----


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
