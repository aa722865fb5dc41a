"""The whole network's passes in one kernel, against plain autograd, and what they promise beside
being right."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from convnet_support import (
    CONVOLUTION,
    ROUNDED,
    Found,
    Problem,
    Shape,
    assert_close,
    assert_same,
    passes_of,
    truth,
)
from forks import Forks

import pdd_fast
from pdd_fast import engines
from pdd_fast.ops import _native, convnet
from pdd_fast.ops._buffers import Buffer, BufferPool
from pdd_fast.ops.convnet import ConvNetPasses, idle_bytes

REPEATED = Shape(3, (12, 9), 20, 3, 7)


FOR_THREADS = (REPEATED, Shape(4, (17, 16), 33, 2, 3), Shape(1, (4, 5), 16, 1, 5))


TYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])


# ---- the same bits ----


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
    expected, before = one.dual(passes, kept), kept.tensor.clone()
    later = passes.gradient(*other.arguments, keep=True)[2]
    other.dual(passes, later)
    other.dual(passes)
    Problem.of(replace(REPEATED, batch=20)).by(passes, kept=True)
    assert_same(one.dual(passes, kept), expected)
    assert torch.equal(kept.tensor, before)  # a dual pass only reads it: two may at once


def keep(passes: ConvNetPasses, batch: int, dtype: torch.dtype = torch.float32) -> Buffer:
    shape = replace(REPEATED, batch=batch, width=passes.shape.channels)
    kept = passes.gradient(*Problem.of(shape).to(dtype).arguments, keep=True)[2]
    assert kept is not None
    return kept


def places(*kept: Buffer) -> set[int]:
    return {each.tensor.data_ptr() for each in kept}


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
        assert idle_bytes() == 4 * passes.sizes(largest).saved
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
    size = kept.tensor.nbytes
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
sys.path[:0] = sys.argv[2:]
import test_convnet_bits
torch.save(test_convnet_bits.at_this_level(), sys.argv[1])
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
def test_a_lower_instruction_set_differs_by_rounding(
    forks: Forks, lower: str, tmp_path: Path
) -> None:
    """Vectors of another width sum the same products; fused multiply-adds round them once less."""
    best, ours = at_this_level()
    if LEVELS.index(lower) >= LEVELS.index(best):
        pytest.skip(f"this CPU has no more than {best}")
    here = Path(__file__).parent
    arguments = [str(tmp_path / "found"), str(here), str(here.parent / "support")]
    result = forks.python(
        AT_ANOTHER_LEVEL, arguments, folder=tmp_path, environment={"PDD_FAST_CPU": lower}
    )
    assert result.returncode == 0, result.stderr
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


# ---- errors ----


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
    with pytest.raises(ValueError, match=rf"^convnet: saved must have shape {P}, got {P}$"):
        run(problem, name, passes, kept)


def test_rows_that_there_are_not_are_refused() -> None:
    problem, passes = Problem.of(REPEATED), ConvNetPasses(REPEATED.kernel())
    with pytest.raises(IndexError, match="out of"):
        problem.dual(passes, rows=torch.tensor([7]))
