"""The whole network's passes in one kernel, against plain autograd, and what they promise beside
being right.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cache
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

import pytest
import torch
from cases import layouts, relative_error
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

import pdd_fast
from pdd_fast import engines
from pdd_fast.networks.convnet import kernel_shape
from pdd_fast.networks.parameters import parameter_count, views
from pdd_fast.ops import _native, convnet
from pdd_fast.ops._buffers import Buffer, BufferPool
from pdd_fast.ops.convnet import CONVOLUTIONS, ConvNetPasses, idle_bytes

CONVOLUTION = pytest.mark.parametrize("convolution", CONVOLUTIONS)
Found = dict[str, Tensor]


# ---- problems, and what autograd says about them ----


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
        """What the dual pass gives, by autograd's names."""
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


# ---- right in float64 ----

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


# ---- close in float32 ----

ROUNDED = Shape(3, (16, 16), 32, 3, 6, 10)
SEEDS = range(5)


@cache
def rounding(seed: int) -> tuple[Problem, Found, Found]:
    """A problem in float32, its truth, and what float32 autograd makes of it."""
    rounded = Problem.of(ROUNDED, True, seed).to(torch.float32)
    return rounded, rounded.to(torch.float64).by_autograd(), rounded.by_autograd()


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


# ---- the same bits ----

REPEATED = Shape(3, (12, 9), 20, 3, 7)
FOR_THREADS = (REPEATED, Shape(4, (17, 16), 33, 2, 3), Shape(1, (4, 5), 16, 1, 5))
TYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])


@TYPES
@CONVOLUTION
def test_same_bits_again_whatever_ran_in_between(convolution: str, dtype: torch.dtype) -> None:
    problem, passes = Problem.of(REPEATED).to(dtype), ConvNetPasses(REPEATED.kernel(), convolution)
    first = problem.by(passes)
    assert_same(problem.by(passes), first)
    for batch in (1, 30):  # less of the workspace, and a larger one
        Problem.of(replace(REPEATED, batch=batch), seed=1).to(dtype).by(passes, kept=True)
        assert_same(problem.by(passes), first)
    other = torch.float64 if dtype == torch.float32 else torch.float32
    problem.to(other).by(passes)
    assert_same(problem.by(passes), first)
    assert_same(problem.by(ConvNetPasses(REPEATED.kernel(), convolution)), first)


@pytest.mark.usefixtures("every_region_shared")
@TYPES
@CONVOLUTION
def test_same_bits_for_any_number_of_threads(convolution: str, dtype: torch.dtype) -> None:
    problems = [Problem.of(shape, True).to(dtype) for shape in FOR_THREADS]
    found = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        found.append(
            [p.by(passes_of(p, convolution), kept) for p in problems for kept in (False, True)]
        )
    for several in found[1:]:
        for one, other in zip(several, found[0], strict=True):
            assert_same(one, other)


@pytest.mark.usefixtures("every_region_shared")
@CONVOLUTION
def test_same_bits_from_two_python_threads_at_once(convolution: str) -> None:
    """A pass that finds the workspace taken works in one of its own."""
    passes, start = ConvNetPasses(REPEATED.kernel(), convolution), threading.Barrier(2)
    problems = [
        Problem.of(replace(REPEATED, batch=batch), seed=batch).to(torch.float32) for batch in (7, 5)
    ]
    expected = [problem.by(passes, kept=True) for problem in problems]

    def repeat(problem: Problem) -> list[Found]:
        start.wait()
        return [problem.by(passes, kept=True) for _ in range(20)]

    with ThreadPoolExecutor(2) as pool:
        for found, wanted in zip(pool.map(repeat, problems), expected, strict=True):
            for each in found:
                assert_same(each, wanted)


def spoil(*pools: BufferPool) -> None:
    """Fill what the next passes take with NaN of either type."""
    for pool in pools:
        assert pool._idle
        for memory in pool._idle:
            memory.fill_(255)
            assert memory[:8].view(torch.float64).isnan()


def test_a_workspace_that_is_taken_is_left_alone() -> None:
    problem, passes = Problem.of(REPEATED), ConvNetPasses(REPEATED.kernel())
    expected = problem.by(passes)
    taken = [convnet._WORKSPACES.buffer(1, torch.float64) for _ in convnet._WORKSPACES._idle]
    for buffer in taken:
        buffer._memory.random_()
    before = [buffer._memory.clone() for buffer in taken]
    assert_same(problem.by(passes), expected)
    assert all(
        torch.equal(buffer._memory, memory) for buffer, memory in zip(taken, before, strict=True)
    )


