"""Experts: what is stored, and that a trajectory does not show whether it was made in one go."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from experts_support import (
    EPOCHS,
    EXPERTS,
    Interrupted,
    Recorder,
    configuration,
    contents,
    interrupt,
    made,
    starting,
)
from torch import Tensor

from pdd_fast.networks.parameters import flatten_parameters
from pdd_fast.progressive import recording
from pdd_fast.progressive.context import RunContext
from pdd_fast.progressive.experts import make_experts
from pdd_fast.progressive.recording import keep_starts, record_trajectories
from pdd_fast.runtime.errors import RunError, UsageError
from pdd_fast.runtime.progress import SILENT
from pdd_fast.storage.run import Run
from pdd_fast.storage.trajectories import (
    Trajectory,
    list_trajectories,
    partial_path,
    trajectory_path,
)
from pdd_fast.training.sgd import Loop, Sgd, TrainState, accuracies


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return made(tmp_path_factory.mktemp("experts") / "run", configuration())


# ---- what is stored ----


def test_there_is_a_file_for_every_expert_and_nothing_else(finished: Run) -> None:
    names = ["trajectory-000.safetensors", "trajectory-001.safetensors"]
    assert sorted(path.name for path in finished.experts_dir.iterdir()) == names


def test_a_file_says_what_it_holds(finished: Run, ctx: RunContext) -> None:
    count = flatten_parameters(ctx.engine.net).numel()
    for number, trajectory in enumerate(list_trajectories(finished.experts_dir)):
        assert (trajectory.epochs, trajectory.parameters) == (EPOCHS, count)
        last = trajectory.checkpoint(EPOCHS)
        assert last.dtype == torch.float32
        validation = ctx.data.validation
        (reached,) = accuracies(ctx.engine, last[None], validation.images, validation.labels)
        expected = {
            "network": ctx.network,
            "data": "digits",
            "seed": 0,
            "index": number,
            "purpose": "expert",
        }
        expected |= {"whitening": "none", "normalization": ctx.data.normalization.to_dict()}
        expected |= {"fingerprint": ctx.data.fingerprint, "classes": list("0123456789")}
        assert trajectory.metadata == expected | {"selection_accuracy": round(reached, 2)}
        assert trajectory.metadata["network"]["width"] == 4


def test_checkpoint_0_is_the_start_and_every_expert_has_its_own(
    finished: Run, ctx: RunContext
) -> None:
    first, second = (
        trajectory.checkpoint(0) for trajectory in list_trajectories(finished.experts_dir)
    )
    assert torch.equal(first, ctx.initial_parameters("expert", 0))
    assert torch.equal(second, ctx.initial_parameters("expert", 1))
    assert not torch.equal(first, second)


def test_every_epoch_can_be_made_again_from_the_one_before(finished: Run, ctx: RunContext) -> None:
    for number, trajectory in enumerate(list_trajectories(finished.experts_dir)):
        train_state, train = TrainState.start(trajectory.checkpoint(0)[None]), ctx.data.train
        loop = Loop(ctx.real_sgd, train_state, train.images, train.labels)
        for epoch in range(EPOCHS):
            loop.epoch(ctx.settings.expert_lr, [ctx.generator("expert", number, epoch)])
            assert torch.equal(train_state.theta[0], trajectory.checkpoint(epoch + 1))
        assert (
            float(train_state.momentum_buffer.norm()) > 0
        )  # so the interrupted runs below have a momentum to lose


def test_checkpoints_are_copies_of_what_training_goes_on_to_change(
    ctx: RunContext, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If one shared memory with another or with the network, it would hold the last epoch too."""
    written: list[list[Tensor]] = []

    def keep(path: Path, checkpoints: list[Tensor], metadata: dict[str, Any]) -> None:
        written.append(checkpoints)

    monkeypatch.setattr(recording, "write_trajectory", keep)
    starts = [starting(ctx)(range(k, k + 1)) for k in range(EXPERTS)]
    kept = [start.clone() for start in starts]
    record_trajectories(ctx, tmp_path, lambda group: starts[group[0]], EPOCHS, "expert", SILENT, "")
    for start, copy, checkpoints in zip(starts, kept, written, strict=True):
        assert torch.equal(start, copy)
        assert torch.equal(checkpoints[0], copy[0])
        assert len({checkpoint.data_ptr() for checkpoint in [start, *checkpoints]}) == EPOCHS + 2
        for before, after in pairwise(checkpoints):
            assert not torch.equal(before, after)


