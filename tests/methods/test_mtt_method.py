"""One iteration of trajectory matching: the bits of autograd's route, fresh or replayed, and a
state that is never half of one."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import relative_error
from mtt_support import BATCH, CASES, CPU, SINGLE, SIZE, STEPS, Case, assert_same, kept
from torch import Tensor

from pdd_fast import engines
from pdd_fast.data import ImageData, Split
from pdd_fast.data.normalization import Normalization
from pdd_fast.data.union_set import UnionSet
from pdd_fast.engines import Engine, FusedEngine
from pdd_fast.methods import StageProblem, TrajectoryMatching
from pdd_fast.methods.mtt import method as trajectory
from pdd_fast.methods.mtt.method import RollbackWarning
from pdd_fast.methods.mtt.step import MatchingResult, MatchingStep
from pdd_fast.progressive.context import RunContext
from pdd_fast.progressive.problem import stage_problem
from pdd_fast.runtime import device_memory
from pdd_fast.runtime.errors import RunError, UsageError
from pdd_fast.settings import Settings
from pdd_fast.storage.trajectories import list_trajectories, write_trajectory
from pdd_fast.training.cuda_graphs import CaptureWarning

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no GPU")


needs_two = pytest.mark.skipif(
    torch.cuda.device_count() < 2, reason="torch finds less than two GPUs"
)


def problem(
    folder: Path, device: torch.device = CPU, engine: Engine | None = None, **settings: Any
) -> StageProblem:
    """A stage's problem with two trajectories on disk."""
    case = Case(device, labels=settings.get("labels", "hard"))
    engine = engine or case.engine
    if not list(folder.glob("*")):
        for k in range(2):
            draw = torch.Generator().manual_seed(k)
            rows = [
                case.theta + 0.1 * torch.randn(len(case.theta), generator=draw) for _ in range(5)
            ]
            write_trajectory(folder / f"trajectory-00{k}.safetensors", rows, {})
    settings = {
        "inner_steps": STEPS,
        "inner_batch": BATCH,
        "max_start_epoch": 2,
        "expert_epochs": 2,
        "lr_img": 0.5,
        "lr_lr": 1e-3,
        "inner_lr": 0.03,
        "width": 6,
        "depth": 2,
        "lr_label": 20.0,
    } | settings
    frozen, config = len(case.frozen), Settings().changed(**settings)
    learned, learned_labels = case.learned, case.labels[frozen:]
    split = Split(learned, learned_labels)
    data = ImageData("none", tuple("abc"), split, 1, split, Normalization((0.0,) * 3, (1.0,) * 3))
    ctx = RunContext(config, device, data, engine, SINGLE, 1)
    union = UnionSet(
        case.frozen, case.labels[:frozen], torch.ones(frozen, dtype=torch.int64), [0.1]
    )
    return stage_problem(ctx, 2, None, union, list_trajectories(folder), learned, learned_labels)


def states_of(method: TrajectoryMatching, iterations: int) -> list[dict[str, Tensor]]:
    seen = []
    for _ in range(iterations):
        method.step()
        seen.append(method.state())
    return seen


