"""One iteration of trajectory matching: the bits of autograd's route, fresh or replayed, and a
state that is never half of one.
"""

from __future__ import annotations

import gc
import warnings
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import relative_error
from recorder import Recorder
from torch import Tensor

import pdd_fast
from pdd_fast import engines
from pdd_fast.augmentation.dsa import AugmentParameters, PackedAugmentParameters
from pdd_fast.data import ImageData, Split
from pdd_fast.data.normalization import Normalization
from pdd_fast.engines import Engine, FusedEngine
from pdd_fast.methods import StageProblem, TrajectoryMatching
from pdd_fast.methods.mtt import method as trajectory
from pdd_fast.methods.mtt.method import RollbackWarning
from pdd_fast.methods.mtt.step import MatchingInputs, MatchingResult, MatchingState, MatchingStep
from pdd_fast.progressive.context import RunContext
from pdd_fast.progressive.union import UnionSet
from pdd_fast.runtime import device_memory
from pdd_fast.runtime.errors import RunError, UsageError
from pdd_fast.settings import Config
from pdd_fast.storage.trajectories import list_trajectories, write_trajectory
from pdd_fast.training.cuda_graphs import CaptureWarning

CPU = torch.device("cpu")
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no GPU")
needs_two = pytest.mark.skipif(
    torch.cuda.device_count() < 2, reason="torch finds less than two GPUs"
)
CLASSES, STEPS, BATCH, SIZE = 3, 4, 5, (8, 7)
SINGLE, MULTIPLE = pdd_fast.DSA(), pdd_fast.DSA("color_crop_cutout", mode="multiple")
UPDATE = {"lr_img": 0.5, "lr_lr": 1e-3, "lr_label": 20.0, "momentum": 0.6}
RATES = ("lr_img", "lr_lr", "lr_label")