def test_the_validation_images_are_not_trained_on(ctx: RunContext, tmp_path: Path) -> None:
    images = ctx.data.validation.images
    kept = images.clone()
    try:
        images.zero_()
        record_trajectories(ctx, tmp_path, starting(ctx), EPOCHS, "expert", SILENT, "")
    finally:
        images.copy_(kept)
    other = made(tmp_path / "run", configuration())
    for found, expected in zip(
        list_trajectories(tmp_path), list_trajectories(other.experts_dir), strict=True
    ):
        assert torch.equal(found.checkpoint(EPOCHS), expected.checkpoint(EPOCHS))
        assert found.metadata["selection_accuracy"] != expected.metadata["selection_accuracy"]


def test_the_papers_choice_trains_on_all_training_images(ctx: RunContext, tmp_path: Path) -> None:
    paper = RunContext.prepare(configuration(selection_split="test", num_experts=1))
    record_trajectories(paper, tmp_path, starting(ctx), 1, "expert", SILENT, "")
    train, validation = ctx.data.train, ctx.data.validation
    images, labels = (
        torch.cat([train.images, validation.images]),
        torch.cat([train.labels, validation.labels]),
    )
    train_state = ctx.initial_state("expert", [0])
    Loop(ctx.real_sgd, train_state, images, labels).epoch(
        ctx.settings.expert_lr, [ctx.generator("expert", 0, 0)]
    )
    trajectory = Trajectory(trajectory_path(tmp_path, 0))
    assert torch.equal(trajectory.checkpoint(1), train_state.theta[0])
    (reached,) = accuracies(
        ctx.engine, train_state.theta, ctx.data.test.images, ctx.data.test.labels
    )
    assert trajectory.metadata["selection_accuracy"] == round(reached, 2)