def test_the_workspace_is_given_back_after_an_error() -> None:
    problem, passes = Problem.of(REPEATED), ConvNetPasses(REPEATED.kernel())
    problem.by(passes)
    count = len(convnet._WORKSPACES._idle)
    for labels in (problem.labels + 4, problem.labels[:3]):
        with pytest.raises(ValueError, match="labels"):
            passes.gradient(problem.theta, problem.images, labels)
        assert len(convnet._WORKSPACES._idle) == count


@CONVOLUTION
@pytest.mark.parametrize(
    "name", ["the least", "tall", "large", "one channel", "more images than are convolved at once"]
)
def test_nothing_is_read_that_was_not_written(name: str, convolution: str) -> None:
    """torch fills what it allocates with NaN here: the workspace, what is kept, and the results."""
    problem, passes = truth(name, True)[0], passes_of(truth(name, True)[0], convolution)
    expected = [problem.by(passes, kept) for kept in (False, True)]
    spoil(convnet._WORKSPACES)  # what it was before may fit by chance
    deterministic = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(3).isnan().all()
        found = [problem.by(passes, kept) for kept in (False, True)]
        anew = [problem.by(passes_of(problem, convolution), kept) for kept in (False, True)]
    finally:
        torch.use_deterministic_algorithms(deterministic)
    for results in (found, anew):
        for one, other in zip(results, expected, strict=True):
            assert_same(one, other)


@CONVOLUTION
def test_what_is_kept_is_not_disturbed_by_other_passes(convolution: str) -> None:
    passes = ConvNetPasses(REPEATED.kernel(), convolution)
    one, other = (Problem.of(REPEATED, True, seed) for seed in (1, 2))
    kept = passes.gradient(*one.arguments, keep=True)[2]
    assert kept is not None
    expected, before = one.dual(passes, kept), kept.numbers.clone()
    later = passes.gradient(*other.arguments, keep=True)[2]
    other.dual(passes, later)
    other.dual(passes)
    Problem.of(replace(REPEATED, batch=20)).by(passes, kept=True)
    assert_same(one.dual(passes, kept), expected)
    assert torch.equal(kept.numbers, before)  # a dual pass only reads it: two may at once


def keep(passes: ConvNetPasses, batch: int, dtype: torch.dtype = torch.float32) -> Buffer:
    shape = replace(REPEATED, batch=batch, width=passes.shape.channels)
    kept = passes.gradient(*Problem.of(shape).to(dtype).arguments, keep=True)[2]
    assert kept is not None
    return kept


def places(*kept: Buffer) -> set[int]:
    return {each.numbers.data_ptr() for each in kept}


def test_memory_of_what_was_kept_is_used_again() -> None:
    passes = ConvNetPasses(REPEATED.kernel())
    first, second = keep(passes, 6), keep(passes, 6)
    both = places(first, second)
    assert len(both) == 2
    del first, second
    smaller, other_type = keep(passes, 3), keep(passes, 3, torch.float64)
    assert places(smaller, other_type) == both
    third = keep(passes, 6)
    assert not places(third) & both


def test_pieces_of_what_was_kept_grow_in_size_and_not_in_number() -> None:
    pdd_fast.free_buffers()
    passes, largest = ConvNetPasses(REPEATED.kernel()), 0
    for batch in (2, 3, 6, 5, 6):
        kept = keep(passes, batch)
        assert idle_bytes() == 0
        del kept
        largest = max(largest, batch)
        assert idle_bytes() == 4 * passes.sizes(largest).kept
    pdd_fast.free_buffers()
    assert idle_bytes() == 0


def test_what_is_kept_outlives_its_passes() -> None:
    problem = Problem.of(REPEATED, True)
    expected = problem.by(ConvNetPasses(REPEATED.kernel()), kept=True)
    kept = ConvNetPasses(REPEATED.kernel()).gradient(*problem.arguments, keep=True)[2]
    assert kept is not None
    pdd_fast.free_buffers()
    assert idle_bytes() == 0
    found = problem.dual(ConvNetPasses(REPEATED.kernel()), kept)
    assert_same(found, {name: expected[name] for name in found})
    size = kept.numbers.nbytes
    del kept
    assert idle_bytes() == size


def test_networks_of_all_shapes_share_their_buffers() -> None:
    pdd_fast.free_buffers()
    wider = replace(REPEATED, width=2 * REPEATED.width)
    kept = keep(ConvNetPasses(wider.kernel()), 6)
    own = places(kept)
    del kept
    assert places(keep(ConvNetPasses(REPEATED.kernel()), 6)) == own


