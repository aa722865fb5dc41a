"""The unroll's value and gradient against plain autograd through all steps, over everything that a
caller can vary."""

from __future__ import annotations

import copy
import statistics
from collections import defaultdict
from dataclasses import replace
from typing import Any

import plain
import pytest
import torch
from cases import relative_error
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from unroll_support import ENGINES, MULTIPLE, SINGLE, make

import pdd_fast

MEMORY = pytest.mark.parametrize("memory", ["recompute", "cache"])


CASES = {
    "one step": {"steps": 1},
    "ten steps": {"steps": 10},
    "soft labels": {"soft": True},
    "a rate per step": {"per_step": True, "steps": 4},
    "dsa, single": {"dsa": SINGLE, "steps": 8},
    "dsa, multiple, soft labels, a rate per step": {
        "dsa": MULTIPLE,
        "soft": True,
        "per_step": True,
    },
    "gray": {"channels": 1},
    "one image": {"images": 1, "batch": 1},
    "one block": {"depth": 1, "size": 5},
    "odd and oblong": {"size": (13, 9)},
    "28 x 28": {"size": 28, "channels": 1, "depth": 3, "dsa": SINGLE},
    "32 x 32": {"size": 32, "depth": 3, "width": 17, "dsa": MULTIPLE, "steps": 2},
    "64 x 64": {"size": 64, "depth": 4, "width": 4, "steps": 2, "batch": 2},
    "more classes than channels": {"classes": 11, "width": 3},
}


@ENGINES
@MEMORY
@pytest.mark.parametrize("case", CASES)
def test_equals_plain_autograd_in_float64(
    case: str, engine: str, memory: str, device: torch.device
) -> None:
    problem = make(**CASES[case]).to(torch.float64, device)
    expected = problem.gradients(plain.unroll)
    found = problem.gradients(pdd_fast.unroll, engine=engine, memory=memory)
    for name, truth in expected.items():
        assert relative_error(found[name], truth) <= 1e-9, name


@given(
    steps=st.integers(1, 4),
    channels=st.integers(1, 4),
    height=st.integers(4, 11),
    width=st.integers(4, 11),
    classes=st.integers(2, 6),
    filters=st.integers(1, 20),
    images=st.integers(1, 6),
    batch=st.integers(1, 6),
    soft=st.booleans(),
    per_step=st.booleans(),
    memory=st.sampled_from(["recompute", "cache"]),
    dsa=st.sampled_from([None, SINGLE, MULTIPLE]),
    seed=st.integers(0, 1000),
)
def test_equals_plain_autograd_whatever_the_sizes(
    steps: int,
    channels: int,
    height: int,
    width: int,
    classes: int,
    filters: int,
    images: int,
    batch: int,
    soft: bool,
    per_step: bool,
    memory: str,
    dsa: pdd_fast.DSA | None,
    seed: int,
) -> None:
    problem = make(
        steps,
        channels,
        (height, width),
        classes,
        filters,
        2,
        images,
        batch,
        soft,
        per_step,
        dsa,
        seed,
    )
    expected = problem.gradients(plain.unroll)
    found = problem.gradients(pdd_fast.unroll, engine="fused", memory=memory)
    for name, truth in expected.items():
        # If a gradient vanishes, only rounding is left of it; hence the absolute term beside the
        # relative one.
        error = float((found[name] - truth).norm())
        assert error <= 1e-9 * float(truth.norm()) + 1e-12, name


@ENGINES
@pytest.mark.parametrize("case", ["ten steps", "dsa, single", "32 x 32", "soft labels"])
def test_float32_is_as_close_to_the_truth_as_plain_float32_autograd(
    case: str, engine: str, device: torch.device
) -> None:
    """Medians over seven problems: one error of a single number, like the rate's gradient, is small
    by chance.
    """
    found, plain_found = defaultdict[str, list[float]](list), defaultdict[str, list[float]](list)
    for seed in range(7):
        exact = make(**CASES[case], seed=seed)
        truth = exact.gradients(plain.unroll)
        rounded = exact.to(torch.float32, device)
        for name, gradient in rounded.gradients(plain.unroll).items():
            plain_found[name].append(relative_error(gradient, truth[name]))
        for name, gradient in rounded.gradients(pdd_fast.unroll, engine=engine).items():
            found[name].append(relative_error(gradient, truth[name]))
    for name, errors in found.items():
        assert statistics.median(errors) <= max(3 * statistics.median(plain_found[name]), 1e-6), (
            name
        )
        # An activation that crosses zero by rounding changes the gradient by its whole share: up to
        # 1e-3.
        assert max(errors) <= 1e-3, name