def same_state(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


class Tripping(FusedEngine):
    """Raises at the call of a number; counts them."""

    def __init__(self, error: BaseException, at: int) -> None:
        super().__init__(Case().engine.net)  # type: ignore[arg-type]
        self.error, self.at, self.calls = error, at, 0

    def _trip(self) -> None:
        self.calls += 1
        if self.calls == self.at:
            raise self.error

    def gradient(self, *args: Any, **options: Any) -> Any:
        self._trip()
        return super().gradient(*args, **options)

    def dual(self, *args: Any, **options: Any) -> Any:
        self._trip()
        return super().dual(*args, **options)


# ---- the base method ----


@pytest.mark.parametrize("labels", ["hard", "soft"])
def test_labels_that_are_not_to_be_learned_stay(tmp_path: Path, labels: str) -> None:
    method = TrajectoryMatching(problem(tmp_path, labels=labels))
    before = method.labels.clone()
    states_of(method, 2)
    assert torch.equal(method.labels, before)
    assert before.dim() == (1 if labels == "hard" else 2)


def test_labels_are_learned_where_asked(tmp_path: Path) -> None:
    method, slower, averaged = (
        TrajectoryMatching(problem(tmp_path, labels="learned", **settings))
        for settings in ({}, {"lr_label": 0.0}, {"ema_decay": 0.75})
    )
    first = method.labels.clone()
    assert torch.equal(slower.labels, first)
    seen = states_of(method, 3)
    states_of(slower, 3), states_of(averaged, 3)
    assert float((method.labels - first).abs().max()) > 1e-4
    torch.testing.assert_close(method.labels.sum(1), torch.ones(len(first)))
    torch.testing.assert_close(slower.labels, first)
    assert 0 < float((averaged.labels - first).norm()) < float((method.labels - first).norm())
    again = TrajectoryMatching(problem(tmp_path, labels="learned"))
    again.load_state(seen[1])
    again.step()
    assert torch.equal(again.labels, method.labels)


@pytest.mark.parametrize("at", [1, 3, STEPS + 1, 2 * STEPS, 2 * STEPS + 2, 4 * STEPS])
def test_interrupted_anywhere_the_state_is_that_of_before_and_the_rest_the_same(
    tmp_path: Path, at: int
) -> None:
    expected = states_of(TrajectoryMatching(problem(tmp_path)), 4)
    method = TrajectoryMatching(problem(tmp_path, engine=Tripping(KeyboardInterrupt(), at)))
    seen = []
    while len(seen) < 4:
        before = method.state()
        try:
            method.step()
            seen.append(method.state())
        except KeyboardInterrupt:
            assert same_state(method.state(), before)
            assert method.iteration == len(seen)
    assert all(same_state(one, other) for one, other in zip(seen, expected, strict=True))


@pytest.mark.parametrize(
    "settings", [{}, {"labels": "learned"}, {"labels": "learned", "ema_decay": 0.5}]
)
def test_a_loaded_state_goes_on_with_the_same_bits(
    tmp_path: Path, settings: dict[str, Any]
) -> None:
    """Also where inputs were made ahead for another iteration."""
    method = TrajectoryMatching(problem(tmp_path, **settings))
    expected = states_of(method, 4)
    method.load_state(expected[0])
    assert method.iteration == 1
    assert all(
        same_state(one, other)
        for one, other in zip(states_of(method, 3), expected[1:], strict=True)
    )
    other = TrajectoryMatching(problem(tmp_path, **settings))
    other.load_state(expected[1])
    assert all(
        same_state(one, two) for one, two in zip(states_of(other, 2), expected[2:], strict=True)
    )


def test_every_iteration_draws_several_trajectories_where_asked(tmp_path: Path) -> None:
    one, two = (
        TrajectoryMatching(problem(tmp_path, trajectories_per_step=count))._inputs(7)
        for count in (1, 2)
    )
    assert one.aug_params is not None
    assert two.aug_params is not None
    assert torch.equal(two.start[0], one.start)  # the first as it would be alone
    assert torch.equal(two.batches[0], one.batches)
    assert torch.equal(two.aug_params.values[:, : STEPS * BATCH], one.aug_params.values)
    assert not torch.equal(two.batches[0], two.batches[1])
    assert two.target.shape == (2, len(one.target))
    expected = TrajectoryMatching(problem(tmp_path))
    assert not same_state(
        states_of(TrajectoryMatching(problem(tmp_path, trajectories_per_step=2)), 1)[0],
        states_of(expected, 1)[0],
    )


def test_images_are_averaged_over_iterations_where_asked(tmp_path: Path) -> None:
    last, averaged = (TrajectoryMatching(problem(tmp_path, ema_decay=ema)) for ema in (0.0, 0.75))
    expected = averaged.images.clone()
    for _ in range(3):
        last.step()
        averaged.step()
        expected = 0.75 * expected + 0.25 * last.images
        torch.testing.assert_close(averaged.images, expected)
        assert averaged.learning_rate == last.learning_rate
    again = TrajectoryMatching(problem(tmp_path, ema_decay=0.75))
    again.load_state(averaged.state())
    assert torch.equal(again.images, averaged.images)
    averaged.step(), again.step()
    assert torch.equal(again.images, averaged.images)


def test_a_stage_has_its_own_rate_of_the_images(tmp_path: Path) -> None:
    """The problem is that of stage 2."""
    settings = {"stages": 2, "ipc": 2}
    own = TrajectoryMatching(problem(tmp_path, stage_lr_img="9,0.25", **settings))
    expected = TrajectoryMatching(problem(tmp_path, lr_img=0.25, **settings))
    assert same_state(states_of(own, 2)[1], states_of(expected, 2)[1])


def test_gradients_are_clipped_where_asked(tmp_path: Path) -> None:
    method = TrajectoryMatching(problem(tmp_path, max_grad_norm=1e-4))
    method.step()
    assert float(method.state()["images_momentum_buffer"].norm()) == pytest.approx(1e-4, rel=1e-4)


class Spoiled(MatchingStep):
    """Gives what cannot be at iterations of the given numbers of calls."""

    at: tuple[int, ...] = ()
    calls = 0
    lengths: list[float]

    def __call__(self, *args: Any, **options: Any) -> MatchingResult:
        result = super().__call__(*args, **options)
        type(self).calls += 1
        type(self).lengths.append(args[3])
        if self.calls not in self.at:
            return result
        spoiled = result.state._replace(images=result.state.images * float("nan"))
        return (
            result._replace(state=spoiled, finite=False)
            if self.calls % 2
            else result._replace(lr=-0.25)
        )


@pytest.fixture
def spoil(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    def at(*calls: int) -> None:
        monkeypatch.setattr(Spoiled, "at", calls)
        monkeypatch.setattr(Spoiled, "calls", 0)
        monkeypatch.setattr(Spoiled, "lengths", [], raising=False)
        monkeypatch.setattr(trajectory, "MatchingStep", Spoiled)

    return at


def test_what_left_the_range_is_set_back_with_smaller_steps(
    tmp_path: Path, spoil: Callable[..., None]
) -> None:
    plain = states_of(TrajectoryMatching(problem(tmp_path)), 45)
    spoil(46)
    method = TrajectoryMatching(problem(tmp_path))
    assert all(
        same_state(one, other) for one, other in zip(states_of(method, 45), plain, strict=True)
    )
    with pytest.warns(
        RollbackWarning,
        match=r"stage 2, iteration 46: the learned inner rate became -0\.25; .* of 1/2$",
    ):
        values = method.step()
    assert (values["halvings"], method.iteration, Spoiled.calls) == (1, 46, 47)
    assert Spoiled.lengths[-2:] == [1.0, 0.5]
    # From the images of iteration 20, at rest: 45 iterations were done, and 40 is the newer of the
    # states kept.
    images, lr = plain[19]["images"], plain[19]["lr"]
    state = method.state()
    torch.testing.assert_close(state["images"], images - 0.25 * state["images_momentum_buffer"])
    torch.testing.assert_close(state["lr"], lr - 0.5e-3 * state["lr_momentum_buffer"])
    again = TrajectoryMatching(problem(tmp_path))
    again.load_state(state)
    assert same_state(states_of(method, 1)[0], states_of(again, 1)[0])
    assert Spoiled.lengths[-2:] == [0.5, 0.5]


def test_a_stage_gives_up_after_as_many_halvings_as_it_may(
    tmp_path: Path, spoil: Callable[..., None]
) -> None:
    spoil(3, 5, 7)
    method = TrajectoryMatching(problem(tmp_path, max_rollbacks=2))
    with pytest.warns(RollbackWarning) as warned:
        states_of(method, 4)  # by six calls
    assert [str(warning.message)[-4:] for warning in warned] == [" 1/2", " 1/4"]
    before = method.state()
    message = (
        r"^stage 2, iteration 5: .* finite, after its steps were halved 2 times; start "
        r"again with a smaller lr_img "
    )
    with pytest.raises(RunError, match=message):
        method.step()
    assert same_state(method.state(), before)
    method.step()
    assert Spoiled.lengths == [1, 1, 1, 0.5, 0.5, 0.25, 0.25, 0.25]


def test_without_a_guard_the_first_failure_is_the_last(
    tmp_path: Path, spoil: Callable[..., None]
) -> None:
    spoil(1, 2)
    method = TrajectoryMatching(problem(tmp_path, max_rollbacks=0))
    for message in (
        "images are no longer finite; start",
        r"inner rate became -0\.25; start again with a smaller lr_lr",
    ):
        with pytest.raises(RunError, match=message):
            method.step()
    assert method.iteration == 0


def test_a_trajectory_that_cannot_be_read_stops_the_iteration_that_needs_it(tmp_path: Path) -> None:
    method = TrajectoryMatching(problem(tmp_path))
    expected = states_of(TrajectoryMatching(problem(tmp_path)), 2)
    stored = {path: path.read_bytes() for path in tmp_path.glob("*")}
    method._ahead = (0, method._inputs(0))
    for path in stored:
        path.write_bytes(b"no longer a trajectory")
    method.step()
    assert same_state(method.state(), expected[0])
    with pytest.raises(UsageError):
        method.step()
    for path, content in stored.items():
        path.write_bytes(content)
    method.step()
    assert same_state(method.state(), expected[1])


def test_out_of_memory_is_a_sentence_and_nothing_is_lost(tmp_path: Path) -> None:
    error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")
    method = TrajectoryMatching(
        problem(tmp_path, engine=Tripping(error, 2 * STEPS + 1), memory="cache")
    )
    method.step()
    before = method.state()
    with pytest.raises(RunError) as raised:
        method.step()
    message = str(raised.value)
    assert message.startswith("stage 2, iteration 2: cpu is out of memory, with a peak of ")
    assert message.endswith("; lower inner_batch (now 5) or width (now 6), or set memory=recompute")
    assert same_state(method.state(), before)


def test_how_many_steps_a_run_keeps_does_not_depend_on_what_is_free(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It decides how the gradient is rounded, and a continued run has the bits of one that was not
    stopped.
    """
    size = Case().engine.saved_bytes(engines.PassShape(BATCH, (3, *SIZE), torch.float32, CPU))

    def free(device: torch.device) -> int:
        raise AssertionError("asked for what is free")

    monkeypatch.setattr(device_memory, "free", free)
    monkeypatch.setattr(device_memory, "total", lambda device: 2 * 3 * size + 1)
    assert kept(TrajectoryMatching(problem(tmp_path))) == 0
    assert kept(TrajectoryMatching(problem(tmp_path, memory="cache"))) == STEPS
    method = TrajectoryMatching(problem(tmp_path, memory="auto"))
    assert kept(method) == 3
    expected = states_of(method, 3)
    other = TrajectoryMatching(problem(tmp_path, memory="auto"))
    other.load_state(expected[0])
    assert all(
        same_state(one, two) for one, two in zip(states_of(other, 2), expected[1:], strict=True)
    )
    for limit, steps in ((2 * size / 1e9, 2), (2.9 * size / 1e9, 2), (1e-9, 0), (1e300, STEPS)):
        assert (
            kept(TrajectoryMatching(problem(tmp_path, memory="auto", memory_limit=limit))) == steps
        )


def test_what_to_lower_names_the_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_memory, "available", lambda device: 10_000)
    with pytest.raises(
        UsageError,
        match=r"lower inner_batch \(now 5\), width \(now 6\) or memory_limit \(now 2\.5 GB\), or "
        r"set memory=recompute$",
    ):
        TrajectoryMatching(problem(tmp_path, memory="auto", memory_limit=2.5))


def test_too_large_an_iteration_is_refused_before_it_begins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device_memory, "available", lambda device: 10_000)
    with pytest.raises(
        UsageError,
        match=r"^stage 2: an iteration would take about 1 MB and cpu has 1 MB; lower inner_",
    ):
        TrajectoryMatching(problem(tmp_path))
    monkeypatch.setattr(device_memory, "available", lambda device: 10_000_000)
    TrajectoryMatching(problem(tmp_path))


def check_on(device: torch.device, **options: Any) -> None:
    case = Case(device, **options)
    eager = case.run(case.step(), 5)
    with warnings.catch_warnings(action="error", category=CaptureWarning):
        assert_same(case.run(case.step(graph=True), 5), eager)
    on_cpu = Case(CPU, dtype=torch.float64, **options)
    first, truth = eager[0], on_cpu.run(on_cpu.step(), 1)[0]
    assert first.loss == pytest.approx(truth.loss, rel=1e-4)
    # Activations that cross zero by rounding change a gradient of so few by up to 1e-3
    # (test_unroll.py).
    assert (
        relative_error(first.state.images_momentum_buffer.cpu(), truth.state.images_momentum_buffer)
        <= 5e-3
    )


# ---- on a GPU ----


@needs_cuda
@pytest.mark.parametrize(
    "name", [name for name in CASES if "autograd" not in name and name != "float64"]
)
def test_replays_on_a_gpu_have_the_bits_of_calls(name: str) -> None:
    check_on(torch.device("cuda", 0), **CASES[name])


@needs_cuda
def test_on_a_stream_that_is_not_the_default() -> None:
    with torch.cuda.stream(torch.cuda.Stream()):
        check_on(torch.device("cuda", 0))


@needs_two
def test_on_a_second_gpu_while_the_first_is_current() -> None:
    check_on(torch.device("cuda", 1))
    assert torch.cuda.current_device() == 0


@needs_cuda
@pytest.mark.parametrize("graph", ["auto", "off"])
def test_the_base_method_on_a_gpu(tmp_path: Path, graph: str) -> None:
    """Interrupted while the GPU works, and resumed from the state on the host."""
    device = torch.device("cuda", 0)
    expected = states_of(TrajectoryMatching(problem(tmp_path, device, graph="off")), 4)
    method = TrajectoryMatching(problem(tmp_path, device, graph=graph))
    seen = states_of(method, 3)
    look_ahead: Callable[[], None] = method._look_ahead

    def interrupt() -> None:
        raise KeyboardInterrupt

    method._look_ahead = interrupt  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        method.step()
    assert same_state(method.state(), seen[-1])
    method._look_ahead = look_ahead  # type: ignore[method-assign]
    method.step()
    seen.append(method.state())
    assert all(same_state(one, other) for one, other in zip(seen, expected, strict=True))


@needs_cuda
def test_an_iteration_waits_for_the_device_once() -> None:
    case = Case(torch.device("cuda", 0))
    step = case.step(graph=True)
    results = case.run(step, 3)
    inputs = case.inputs(3)[0]
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True, action="always") as seen:
            step(results[-1].state, inputs)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    waits = [w for w in seen if "synchroniz" in str(w.message)]
    assert len(waits) == 1
