"""Experts: what is stored, and that a trajectory does not show whether it was made in one go."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from experts_support import (
    EPOCHS,
    Interrupted,
    Recorder,
    configuration,
    contents,
    interrupt,
    made,
    starting,
)
from torch import Tensor

from pdd_fast.progressive import recording
from pdd_fast.progressive.context import RunContext
from pdd_fast.progressive.experts import make_experts
from pdd_fast.progressive.recording import keep_starts, record_trajectories, stored_start
from pdd_fast.runtime.errors import UsageError
from pdd_fast.runtime.progress import SILENT
from pdd_fast.settings import Settings
from pdd_fast.storage.run import Run
from pdd_fast.storage.trajectories import list_trajectories, partial_path, trajectory_path
from pdd_fast.training.sgd import Loop

MANY = 5  # experts, in groups of three and two


def grouped(**changes: Any) -> Settings:
    return configuration(**({"num_experts": MANY, "side_by_side": 3} | changes))


@pytest.fixture(scope="module")
def finished_in_groups(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return made(tmp_path_factory.mktemp("groups") / "run", grouped())


# ---- groups ----


def test_experts_are_trained_in_groups_that_stay_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    epoch = Loop.epoch

    def remember(self: Loop, lr: float, generators: list[torch.Generator]) -> None:
        seen.append(len(generators))
        epoch(self, lr, generators)

    monkeypatch.setattr(Loop, "epoch", remember)
    recorder = Recorder()
    made(tmp_path / "run", grouped(), recorder)
    assert seen == [3] * EPOCHS + [2] * EPOCHS
    assert recorder.totals == [(MANY * EPOCHS, 0)]
    assert sum(recorder.advances) == MANY * EPOCHS
    assert [v["network"] for v in recorder.values if "network" in v] == ["1-3"] * EPOCHS + [
        "4-5"
    ] * EPOCHS


def test_experts_in_groups_are_those_trained_alone(finished_in_groups: Run, tmp_path: Path) -> None:
    """To the bit: each has its own start, order and augmentation parameters."""
    alone = made(tmp_path / "run", configuration(num_experts=MANY))
    for one, other in zip(
        list_trajectories(finished_in_groups.experts_dir),
        list_trajectories(alone.experts_dir),
        strict=True,
    ):
        assert torch.equal(one.checkpoint(0), other.checkpoint(0))
        assert one.metadata["index"] == other.metadata["index"]
        assert torch.equal(one.checkpoint(EPOCHS), other.checkpoint(EPOCHS))


@pytest.mark.parametrize("limit", range(1, 2 * EPOCHS + 1))
def test_a_group_does_not_show_an_interruption(
    finished_in_groups: Run, tmp_path: Path, limit: int
) -> None:
    """After the ``limit``-th epoch of the eight that two groups take."""
    run = interrupt(tmp_path / "run", grouped(), limit)
    assert len(list(run.experts_dir.glob("*.safetensors"))) == 3 * ((limit - 1) // EPOCHS)
    make_experts(Run.open(run.path))
    assert contents(run.experts_dir) == contents(finished_in_groups.experts_dir)


@pytest.mark.parametrize("written", [1, 2, 3, 4])
def test_a_stop_between_the_files_of_a_group_leaves_no_trace(
    finished_in_groups: Run, tmp_path: Path, written: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run.create(tmp_path / "run", grouped())
    count, times = 0, {}
    write = recording.write_trajectory

    def stop(path: Path, checkpoints: list[Tensor], metadata: dict[str, Any]) -> None:
        nonlocal count
        if count == written:
            raise Interrupted
        count += 1
        write(path, checkpoints, metadata)
        times[path] = path.stat().st_mtime_ns

    with monkeypatch.context() as patch:
        patch.setattr(recording, "write_trajectory", stop)
        with pytest.raises(Interrupted):
            make_experts(run)
    assert list(run.experts_dir.glob("*.partial")) == [
        partial_path(run.experts_dir, written // 3 * 3)
    ]
    recorder = Recorder()
    make_experts(Run.open(run.path), recorder)
    assert contents(run.experts_dir) == contents(finished_in_groups.experts_dir)
    assert {
        path: path.stat().st_mtime_ns for path in times
    } == times  # nothing finished is written again
    assert recorder.totals == [(MANY * EPOCHS, written * EPOCHS)]
    assert sum(recorder.advances) == (MANY - written) * EPOCHS


def test_a_group_that_lacks_one_is_trained_again_and_the_one_written(
    finished_in_groups: Run, tmp_path: Path
) -> None:
    run = Run.create(tmp_path / "run", grouped())
    run.experts_dir.mkdir()
    for k in (0, 2, 3, 4):
        path = trajectory_path(run.experts_dir, k)
        path.write_bytes(trajectory_path(finished_in_groups.experts_dir, k).read_bytes())
    recorder = Recorder()
    make_experts(run, recorder)
    assert contents(run.experts_dir) == contents(finished_in_groups.experts_dir)
    assert recorder.totals == [(MANY * EPOCHS, 4 * EPOCHS)]
    assert [v["network"] for v in recorder.values if "network" in v] == [2] * EPOCHS


def test_work_of_a_group_of_another_size_is_begun_again(
    finished_in_groups: Run, tmp_path: Path
) -> None:
    """As where a run goes on on another device. What groups of another size finished is kept."""
    run = interrupt(tmp_path / "run", configuration(num_experts=MANY), limit=EPOCHS + 3)
    assert [path.name for path in run.experts_dir.glob("*.partial")] == ["trajectory-001.partial"]
    first = trajectory_path(run.experts_dir, 0).read_bytes()
    make_experts(Run(run.path, grouped()))
    expected = contents(finished_in_groups.experts_dir)
    found = contents(run.experts_dir)
    assert found.pop("trajectory-000.safetensors") == first
    del expected["trajectory-000.safetensors"]
    assert found == expected

    other = interrupt(tmp_path / "other", grouped(), limit=3)
    assert [path.name for path in other.experts_dir.glob("*.partial")] == ["trajectory-000.partial"]
    make_experts(Run(other.path, configuration(num_experts=MANY)))
    alone = made(tmp_path / "alone", configuration(num_experts=MANY))
    assert contents(other.experts_dir) == contents(alone.experts_dir)


# ---- starts that are kept before the first epoch ----


def test_starts_that_were_kept_leave_no_trace(finished_in_groups: Run, tmp_path: Path) -> None:
    ctx, asked = RunContext.prepare(grouped()), list[range]()

    def start(group: range) -> Tensor:
        asked.append(group)
        return starting(ctx)(group)

    recorder = Recorder()
    for _ in range(2):
        keep_starts(ctx, tmp_path, start, recorder, "")
    assert asked == [range(3), range(3, 5)]
    assert (recorder.totals, recorder.advances) == ([(MANY, 0)], [3, 2])
    assert list(contents(tmp_path)) == ["trajectory-000.partial", "trajectory-003.partial"]
    kept = [stored_start(ctx, tmp_path, k) for k in range(MANY)]
    record_trajectories(ctx, tmp_path, start, EPOCHS, "expert", SILENT, "")
    assert len(asked) == 2
    assert contents(tmp_path) == contents(finished_in_groups.experts_dir)
    for k in range(MANY):
        assert torch.equal(kept[k], ctx.initial_state("expert", [k]).theta[0])
        assert torch.equal(stored_start(ctx, tmp_path, k), kept[k])
    keep_starts(ctx, tmp_path, start, recorder, "")
    assert len(recorder.totals) == 1


def test_starts_of_finished_trajectories_are_not_made_again(
    finished_in_groups: Run, tmp_path: Path
) -> None:
    ctx, asked = RunContext.prepare(grouped()), list[range]()
    for k in range(3):
        path = trajectory_path(finished_in_groups.experts_dir, k)
        (tmp_path / path.name).write_bytes(path.read_bytes())

    def start(group: range) -> Tensor:
        asked.append(group)
        return starting(ctx)(group)

    recorder = Recorder()
    keep_starts(ctx, tmp_path, start, recorder, "")
    assert asked == [range(3, 5)]
    assert (recorder.totals, recorder.advances) == ([(MANY, 3)], [2])


def test_starts_of_groups_of_another_size_are_made_again(tmp_path: Path) -> None:
    """As where a run goes on on another device."""
    alone, together = (
        RunContext.prepare(configuration(num_experts=MANY)),
        RunContext.prepare(grouped()),
    )
    keep_starts(alone, tmp_path, starting(alone), SILENT, "")
    keep_starts(together, tmp_path, starting(together), SILENT, "")
    for k in range(MANY):
        assert torch.equal(
            stored_start(together, tmp_path, k), together.initial_state("expert", [k]).theta[0]
        )
    record_trajectories(together, tmp_path, starting(together), EPOCHS, "expert", SILENT, "")
    assert not list(tmp_path.glob("*.partial"))


def test_a_start_that_is_not_there_is_named(tmp_path: Path) -> None:
    ctx = RunContext.prepare(grouped())
    with pytest.raises(UsageError, match=r"trajectory-003\.partial does not exist"):
        stored_start(ctx, tmp_path, 4)