@ENGINES
@MEMORY
def test_frozen_images_get_zero_and_the_others_what_they_got(engine: str, memory: str) -> None:
    problem = make(steps=4, images=9, dsa=SINGLE)
    frozen = torch.tensor([True, False, True, True, False, False, True, False, True])
    free = problem.gradients(pdd_fast.unroll, engine=engine, memory=memory)
    found = problem.gradients(pdd_fast.unroll, engine=engine, memory=memory, frozen=frozen)
    assert torch.equal(found["images"][frozen], torch.zeros_like(found["images"][frozen]))
    assert relative_error(found["images"], free["images"] * ~frozen.view(-1, 1, 1, 1)) <= 1e-12
    for name in ("theta_N", "theta", "lrs"):
        assert relative_error(found[name], free[name]) <= 1e-12, name


def test_all_frozen_and_none_frozen() -> None:
    problem = make(steps=2)
    free = problem.gradients(pdd_fast.unroll)
    none = problem.gradients(pdd_fast.unroll, frozen=torch.zeros(7, dtype=torch.bool))
    everything = problem.gradients(pdd_fast.unroll, frozen=torch.ones(7, dtype=torch.bool))
    assert torch.equal(none["images"], free["images"])
    assert not everything["images"].any()
    assert relative_error(everything["theta"], free["theta"]) <= 1e-12


@ENGINES
@MEMORY
def test_same_bits_again(engine: str, memory: str, device: torch.device) -> None:
    problem = make(steps=3, dsa=SINGLE, batch=30, width=16).to(torch.float32, device)
    first, second = (
        problem.gradients(pdd_fast.unroll, engine=engine, memory=memory) for _ in range(2)
    )
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


@ENGINES
@MEMORY
def test_only_what_is_asked_for_is_computed(engine: str, memory: str) -> None:
    problem = make(steps=2, soft=True)
    everything = problem.gradients(pdd_fast.unroll, engine=engine, memory=memory)
    for name in ("theta", "images", "lrs", "labels"):
        leaf = getattr(problem, name).clone().requires_grad_()
        arguments = {n: getattr(problem, n) for n in ("theta", "images", "labels", "lrs")} | {
            name: leaf
        }
        result = pdd_fast.unroll(
            problem.net, *arguments.values(), problem.batches, engine=engine, memory=memory
        )
        (result @ problem.direction).backward()
        assert relative_error(leaf.grad, everything[name]) <= 1e-12, name


def test_without_gradients_nothing_is_kept() -> None:
    problem = make()
    result = pdd_fast.unroll(
        problem.net, problem.theta, problem.images, problem.labels, 0.02, problem.batches
    )
    assert not result.requires_grad
    assert result.grad_fn is None


def test_a_number_is_a_rate_and_no_steps_change_nothing() -> None:
    problem = make()
    as_tensor = pdd_fast.unroll(
        problem.net,
        problem.theta,
        problem.images,
        problem.labels,
        torch.tensor(0.03),
        problem.batches,
    )
    as_number = pdd_fast.unroll(
        problem.net, problem.theta, problem.images, problem.labels, 0.03, problem.batches
    )
    assert relative_error(as_number, as_tensor) <= 1e-7  # 0.03 as float32 differs from 0.03 by 1e-8
    nothing = pdd_fast.unroll(problem.net, problem.theta, problem.images, problem.labels, 0.03, [])
    assert torch.equal(nothing, problem.theta)