def test_arguments_are_left_alone_and_no_graph_is_recorded() -> None:
    problem = Problem.of(REPEATED, True)
    for name in ("theta", "images", "labels", "direction"):
        getattr(problem, name).requires_grad_()
    copies = {
        name: getattr(problem, name).detach().clone()
        for name in problem.__dataclass_fields__
        if name != "net"
    }
    for kept in (False, True):
        for name, tensor in problem.by(ConvNetPasses(problem.kernel), kept).items():
            assert not tensor.requires_grad, name
    for name, copy in copies.items():
        assert torch.equal(getattr(problem, name), copy), name


LEVELS = ("baseline", "avx2", "avx512")
AT_ANOTHER_LEVEL = """
import sys
import torch
import test_convnet
torch.save(test_convnet.at_this_level(), sys.argv[1])
"""


def level() -> str:
    library = _native.load("cpu")
    assert library is not None
    return library.capabilities()["instruction set"]


def at_this_level() -> tuple[str, list[Found]]:
    """The instruction set, and the passes of a problem in both types, by both convolutions."""
    return level(), [
        Problem.of(REPEATED).to(dtype).by(ConvNetPasses(REPEATED.kernel(), convolution), kept=True)
        for dtype in (torch.float64, torch.float32)
        for convolution in ("direct", "winograd")
    ]


@pytest.mark.parametrize("lower", LEVELS[:2])
def test_a_lower_instruction_set_differs_by_rounding(lower: str, tmp_path: Path) -> None:
    """Vectors of another width sum the same products; fused multiply-adds round them once less."""
    best, ours = at_this_level()
    if LEVELS.index(lower) >= LEVELS.index(best):
        pytest.skip(f"this CPU has no more than {best}")
    here = Path(__file__).parent
    path = os.pathsep.join(
        [str(here), str(here.parent / "support"), os.environ.get("PYTHONPATH", "")]
    )
    subprocess.run(
        [sys.executable, "-c", AT_ANOTHER_LEVEL, str(tmp_path / "found")],
        # From there, because in a source tree it would find the package's sources in place of what
        # is installed.
        check=True,
        cwd=tmp_path,
        env=os.environ | {"PDD_FAST_CPU": lower, "PYTHONPATH": path},
    )
    there, found = torch.load(tmp_path / "found")
    assert there == lower
    for one, other, tolerance in zip(found, ours, (1e-11, 1e-11, 1e-3, 1e-2), strict=True):
        assert_close(one, other, tolerance)


# ---- which engine takes them ----


def test_the_fused_engine_hands_on_what_the_passes_give() -> None:
    problem = Problem.of(REPEATED, True)
    engine, passes = engines.choose(problem.net, convolution="direct"), passes_of(problem, "direct")
    expected = problem.by(passes, kept=True)
    assert torch.equal(engine.logits(problem.theta, problem.images), expected["logits"])
    losses, gradient, saved = engine.gradient(*problem.arguments, keep=True)
    assert torch.equal(losses, expected["losses"])
    assert torch.equal(gradient, expected["gradient"])
    dual = engine.dual(*problem.arguments, problem.direction, saved)
    assert torch.equal(dual.slope, expected["slopes"].mean())
    for found, name in ((dual.theta, "theta"), (dual.images, "images"), (dual.labels, "labels")):
        assert found is not None
        assert torch.equal(found, expected[f"tangent of {name}"])


@pytest.mark.parametrize("convolution", ["direct", "winograd"])
def test_the_engine_convolves_as_it_is_told(convolution: str) -> None:
    """The two differ by rounding, so their bits tell them apart."""
    problem = Problem.of(ROUNDED).to(torch.float32)
    found = {
        name: passes_of(problem, name).gradient(*problem.arguments)[1]
        for name in ("direct", "winograd")
    }
    assert not torch.equal(found["direct"], found["winograd"])
    engine = engines.choose(problem.net, convolution=convolution)
    assert torch.equal(engine.gradient(*problem.arguments)[1], found[convolution])


# ---- errors ----