class Case:
    """A stage in small: a network, m frozen and n learned images, and draws for as many iterations
    as asked for.
    """

    def __init__(
        self,
        device: torch.device = CPU,
        dtype: torch.dtype = torch.float32,
        frozen: int = 4,
        learned: int = 6,
        engine: str = "fused",
        memory: str = "recompute",
        keep: int = 0,
        dsa: pdd_fast.DSA | None = SINGLE,
        labels: str = "hard",
    ) -> None:
        """``keep``: with memory="auto", how many steps the limit has room for."""
        draw = torch.Generator().manual_seed(0)
        net = pdd_fast.ConvNet(3, CLASSES, SIZE, width=6, depth=2).to(dtype)
        self.theta = pdd_fast.flatten_parameters(net) + 0.1
        self.device, self.memory, self.dsa = device, memory, dsa
        self.engine: Engine = engines.choose(net.to(device), engine)
        size = self.engine.kept_bytes(engines.PassShape(BATCH, (3, *SIZE), dtype, device))
        self.memory_limit = keep * size if memory == "auto" else None
        images = torch.randn(frozen + learned, 3, *SIZE, generator=draw, dtype=dtype).to(device)
        self.frozen, self.learned = images.split([frozen, learned])
        self.labels = torch.randint(CLASSES, (frozen + learned,), generator=draw).to(device)
        self.learns_labels = labels == "learned"
        if labels != "hard":
            self.labels = (
                torch.randn(frozen + learned, CLASSES, generator=draw, dtype=dtype)
                .softmax(1)
                .to(device)
            )

    def inputs(self, seed: int) -> tuple[MatchingInputs, list[AugmentParameters] | None]:
        draw = torch.Generator().manual_seed(seed)
        start, target = (
            self.theta + 0.1 * torch.randn(len(self.theta), generator=draw).to(self.theta.dtype)
            for _ in range(2)
        )
        batches = torch.stack(
            [torch.randperm(len(self.labels), generator=draw)[:BATCH] for _ in range(STEPS)]
        )
        if self.dsa is None:
            return MatchingInputs(start, target, batches, None), None
        aug_params = [self.dsa.sample(BATCH, SIZE, draw) for _ in range(STEPS)]
        return MatchingInputs(
            start, target, batches, PackedAugmentParameters.of(aug_params)
        ), aug_params

    def step(self, **options: Any) -> MatchingStep:
        if self.dsa is not None:
            drawn = self.dsa.sample(1, SIZE, torch.Generator())
            options = {"operations": len(drawn.operations), "cutout": drawn.cutout_size} | options
        memory = {
            "memory": self.memory,
            "memory_limit": self.memory_limit,
            "learn_labels": self.learns_labels,
        }
        options = {"steps": STEPS, "batch": BATCH} | memory | UPDATE | options
        return MatchingStep(self.engine, self.labels, self.frozen, **options)

    def first(self) -> MatchingState:
        own = self.labels[len(self.frozen) :] if self.learns_labels else None
        return MatchingState.start(self.learned, 0.03, own)

    def run(self, step: MatchingStep, iterations: int) -> list[MatchingResult]:
        state, results = self.first(), []
        for seed in range(iterations):
            results.append(step(state, self.inputs(seed)[0]))
            state = results[-1].state
        return results

    def by_autograd(self, iterations: int) -> list[MatchingResult]:
        """The same through the public functions and torch's own differentiation of the loss."""
        state, results = self.first(), []
        for seed in range(iterations):
            inputs, aug_params = self.inputs(seed)
            start, target = inputs.start.to(self.device), inputs.target.to(self.device)
            images, lr, logits = (
                t.clone().requires_grad_() for t in (state.images, state.lr, state.logits)
            )
            labels = self.labels
            if self.learns_labels:
                labels = torch.cat([labels[: len(self.frozen)], logits.softmax(1)])
            end = pdd_fast.unroll(
                self.engine.net,
                start,
                torch.cat([self.frozen, images]),
                labels,
                lr,
                list(inputs.batches),
                aug_params,
                engine="fused" if isinstance(self.engine, FusedEngine) else "autograd",
                memory=self.memory,
                memory_limit=self.memory_limit,
                frozen=torch.arange(len(self.labels)) < len(self.frozen),
            )
            loss = pdd_fast.trajectory_matching_loss(end, start, target)
            grads = torch.autograd.grad(loss, [images, lr, logits], materialize_grads=True)
            updated = list[Tensor]()
            for name, gradient, update in zip(
                ("images", "lr", "logits"), grads, RATES, strict=True
            ):
                momentum_buffer = (
                    getattr(state, f"{name}_momentum_buffer") * UPDATE["momentum"] + gradient
                )
                updated += [
                    getattr(state, name) - UPDATE[update] * momentum_buffer,
                    momentum_buffer,
                ]
            state = MatchingState(*updated)
            results.append(MatchingResult(state, float(loss.detach()), float(state.lr), True))
        return results


def assert_same(found: list[MatchingResult], expected: list[MatchingResult]) -> None:
    for i, (one, other) in enumerate(zip(found, expected, strict=True)):
        assert one[1:] == other[1:], i
        for name, tensor in one.state._asdict().items():
            assert torch.equal(tensor, getattr(other.state, name)), (i, name)


CASES = {
    "plain": {},
    "kept activations": {"memory": "cache"},
    "activations kept up to a limit": {"memory": "auto", "keep": 2},
    "several operations": {"dsa": MULTIPLE},
    "no augmentation": {"dsa": None},
    "nothing frozen": {"frozen": 0, "learned": 7},
    "mostly frozen": {"frozen": 30, "learned": 2},
    "autograd": {"engine": "autograd"},
    "autograd, kept": {"engine": "autograd", "memory": "cache"},
    "autograd, kept up to a limit": {"engine": "autograd", "memory": "auto", "keep": 2},
    "float64": {"dtype": torch.float64},
    "soft labels": {"labels": "soft"},
    "learned labels": {"labels": "learned"},
    "learned labels, nothing frozen": {"labels": "learned", "frozen": 0, "dtype": torch.float64},
    "learned labels, autograd": {"labels": "learned", "engine": "autograd"},
}