def test_some_rows_are_trained_on_as_a_set_of_their_own_and_not_copied(
    ctx: RunContext, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, seen = torch.arange(len(ctx.train))[::3], []

    def spy(sgd: Sgd, train_state: TrainState, images: Tensor, *rest: Any, **options: Any) -> Loop:
        seen.append(images.data_ptr())
        return Loop(sgd, train_state, images, *rest, **options)

    monkeypatch.setattr(recording, "Loop", spy)
    record_trajectories(ctx, tmp_path, starting(ctx), 1, "expert", SILENT, "", rows)
    assert set(seen) == {ctx.train.images.data_ptr()}
    train_state = ctx.initial_state("expert", [0])
    loop = Loop(ctx.real_sgd, train_state, ctx.train.images[rows], ctx.train.labels[rows])
    loop.epoch(ctx.settings.expert_lr, [ctx.generator("expert", 0, 0)])
    assert torch.equal(Trajectory(trajectory_path(tmp_path, 0)).checkpoint(1), train_state.theta[0])


def test_seed_and_purpose_change_the_trajectories(
    finished: Run, ctx: RunContext, tmp_path: Path
) -> None:
    expected = Trajectory(trajectory_path(finished.experts_dir, 0))
    other_seed = made(tmp_path / "seed", configuration(seed=1))
    assert not torch.equal(
        Trajectory(trajectory_path(other_seed.experts_dir, 0)).checkpoint(0), expected.checkpoint(0)
    )
    folder = tmp_path / "purpose"
    record_trajectories(
        ctx, folder, lambda group: expected.checkpoint(0)[None], 1, "transition", SILENT, ""
    )
    found = Trajectory(trajectory_path(folder, 0))
    assert torch.equal(found.checkpoint(0), expected.checkpoint(0))
    assert not torch.equal(found.checkpoint(1), expected.checkpoint(1))


def test_experts_learn(finished: Run) -> None:
    for trajectory in list_trajectories(finished.experts_dir):
        assert trajectory.metadata["selection_accuracy"] > 20  # ten classes: guessing reaches 10


# ---- interruptions ----


@pytest.mark.parametrize("limit", [1, 3, EPOCHS, EPOCHS + 2, 2 * EPOCHS])
def test_a_trajectory_does_not_show_an_interruption(
    finished: Run, tmp_path: Path, limit: int
) -> None:
    run = interrupt(tmp_path / "run", configuration(), limit)
    assert len(list(run.experts_dir.glob("*.safetensors"))) == (limit - 1) // EPOCHS
    make_experts(Run.open(run.path))
    assert contents(run.experts_dir) == contents(finished.experts_dir)


def test_a_trajectory_does_not_show_an_interruption_after_every_epoch(
    finished: Run, tmp_path: Path
) -> None:
    run = Run.create(tmp_path / "run", configuration())
    interruptions = 0
    while True:
        # The epoch that is reported last is not saved yet: two an attempt are the least that get
        # on.
        recorder = Recorder(2)
        try:
            make_experts(run, recorder)
            break
        except Interrupted:
            interruptions += 1
            assert interruptions < 2 * EXPERTS * EPOCHS
    assert interruptions > EPOCHS
    assert contents(run.experts_dir) == contents(finished.experts_dir)


def test_finished_epochs_are_not_trained_again(tmp_path: Path) -> None:
    run = interrupt(
        tmp_path / "run", configuration(), limit=EPOCHS + 3
    )  # the second expert, two epochs saved
    assert [path.name for path in run.experts_dir.glob("*.partial")] == [
        partial_path(run.experts_dir, 1).name
    ]
    recorder = Recorder()
    make_experts(run, recorder)
    assert recorder.totals == [(EXPERTS * EPOCHS, EPOCHS)]
    assert recorder.epochs == 2
    assert sum(recorder.advances) == EPOCHS  # a bar that starts at `done` ends at its total
    assert [value["network"] for value in recorder.values if "network" in value] == [2, 2]


def test_work_is_saved_only_as_often_as_was_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]

    def tick() -> float:
        now[0] += 0.2  # two readings an epoch, three where it is saved
        return now[0]

    monkeypatch.setattr(recording, "time", SimpleNamespace(monotonic=tick))
    saved: list[int] = []
    write = recording.write_partial

    def remember(folder: Path, k: int, checkpoints: list[Tensor], state: dict[str, Tensor]) -> None:
        saved.append(len(checkpoints) - 1)
        write(folder, k, checkpoints, state)

    monkeypatch.setattr(recording, "write_partial", remember)
    made(tmp_path / "often", configuration(num_experts=1))
    assert saved == [1, 2, 3]  # after the last epoch the trajectory itself is written
    saved.clear()
    made(tmp_path / "seldom", configuration(num_experts=1, checkpoint_seconds=0.3))
    assert saved == [2]
    saved.clear()
    made(tmp_path / "never", configuration(num_experts=1, checkpoint_seconds=1e9))
    assert saved == []


