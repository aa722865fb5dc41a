"""One iteration of trajectory matching: the bits of autograd's route, fresh or replayed, and a
state that is never half of one."""

from __future__ import annotations

import gc
import warnings
import weakref
from typing import Any

import pytest
import torch
from cases import relative_error
from mtt_support import (
    BATCH,
    CASES,
    MULTIPLE,
    RATES,
    SINGLE,
    SIZE,
    STEPS,
    UPDATE,
    Case,
    assert_same,
)
from recorder import Recorder

import pdd_fast
from pdd_fast.augmentation.parameters import PackedAugmentParameters
from pdd_fast.methods.mtt.inputs import MatchingInputs
from pdd_fast.methods.mtt.settings import MatchingSettings
from pdd_fast.methods.mtt.step import MatchingState, MatchingStep
from pdd_fast.training.cuda_graphs import CaptureWarning


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
        ({"steps": 0}, "MatchingSettings: steps must be at least 1, got 0"),
        ({"batch": 0}, "MatchingSettings: batch must be at least 1, got 0"),
        ({"batch": 11}, r"MatchingStep: batch must lie in \[1, 10\], got 11"),
        (
            {"memory": "disk"},
            "MatchingSettings: memory must be recompute or cache or auto, got 'disk'",
        ),
        (
            {"memory": "auto", "memory_limit": -1},
            "MatchingSettings: memory_limit must be at least 0, got -1",
        ),
        ({"operations": -1}, "MatchingSettings: operations must be at least 0, got -1"),
        (
            {"trajectories_per_step": 0},
            "MatchingSettings: trajectories_per_step must be at least 1, got 0",
        ),
        ({"max_grad_norm": -0.5}, "MatchingSettings: max_grad_norm must be at least 0, got -0.5"),
    ],
)
def test_options_that_cannot_be_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Case().step(**options)


def test_there_must_be_something_to_learn() -> None:
    case = Case()
    with pytest.raises(ValueError, match="labels must be more than the 4 frozen images, got 4"):
        MatchingStep(case.engine, case.labels[:4], case.frozen, MatchingSettings(steps=1, batch=1))


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