def test_arguments_and_the_network_are_left_alone() -> None:
    problem = make(steps=3, dsa=SINGLE, soft=True)
    before = copy.deepcopy(problem)
    problem.gradients(pdd_fast.unroll, engine="fused")
    problem.gradients(pdd_fast.unroll, engine="autograd")
    for name in ("theta", "images", "labels", "lrs"):
        assert torch.equal(getattr(problem, name), getattr(before, name)), name
    for after, kept in zip(problem.net.parameters(), before.net.parameters(), strict=True):
        assert torch.equal(after, kept)
        assert after.grad is None


@MEMORY
def test_any_module_with_batch_norm_and_dropout(memory: str) -> None:
    """Batch statistics, draws that have to be taken again, and an integer buffer."""
    net = nn.Sequential(
        nn.Conv2d(3, 4, 3),
        nn.BatchNorm2d(4),
        nn.Softplus(),
        nn.Dropout(0.4),
        nn.Flatten(),
        nn.Linear(4 * 36, 3),
    ).double()
    problem = replace(make(steps=3), net=net, theta=pdd_fast.flatten_parameters(net))
    problem.direction = torch.randn_like(problem.theta)
    buffers = {name: buffer.clone() for name, buffer in net.named_buffers()}
    torch.manual_seed(7)
    # functional_call of the plain loop writes to the module's buffers; it is given a copy.
    expected = replace(problem, net=copy.deepcopy(net)).gradients(plain.unroll)
    torch.manual_seed(7)
    found = problem.gradients(pdd_fast.unroll, memory=memory)
    for name, truth in expected.items():
        assert relative_error(found[name], truth) <= 1e-9, name
    for name, buffer in net.named_buffers():
        assert torch.equal(buffer, buffers[name]), name