@pytest.mark.parametrize("name", CASES)
def test_an_iteration_has_the_bits_of_autograds_route(name: str) -> None:
    case = Case(**CASES[name])
    assert_same(case.run(case.step(), 3), case.by_autograd(3))


@pytest.mark.usefixtures("composed")
@pytest.mark.parametrize("name", [name for name in CASES if "autograd" not in name])
def test_what_was_recorded_once_serves_new_draws(name: str) -> None:
    """The stand-in for a graph knows the operators of one iteration and nothing of Python; it
    refuses operators that make the host wait for a GPU.
    """
    case, recorder = Case(**CASES[name]), Recorder()
    with warnings.catch_warnings(action="error"):
        found = case.run(case.step(graph=True, backend=recorder), 5)
    assert recorder.asked == ["warm up", "capture"]
    fresh = []
    for seed in range(5):  # a new object for every iteration: nothing replayed
        before = fresh[-1].state if fresh else case.first()
        fresh.append(case.step(graph=True, backend=Recorder())(before, case.inputs(seed)[0]))
    assert_same(found, fresh)
    # Frozen images get a gradient here and none there, so the first layer's adjoint is a
    # convolution of other shapes.
    for one, other in zip(found, case.run(case.step(), 5), strict=True):
        assert (
            relative_error(one.state.images_momentum_buffer, other.state.images_momentum_buffer)
            <= 1e-5
        )


def test_what_cannot_be_recorded_goes_on_with_the_same_bits() -> None:
    """autograd's engine asks for random states; each iteration is still made once."""
    case = Case(engine="autograd", frozen=0)
    with pytest.warns(CaptureWarning):
        found = case.run(case.step(graph=True, backend=Recorder()), 4)
    assert_same(found, case.by_autograd(4))


def test_an_iteration_leaves_its_arguments_alone() -> None:
    case = Case()
    step, state, inputs = case.step(), case.first(), case.inputs(0)[0]
    first = step(state, inputs)
    kept = MatchingState(*(tensor.clone() for tensor in first.state))
    again = step(state, inputs)
    step(first.state, case.inputs(1)[0])
    assert_same([again], [first])
    assert_same([first], [first._replace(state=kept)])


def test_what_the_host_does_meanwhile_changes_nothing_and_stops_what_it_stops() -> None:
    case, seen = Case(), list[int]()
    step, state = case.step(), case.first()
    expected = case.by_autograd(1)
    assert_same([step(state, case.inputs(0)[0], meanwhile=lambda: seen.append(1))], expected)
    assert seen == [1]

    def interrupt() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        step(state, case.inputs(5)[0], meanwhile=interrupt)
    assert_same([step(state, case.inputs(0)[0])], expected)


def several(case: Case, seeds: tuple[int, ...]) -> MatchingInputs:
    """The inputs of these seeds as one iteration's."""
    every = [case.inputs(seed) for seed in seeds]
    aug_params = None
    if case.dsa is not None:
        aug_params = PackedAugmentParameters.of(
            [draw for _, drawn in every for draw in drawn or []]
        )
    start, target, batches = (
        torch.stack([getattr(i, name) for i, _ in every]) for name in ("start", "target", "batches")
    )
    return MatchingInputs(start, target, batches, aug_params)


SOME = [
    "plain",
    "nothing frozen",
    "several operations",
    "no augmentation",
    "autograd",
    "learned labels",
]