def test_existing_experts_are_not_trained_again(
    finished: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run.create(tmp_path / "run", configuration())
    run.experts_dir.mkdir()
    kept = trajectory_path(run.experts_dir, 0)
    kept.write_bytes(trajectory_path(finished.experts_dir, 0).read_bytes())
    before = kept.stat().st_mtime_ns
    recorder = Recorder()
    make_experts(run, recorder)
    assert recorder.epochs == EPOCHS
    assert kept.stat().st_mtime_ns == before
    assert contents(run.experts_dir) == contents(finished.experts_dir)

    def refuse(*_: object) -> None:
        raise AssertionError("an expert was trained again")

    monkeypatch.setattr(Loop, "epoch", refuse)
    recorder = Recorder()
    make_experts(run, recorder)
    assert recorder.totals == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"width": 5}, "network must be .*'width': 5.*, got .*'width': 4"),
        ({"expert_train_epochs": EPOCHS + 1}, f"epochs must be {EPOCHS + 1} .*, got {EPOCHS}"),
    ],
)
def test_experts_of_another_run_that_do_not_fit_are_named(
    finished: Run, tmp_path: Path, changes: dict[str, int], message: str
) -> None:
    run = Run.create(tmp_path / "run", configuration(**changes))
    run.experts_dir.mkdir()
    foreign = trajectory_path(run.experts_dir, 0)
    foreign.write_bytes(trajectory_path(finished.experts_dir, 0).read_bytes())
    with pytest.raises(UsageError, match=f"trajectory-000.safetensors: {message}"):
        make_experts(run)
    assert sorted(run.experts_dir.iterdir()) == [foreign]


def test_a_kill_between_the_last_two_writes_leaves_nothing_behind(
    finished: Run, tmp_path: Path
) -> None:
    run = Run.create(tmp_path / "run", configuration())
    run.experts_dir.mkdir()
    for number in range(EXPERTS):
        path = trajectory_path(run.experts_dir, number)
        path.write_bytes(trajectory_path(finished.experts_dir, number).read_bytes())
    partial_path(run.experts_dir, 1).write_bytes(b"what was saved before")
    make_experts(run)
    assert contents(run.experts_dir) == contents(finished.experts_dir)


def test_a_damaged_partial_file_is_named(tmp_path: Path) -> None:
    run = interrupt(tmp_path / "run", configuration(), limit=3)
    path = partial_path(run.experts_dir, 0)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(UsageError, match=path.name):
        make_experts(run)


@pytest.mark.parametrize("together", [1, 2])
def test_an_expert_that_diverges_is_named_at_once_and_not_stored(
    together: int, tmp_path: Path
) -> None:
    run = Run.create(tmp_path / "run", configuration(expert_lr=1e30, side_by_side=together))
    recorder = Recorder()
    with pytest.raises(
        RunError,
        match=r"^experts: network 1 diverged in epoch 1, .*; lower expert_lr \(now 1e\+30\)$",
    ):
        make_experts(run, recorder)
    assert recorder.epochs == 0
    assert not list(run.experts_dir.iterdir())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("function", ["record", "keep"])
def test_a_start_that_diverged_is_named_before_its_trajectory(
    value: float, function: str, ctx: RunContext, tmp_path: Path
) -> None:
    def start(group: range) -> Tensor:
        theta = ctx.initial_state("expert", group).theta
        theta[:, 3] = value if group[0] == 1 else 0.0
        return theta

    def make() -> None:
        if function == "record":
            record_trajectories(ctx, tmp_path, start, 2, "stage-2", SILENT, "stage 2")
        else:
            keep_starts(ctx, tmp_path, start, SILENT, "stage 2")

    said = (
        r"^stage 2: network 2 diverged on the images of the stages before, .*; lower "
        r"inner_lr or lr_lr$"
    )
    with pytest.raises(RunError, match=said):
        make()
    assert not trajectory_path(tmp_path, 1).exists()
    assert not partial_path(tmp_path, 1).exists()


def test_two_processes_do_not_train_in_one_run(tmp_path: Path) -> None:
    run = Run.create(tmp_path / "run", configuration())
    with run.lock(), pytest.raises(UsageError, match="is in use by another process"):
        make_experts(Run.open(run.path))
    assert not run.experts_dir.exists()