Change = Callable[[Problem], dict[str, Any]]
P = r"\(\d+,\)"
WRONG: dict[str, tuple[Change, str, str]] = {
    "theta too short": (
        lambda p: {"theta": p.theta[:-1]},
        "gradient",
        rf"theta must have shape {P}, got {P}",
    ),
    "theta too long": (
        lambda p: {"theta": torch.cat([p.theta] * 2)},
        "logits",
        rf"theta must have shape {P}, got {P}",
    ),
    "theta a matrix": (
        lambda p: {"theta": p.theta[None]},
        "logits",
        rf"theta must have shape {P}, got \(1, \d+\)",
    ),
    "theta in 16 bits": (
        lambda p: {"theta": p.theta.half(), "images": p.images.half()},
        "logits",
        r"theta must be float32 or float64, got torch\.float16",
    ),
    "channels of an image": (
        lambda p: {"images": p.images[:, :2]},
        "gradient",
        r"images must have shape \(7, 3, 12, 9\), got \(7, 2, 12, 9\)",
    ),
    "size of an image": (
        lambda p: {"images": p.images[..., :8]},
        "logits",
        r"images must have shape \(7, 3, 12, 9\), got \(7, 3, 12, 8\)",
    ),
    "one image": (
        lambda p: {"images": p.images[0]},
        "logits",
        r"images must have shape \(3, 3, 12, 9\), got \(3, 12, 9\)",
    ),
    "no images": (
        lambda p: {"images": p.images[:0], "labels": p.labels[:0]},
        "gradient",
        r"images must not be empty, got \(0, 3, 12, 9\)",
    ),
    "images of another type": (
        lambda p: {"images": p.images.float()},
        "gradient",
        r"images must be torch\.float64, got torch\.float32",
    ),
    "hard labels of another type": (
        lambda p: {"labels": p.labels.int()},
        "gradient",
        r"labels must be torch\.float64, got torch\.int32",
    ),
    "soft labels of another type": (
        lambda p: {"labels": torch.ones(7, 4)},
        "dual",
        r"labels must be torch\.float64, got torch\.float32",
    ),
    "too few labels": (
        lambda p: {"labels": p.labels[:6]},
        "dual",
        r"labels must have shape \(7,\), got \(6,\)",
    ),
    "labels of other classes": (
        lambda p: {"labels": torch.ones(7, 5).double()},
        "gradient",
        r"labels must have shape \(7, 4\), got \(7, 5\)",
    ),
    "a direction too short": (
        lambda p: {"direction": p.direction[:-1]},
        "dual",
        rf"direction must have shape {P}, got {P}",
    ),
    "a direction of another type": (
        lambda p: {"direction": p.direction.float()},
        "dual",
        r"direction must be torch\.float64, got torch\.float32",
    ),
    "gradients of other logits": (
        lambda p: {"grad_logits": p.grad_logits[:, :3]},
        "backward",
        r"grad_logits must have shape \(7, 4\), got \(7, 3\)",
    ),
}


def run(problem: Problem, name: str, passes: ConvNetPasses, kept: Buffer | None = None) -> None:
    match name:
        case "logits":
            passes.logits(problem.theta, problem.images)
        case "gradient":
            passes.gradient(*problem.arguments)
        case "dual":
            passes.dual(*problem.arguments, problem.direction, kept, True, None)
        case "backward":
            if kept is None:
                kept = passes.forward(problem.theta, problem.images, keep=True)[1]
            assert kept is not None
            passes.backward(problem.theta, problem.images, kept, problem.grad_logits, True)


@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_arguments_are_named(wrong: str) -> None:
    change, name, message = WRONG[wrong]
    problem = Problem.of(REPEATED)
    error = TypeError if "got torch" in message.replace("\\", "") else ValueError
    with pytest.raises(error, match=f"^convnet: {message}$"):
        run(replace(problem, **change(problem)), name, passes_of(problem, "auto"))


@pytest.mark.parametrize("label", [4, -1, 2**62])
@pytest.mark.parametrize("name", ["gradient", "dual"])
def test_a_label_out_of_range_is_refused(name: str, label: int) -> None:
    problem = Problem.of(REPEATED)
    labels = problem.labels.clone()
    labels[-1] = label
    with pytest.raises(ValueError, match=rf"^convnet_{name}: labels must lie in \[0, classes\)$"):
        run(replace(problem, labels=labels), name, passes_of(problem, "auto"))


@pytest.mark.parametrize("name", ["dual", "backward"])
def test_what_another_batch_kept_is_refused(name: str) -> None:
    problem, passes = Problem.of(REPEATED), ConvNetPasses(REPEATED.kernel())
    kept = passes.gradient(problem.theta, problem.images[:3], problem.labels[:3], keep=True)[2]
    with pytest.raises(ValueError, match=rf"^convnet: kept must have shape {P}, got {P}$"):
        run(problem, name, passes, kept)


def test_rows_that_there_are_not_are_refused() -> None:
    problem, passes = Problem.of(REPEATED), ConvNetPasses(REPEATED.kernel())
    with pytest.raises(IndexError, match="out of"):
        problem.dual(passes, rows=torch.tensor([7]))