@pytest.mark.usefixtures("composed")
@pytest.mark.parametrize("name", SOME)
@pytest.mark.parametrize("recorded", [False, True])
def test_of_several_trajectories_the_mean_gradient_is_taken(name: str, recorded: bool) -> None:
    case = Case(**{"dtype": torch.float64} | CASES[name])
    graph: dict[str, Any] = (
        {"graph": True, "backend": Recorder()} if recorded and "autograd" not in name else {}
    )
    alone = [case.step(momentum=0.0)(case.first(), case.inputs(seed)[0]) for seed in (0, 1, 2, 3)]
    step = case.step(trajectories_per_step=2, momentum=0.0, **graph)
    for seeds in (
        (0, 1),
        (2, 3),
        (0, 3),
    ):  # a graph is made of the second and replayed with the third
        found, own = step(case.first(), several(case, seeds)), [alone[seed] for seed in seeds]
        assert found.loss == pytest.approx(sum(one.loss for one in own) / 2, rel=1e-12)
        for field in MatchingState._fields:
            mean = sum(getattr(one.state, field) for one in own) / 2
            assert relative_error(getattr(found.state, field), mean) <= 1e-12, field


def test_a_long_gradient_is_clipped_and_a_short_one_is_not() -> None:
    case = Case()
    free = case.step()(case.first(), case.inputs(0)[0])
    norm = float(free.state.images_momentum_buffer.norm())
    assert_same([case.step(max_grad_norm=1.01 * norm)(case.first(), case.inputs(0)[0])], [free])
    clipped = case.step(max_grad_norm=norm / 3)(case.first(), case.inputs(0)[0]).state
    torch.testing.assert_close(
        clipped.images_momentum_buffer, free.state.images_momentum_buffer / 3
    )
    torch.testing.assert_close(
        clipped.images, case.learned - UPDATE["lr_img"] * clipped.images_momentum_buffer
    )
    assert torch.equal(clipped.lr, free.state.lr)


@pytest.mark.parametrize("labels", ["hard", "learned"])
def test_a_shorter_update_is_one_at_smaller_rates(labels: str) -> None:
    case = Case(labels=labels)
    step, half = case.step(), case.step(**{name: UPDATE[name] / 2 for name in RATES})
    expected = half(case.first(), case.inputs(0)[0])
    assert_same([step(case.first(), case.inputs(0)[0], shorter=0.5)], [expected])
    assert_same(case.run(step, 2), case.by_autograd(2))  # and the next is as long as ever


def test_images_that_are_no_longer_finite_are_told() -> None:
    case = Case()
    result = case.step(lr_img=1e45)(case.first(), case.inputs(0)[0])
    assert not result.finite
    assert case.step()(case.first(), case.inputs(0)[0]).finite


def test_the_memory_of_a_step_goes_with_it() -> None:
    case = Case()
    step = case.step(graph=True, backend=Recorder())
    case.run(step, 3)
    held = weakref.ref(step._buffers)
    gc.disable()
    try:
        del step
        assert held() is None
    finally:
        gc.enable()


def test_learned_labels_start_as_they_are_given_and_stay_probabilities() -> None:
    case = Case(labels="learned", dtype=torch.float64)
    own = case.labels[len(case.frozen) :]
    torch.testing.assert_close(case.first().labels, own)
    assert bool(
        MatchingState.start(case.learned, 0.03, torch.eye(6).double()).logits.isfinite().all()
    )  # 0 is no end
    last = case.run(case.step(), 5)[-1].state
    torch.testing.assert_close(last.labels.sum(1), torch.ones(6, dtype=torch.float64))
    assert float((last.labels - own).abs().max()) > 1e-3


def test_labels_that_are_no_longer_finite_are_told() -> None:
    case = Case(labels="learned")
    assert not case.step(lr_label=1e45)(case.first(), case.inputs(0)[0]).finite