def test_a_parameter_that_the_loss_ignores_keeps_its_adjoint() -> None:
    class Ignoring(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = nn.Linear(12, 3), nn.Linear(2, 2)

        def forward(self, images: Tensor) -> Tensor:
            return self.used(images.flatten(1))

    net = Ignoring().double()
    theta = pdd_fast.flatten_parameters(net).requires_grad_()
    result = pdd_fast.unroll(
        net,
        theta,
        torch.randn(4, 3, 2, 2).double(),
        torch.tensor([0, 1, 2, 0]),
        0.1,
        [torch.arange(4)] * 2,
    )
    result.sum().backward()
    assert theta.grad is not None
    assert torch.equal(theta.grad[-6:], torch.ones(6).double())


def test_a_learning_rate_is_moved_to_the_precision_of_theta() -> None:
    problem = make(steps=2)
    lr = torch.tensor(0.02, requires_grad=True)  # float32 beside float64 parameters
    result = pdd_fast.unroll(
        problem.net, problem.theta, problem.images, problem.labels, lr, problem.batches
    )
    (result @ problem.direction).backward()
    assert lr.grad is not None
    assert lr.grad.dtype == torch.float32
    assert lr.grad.shape == ()


WRONG: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "theta of another length": (
        {"theta": torch.zeros(5).double()},
        ValueError,
        r"theta must have shape \(\d+,\)",
    ),
    "half theta": (
        {"theta": "half"},
        TypeError,
        "theta must be float32 or float64, got torch.float16",
    ),
    "images of another type": (
        {"images": torch.zeros(7, 3, 8, 8)},
        TypeError,
        "images must be torch.float64",
    ),
    "images without channels": (
        {"images": torch.zeros(7, 8, 8).double()},
        ValueError,
        "images must have shape",
    ),
    "images of another size": (
        {"images": torch.zeros(7, 3, 9, 8).double()},
        ValueError,
        r"images must have shape \[n, 3, 8, 8\], got",
    ),
    "no images": (
        {"images": torch.zeros(0, 3, 8, 8).double()},
        ValueError,
        "images must have shape",
    ),
    "too few labels": (
        {"labels": torch.zeros(6, dtype=torch.int64)},
        ValueError,
        r"labels must have shape \(7,\)",
    ),
    "a label too large": (
        {"labels": torch.full((7,), 3)},
        ValueError,
        r"labels must lie in \[0, 3\), got 3..3",
    ),
    "a negative label": (
        {"labels": torch.full((7,), -1)},
        ValueError,
        r"labels must lie in \[0, 3\), got -1..-1",
    ),
    "soft labels of other classes": (
        {"labels": torch.zeros(7, 4).double()},
        ValueError,
        r"labels must have shape \(7, 3\), got \(7, 4\)",
    ),
    "bool labels": (
        {"labels": torch.zeros(7, dtype=torch.bool)},
        TypeError,
        "labels must be .*int64",
    ),
    "rates of another number": (
        {"lrs": torch.zeros(2).double()},
        ValueError,
        r"learning_rate must .*\(3,\)",
    ),
    "an index too large": (
        {"batches": [torch.tensor([7])] * 3},
        ValueError,
        r"batches\[0\] must .*\[0, 7\), got 7..7",
    ),
    "a negative index": (
        {"batches": [torch.tensor([-1])] * 3},
        ValueError,
        r"batches\[0\] must hold indices",
    ),
    "an empty batch": (
        {"batches": [torch.tensor([], dtype=torch.int64)] * 3},
        ValueError,
        r"batches\[0\] must",
    ),
    "a float batch": (
        {"batches": [torch.tensor([1.0])] * 3},
        TypeError,
        r"batches\[0\] must be int64",
    ),
    "too few draws": (
        {"augmentations": [SINGLE.sample(5, 8)]},
        ValueError,
        "augmentations must hold 3 AugmentParameters, got 1",
    ),
    "a draw for another batch": (
        {"augmentations": [SINGLE.sample(4, 8)] * 3},
        ValueError,
        r"augmentations\[0\] must be drawn for 5 images",
    ),
    "a draw for another size": (
        {"augmentations": [MULTIPLE.sample(5, 9)] * 3},
        ValueError,
        r"augmentations\[0\] must be drawn for images of 8x8 pixels, got \(9, 9\)",
    ),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_arguments_are_named(wrong: str) -> None:
    changes, error, message = WRONG[wrong]
    problem = make()
    if changes.get("theta") == "half":
        changes = {"theta": problem.theta.half()}
    with pytest.raises(error, match=message):
        replace(problem, **changes).gradients(pdd_fast.unroll)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"engine": "fast"}, "engine must be one of auto, fused, autograd, got 'fast'"),
        ({"memory": "disk"}, "unroll: memory must be recompute or cache or auto, got 'disk'"),
        ({"memory": "auto", "memory_limit": -1}, "unroll: memory_limit must be at least 0, got -1"),
        (
            {"memory": "cache", "memory_limit": 5},
            "unroll: memory_limit must be None where memory is 'cache', got 5; use 'auto'",
        ),
        ({"precision": "half"}, "precision must be one of float32, tf32, bfloat16, got 'half'"),
        (
            {"frozen": torch.zeros(6, dtype=torch.bool)},
            r"frozen must have shape \(7,\), got \(6,\)",
        ),
    ],
)
def test_wrong_options_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make().gradients(pdd_fast.unroll, **options)


@pytest.mark.parametrize("limit", [1.5, "1e9", True])
def test_a_limit_is_a_whole_number_of_bytes(limit: Any) -> None:
    message = rf"^unroll: memory_limit must be a whole number of bytes or None, got {limit!r}$"
    with pytest.raises(TypeError, match=message):
        make().gradients(pdd_fast.unroll, memory="auto", memory_limit=limit)


def test_frozen_must_be_bool() -> None:
    with pytest.raises(TypeError, match=r"frozen must be bool, got torch\.int64"):
        make().gradients(pdd_fast.unroll, frozen=torch.zeros(7, dtype=torch.int64))


@ENGINES
def test_bfloat16_is_another_rounding_of_the_same_gradient(engine: str) -> None:
    problem = make(steps=2).to(torch.float32, "cpu")
    exact = problem.gradients(pdd_fast.unroll, engine=engine)
    rounded = problem.gradients(pdd_fast.unroll, engine=engine, precision="bfloat16")
    assert {value.dtype for value in rounded.values()} == {torch.float32}
    assert 1e-5 < relative_error(rounded["theta_N"], exact["theta_N"]) < 1e-2
    # 8 bits of every product, and activations so near zero that they cross it.
    assert 1e-4 < relative_error(rounded["images"], exact["images"]) < 0.3
