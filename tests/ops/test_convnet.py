"""The whole network's passes in one kernel, against plain autograd, and what they promise beside
being right."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from itertools import product
from statistics import median

import pytest
import torch
from cases import layouts, relative_error
from convnet_support import (
    CONVOLUTION,
    ROUNDED,
    SHAPES,
    Found,
    Problem,
    Shape,
    assert_close,
    assert_same,
    passes_of,
    truth,
)
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from pdd_fast.networks.parameters import views
from pdd_fast.ops.convnet import CONVOLUTIONS

# ---- right in float64 ----


@CONVOLUTION
@pytest.mark.parametrize("soft", [False, True], ids=["hard", "soft"])
@pytest.mark.parametrize("name", SHAPES)
def test_every_pass_is_autograds(name: str, soft: bool, convolution: str) -> None:
    problem, expected = truth(name, soft)
    passes = passes_of(problem, convolution)
    for kept in (False, True):
        assert_close(problem.by(passes, kept), expected)


ROWS = [None, [], [0], [5, 1, 1, 3], [6, 5, 4, 3, 2, 1, 0]]


@CONVOLUTION
@pytest.mark.parametrize("kept", [False, True], ids=["made again", "kept"])
def test_a_dual_pass_gives_what_is_wanted(kept: bool, convolution: str) -> None:
    problem, expected = truth("many channels of an image", True)
    passes = passes_of(problem, convolution)
    step = passes.gradient(*problem.arguments, keep=kept)[2]
    for rows, want_theta in product(ROWS, (True, False)):
        index = None if rows is None else torch.tensor(rows, dtype=torch.int64)
        found = problem.dual(passes, step, want_theta, index)
        wanted = expected["tangent of images"]
        assert_close(
            found, expected | {"tangent of images": wanted if index is None else wanted[index]}
        )


@CONVOLUTION
def test_what_is_not_wanted_changes_nothing_else(convolution: str) -> None:
    problem = truth("large", True)[0]
    passes = passes_of(problem, convolution)
    full = problem.dual(passes)
    for kept in (None, passes.gradient(*problem.arguments, keep=True)[2]):
        every = problem.dual(passes, kept)
        assert_close(every, full, 1e-13)
        rows = torch.tensor([1])
        for want_theta in (True, False):
            some = problem.dual(passes, kept, want_theta, rows)
            expected = every | {"tangent of images": every["tangent of images"][rows]}
            assert_same(some, {name: expected[name] for name in some})
    step = passes.forward(problem.theta, problem.images, keep=True)[1]
    assert step is not None
    theta, images = passes.backward(
        problem.theta, problem.images, step, problem.grad_logits, want_images=False
    )
    again = passes.backward(
        problem.theta, problem.images, step, problem.grad_logits, want_images=True
    )
    assert images is None
    assert torch.equal(theta, again[0])


def test_a_forward_pass_is_gone_back_through_any_number_of_times() -> None:
    problem = truth("blocks in and out", False)[0]
    passes = passes_of(problem, "auto")
    kept = passes.forward(problem.theta, problem.images, keep=True)[1]
    assert kept is not None
    results = []
    for factor in (1, -2, 1):
        theta, images = passes.backward(
            problem.theta, problem.images, kept, factor * problem.grad_logits, True
        )
        assert images is not None
        results.append({"theta": theta, "images": images})
    assert_same(results[2], results[0])
    assert_close(results[1], {name: -2 * tensor for name, tensor in results[0].items()}, 1e-13)


def strided(images: Tensor) -> Iterator[Tensor]:
    """The same images in more kinds of memory than a data loader gives."""
    yield from layouts(images)
    yield images.transpose(2, 3).contiguous().transpose(2, 3)
    yield images.repeat_interleave(2, 3)[..., ::2]
    yield images.flip(0, 2).contiguous().flip(0, 2)


@CONVOLUTION
def test_where_images_lie_changes_no_bit(convolution: str) -> None:
    problem = truth("many channels of an image", False)[0]
    passes = passes_of(problem, convolution)
    expected = problem.by(passes)
    for images in strided(problem.images):
        assert torch.equal(images, problem.images)
        assert_same(replace(problem, images=images).by(passes), expected)


def test_one_image_seen_many_times() -> None:
    """A stride of 0."""
    problem = Problem.of(Shape(3, (8, 6), 16, 2, 1))
    many = replace(
        problem,
        images=problem.images.expand(5, -1, -1, -1),
        labels=problem.labels.expand(5),
        grad_logits=problem.grad_logits.expand(5, -1),
    )
    one, five = (each.by(passes_of(problem, "auto")) for each in (problem, many))
    assert_close({"gradient": five["gradient"]}, one, 1e-13)
    assert_close({"tangent of theta": five["tangent of theta"]}, one, 1e-13)


def test_vectors_may_have_gaps() -> None:
    problem = truth("tall", True)[0]
    gaps = {
        name: getattr(problem, name).repeat_interleave(2, -1)[..., ::2]
        for name in ("theta", "direction", "labels", "grad_logits")
    }
    passes = passes_of(problem, "auto")
    assert_same(replace(problem, **gaps).by(passes), problem.by(passes))


@CONVOLUTION
def test_logits_of_more_images_than_go_at_once(convolution: str) -> None:
    shape = Shape(2, (5, 6), 17, 2, 300)
    problem = Problem.of(shape)
    names = [name for name, _ in problem.net.named_parameters()]
    parameters = dict(zip(names, views(problem.theta, problem.net.parameters()), strict=True))
    expected = torch.func.functional_call(problem.net, parameters, (problem.images,)).detach()
    passes = passes_of(problem, convolution)
    found = passes.logits(problem.theta, problem.images)
    assert_close({"logits": found}, {"logits": expected})
    assert torch.equal(passes.logits(problem.theta, problem.images[7:9]), found[7:9])


@given(
    in_channels=st.integers(1, 5),
    height=st.integers(2, 13),
    width=st.integers(2, 13),
    channels=st.integers(1, 40),
    depth=st.integers(1, 3),
    batch=st.integers(1, 5),
    classes=st.integers(1, 18),
    soft=st.booleans(),
    kept=st.booleans(),
    convolution=st.sampled_from(CONVOLUTIONS),
    seed=st.integers(0, 1000),
)
def test_every_pass_is_autograds_whatever_the_sizes(
    in_channels: int,
    height: int,
    width: int,
    channels: int,
    depth: int,
    batch: int,
    classes: int,
    soft: bool,
    kept: bool,
    convolution: str,
    seed: int,
) -> None:
    depth = min(depth, min(height, width).bit_length() - 1)
    problem = Problem.of(
        Shape(in_channels, (height, width), channels, depth, batch, classes), soft, seed
    )
    assert_close(problem.by(passes_of(problem, convolution), kept), problem.by_autograd())


SEEDS = range(5)


@cache
def rounding(seed: int) -> tuple[Problem, Found, Found]:
    """A problem in float32, its truth, and what float32 autograd makes of it."""
    rounded = Problem.of(ROUNDED, True, seed).to(torch.float32)
    return rounded, rounded.to(torch.float64).by_autograd(), rounded.by_autograd()


# ---- close in float32 ----


@pytest.mark.parametrize("kept", [False, True], ids=["made again", "kept"])
def test_direct_float32_is_as_close_to_the_truth_as_autograds(kept: bool) -> None:
    """Medians: an activation that crosses zero by rounding moves a single problem's error by its
    whole share.
    """
    ours: dict[str, list[float]] = {}
    plain: dict[str, list[float]] = {}
    for seed in SEEDS:
        problem, exact, autograd = rounding(seed)
        for name, tensor in problem.by(passes_of(problem, "direct"), kept).items():
            assert tensor.dtype == torch.float32
            ours.setdefault(name, []).append(relative_error(tensor, exact[name]))
            plain.setdefault(name, []).append(relative_error(autograd[name], exact[name]))
    for name, errors in ours.items():
        assert median(errors) <= 2 * median(plain[name]), (name, errors, plain[name])


@pytest.mark.parametrize("kept", [False, True], ids=["made again", "kept"])
def test_winograds_float32_is_close_to_the_truth(kept: bool) -> None:
    for seed in SEEDS:
        problem, exact, _ = rounding(seed)
        for name, tensor in problem.by(passes_of(problem, "winograd"), kept).items():
            assert relative_error(tensor, exact[name]) <= 1e-2, name
            cosine = F.cosine_similarity(tensor.double().flatten(), exact[name].flatten(), dim=0)
            assert cosine >= 0.9999, name