def test_classes_cannot_be_learned() -> None:
    with pytest.raises(
        ValueError,
        match=r"labels must be torch.float32 \[m \+ n, classes\] to be learned, got torch.int64",
    ):
        Case().step(learn_labels=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "MatchingStep: steps must be at least 1, got 0"),
        ({"batch": 11}, r"MatchingStep: batch must lie in \[1, 10\], got 11"),
        ({"memory": "disk"}, "MatchingStep: memory must be recompute or cache or auto, got 'disk'"),
        (
            {"memory": "auto", "memory_limit": -1},
            "MatchingStep: memory_limit must be at least 0, got -1",
        ),
        ({"operations": -1}, "MatchingStep: operations must be at least 0, got -1"),
        (
            {"trajectories_per_step": 0},
            "MatchingStep: trajectories_per_step must be at least 1, got 0",
        ),
        ({"max_grad_norm": -0.5}, "MatchingStep: max_grad_norm must be at least 0, got -0.5"),
    ],
)
def test_options_that_cannot_be_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Case().step(**options)


def test_there_must_be_something_to_learn() -> None:
    case = Case()
    with pytest.raises(ValueError, match="labels must be more than the 4 frozen images, got 4"):
        MatchingStep(case.engine, case.labels[:4], case.frozen, steps=1, batch=1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"start": torch.zeros(3)}, r"start must have shape \(\d+,\), got \(3,\)"),
        (
            {"batches": torch.zeros(STEPS, 2, dtype=torch.int64)},
            r"batches must have shape \(4, 5\), got \(4, 2\)",
        ),
        ({"batches": torch.zeros(STEPS, BATCH)}, "batches must be torch.int64, got torch.float32"),
        (
            {"batches": torch.full((STEPS, BATCH), 10)},
            r"batches must hold indices in \[0, 10\), got 10..10",
        ),
        ({"aug_params": None}, "aug_params must be given where operations is not 0"),
        (
            {"aug_params": PackedAugmentParameters.of([SINGLE.sample(3, SIZE)])},
            "aug_params must be of 20 images, got 3",
        ),
        (
            {"aug_params": PackedAugmentParameters.of([MULTIPLE.sample(20, SIZE)])},
            "aug_params must apply at most 1 operations, got 3",
        ),
        (
            {
                "aug_params": PackedAugmentParameters.of(
                    [pdd_fast.DSA("cutout", cutout=0.2).sample(20, SIZE)]
                )
            },
            r"aug_params must have cutout_size \(4, 4\), got \(2, 1\)",
        ),
    ],
)
def test_inputs_that_do_not_fit_are_named(change: dict[str, Any], message: str) -> None:
    case = Case()
    with pytest.raises(ValueError, match=message):
        case.step()(case.first(), case.inputs(0)[0]._replace(**change))


# ---- the base method ----


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
    frozen, config = len(case.frozen), replace(Config(), **settings)
    learned, learned_labels = case.learned, case.labels[frozen:]
    split = Split(learned, learned_labels)
    data = ImageData("none", tuple("abc"), split, 1, split, Normalization((0.0,) * 3, (1.0,) * 3))
    ctx = RunContext(config, device, data, engine, SINGLE, 1)
    union = UnionSet(
        case.frozen, case.labels[:frozen], torch.ones(frozen, dtype=torch.int64), [0.1]
    )
    return StageProblem(ctx, 2, None, union, list_trajectories(folder), learned, learned_labels)


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
    assert message.startswith("stage 2, iteration 2: cpu is out of memory, at ")
    assert message.endswith("; lower inner_batch (now 5) or width (now 6), or set memory=recompute")
    assert same_state(method.state(), before)


def kept(method: TrajectoryMatching) -> int:
    return method._step._buffers.specs[0].keep


def test_how_many_steps_a_run_keeps_does_not_depend_on_what_is_free(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It decides how the gradient is rounded, and a continued run has the bits of one that was not
    stopped.
    """
    size = Case().engine.kept_bytes(engines.PassShape(BATCH, (3, *SIZE), torch.float32, CPU))

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


# ---- on a GPU ----


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
