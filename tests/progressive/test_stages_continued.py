"""The stages: what they make, that a run can be stopped anywhere, and that stopping leaves no trace
in the result."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from stages_support import configuration, measured
from stopping import Stopped, Stopper, bytes_of

from pdd_fast.progressive.context import RunContext
from pdd_fast.progressive.stages import distill
from pdd_fast.runtime.errors import RunError, UsageError
from pdd_fast.runtime.progress import SILENT, Task
from pdd_fast.storage.run import Metrics, Run
from pdd_fast.storage.trajectories import Trajectory, list_trajectories


def test_starts_that_were_trained_are_not_trained_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three networks; stops after the second start, then in the second's real epochs."""
    changes = {
        "filter": "learned",
        "num_experts": 3,
        "stages": 2,
        "ipc": 2,
        "checkpoint_seconds": 1000,
    }
    run, trained = Run.create(tmp_path / "run", configuration(**changes)), list[int]()
    generator = RunContext.generator

    def noting(self: RunContext, *purpose: str | int) -> torch.Generator:
        if purpose[0] == "transition":
            trained.append(int(purpose[2]))
        return generator(self, *purpose)

    monkeypatch.setattr(RunContext, "generator", noting)

    class During(Stopper):
        """Stops at the ``limit``-th report of one task."""

        def __init__(self, name: str, limit: int) -> None:
            super().__init__()
            self.name, self.at = name, limit

        @contextmanager
        def task(self, name: str, total: int, unit: str, done: int = 0) -> Iterator[Task]:
            self.limit = self.count + self.at if name == self.name else None
            with super().task(name, total, unit, done) as task:
                yield task

    with pytest.raises(Stopped):
        distill(run, During("start networks of stage 2/2", 2))
    assert trained == [0, 1]
    with pytest.raises(Stopped):
        distill(run, During("transition to stage 2/2", run.settings.transition_real_epochs + 4))
    assert len(list(run.stage_trajectories_dir(2).glob("*.safetensors"))) == 1
    distill(run)
    assert trained == [0, 1, 2]


@pytest.mark.parametrize("engine", ["fused", "composed"], indirect=True)
@pytest.mark.usefixtures("engine")
def test_networks_side_by_side_are_those_one_at_a_time(tmp_path: Path) -> None:
    """To the bit. No image moves (lr_img and lr_lr 0), so that stage 2 starts from the same
    union.
    """
    found = []
    for together in (1, 3):
        config = configuration(
            num_experts=4,
            stages=2,
            ipc=2,
            lr_img=0,
            lr_lr=0,
            eval_networks=4,
            side_by_side=together,
        )
        run = Run.create(tmp_path / f"{together}", config)
        distill(run)
        found.append(run)
    alone, beside = (list_trajectories(run.stage_trajectories_dir(2)) for run in found)
    for k in range(4):
        for epoch in (0, alone[k].epochs):
            assert torch.equal(alone[k].checkpoint(epoch), beside[k].checkpoint(epoch))
    scores = [
        [row["selection_accuracy"] for row in run.metrics.read() if "selection_accuracy" in row]
        for run in found
    ]
    assert scores[0] == scores[1]


def test_stopped_again_and_again_gives_the_same_bytes(
    finished: tuple[Run, int], tmp_path: Path
) -> None:
    run, _ = finished
    stopped = Run.create(tmp_path / "run", configuration(checkpoint_seconds=0))
    for _ in range(200):
        try:
            distill(Run.open(stopped.path), Stopper(3))
            break
        except Stopped:
            continue
    assert bytes_of(stopped) == bytes_of(run)
    assert measured(stopped) == measured(run)


def start_in_background(folder: Path, **changes: Any) -> subprocess.Popen[bytes]:
    main = "import sys; from pdd_fast.cli.main import main; main(sys.argv[1:])"
    flags = tiny.flags(**changes)
    return subprocess.Popen(
        [sys.executable, "-c", main, "distill", "--run-dir", str(folder), *flags],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def test_killed_in_the_middle_of_stage_two_and_resumed_gives_the_same_bytes(tmp_path: Path) -> None:
    # Iterations enough that the kill hits one of them; each is saved.
    changes = {"stages": 2, "ipc": 2, "iterations": 60, "eval_every": 20, "checkpoint_seconds": 0}
    whole = Run.create(tmp_path / "whole", configuration(**changes))
    distill(whole)
    killed = tmp_path / "killed"
    process = start_in_background(killed, **changes)
    metrics, deadline = killed / "metrics.jsonl", time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        if metrics.exists() and '"stage": 2, "iteration": 2' in metrics.read_text():
            break
        time.sleep(0.005)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert not (killed / "distilled.safetensors").exists()
    assert (killed / "stage-2" / "checkpoint.safetensors").exists()
    distill(Run.open(killed))
    assert bytes_of(Run.open(killed)) == bytes_of(whole)


def test_a_finished_run_is_left_alone(finished: tuple[Run, int]) -> None:
    run, _ = finished
    before, counter = bytes_of(run), Stopper()
    distill(Run.open(run.path), counter)
    assert counter.count == 0
    assert bytes_of(run) == before


def test_two_processes_keep_out_of_one_directory(finished: tuple[Run, int]) -> None:
    run, _ = finished
    with run.lock(), pytest.raises(UsageError, match="in use by another process"):
        distill(Run.open(run.path))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lr_img": 1e30}, r"stage 1, iteration \d+: .*lr_img \(now 1e\+30\)"),
        ({"lr_lr": 1e6}, r"stage 1, iteration \d+: .*lr_lr \(now 1e\+06\)"),
        # A rate so large that the loss wants less of it, and a step that takes it below zero.
        (
            {"lr_lr": 1e3, "inner_lr": 0.5},
            r"stage 1, iteration 1: the learned inner rate became -.*lr_lr \(now 1000\)",
        ),
    ],
)
def test_a_run_that_diverges_says_so_and_keeps_what_it_had(
    changes: dict[str, float], message: str, tmp_path: Path
) -> None:
    run = Run.create(tmp_path / "run", configuration(max_rollbacks=0, **changes))
    with pytest.raises(RunError, match=message):
        distill(run)
    assert len(list_trajectories(run.experts_dir)) == 2
    tensors, _ = run.load_checkpoint(1) or ({}, {})
    assert torch.isfinite(tensors["method.images"]).all()
    assert float(tensors["method.lr"]) > 0


def test_more_images_than_a_class_has_are_refused_before_any_work(tmp_path: Path) -> None:
    run = Run.create(tmp_path / "run", configuration(ipc=200))
    with pytest.raises(UsageError, match=r"ipc must be at most .*, got 200: class '\d' has \d+"):
        distill(run)
    assert not run.experts_dir.exists()


def test_an_uneven_split_gives_the_earlier_stages_more(tmp_path: Path) -> None:
    run = Run.create(tmp_path / "run", configuration(ipc=5, iterations=1))
    found = distill(run)
    assert [len(found.subset(s)) for s in (1, 2, 3)] == [20, 20, 10]
    assert [len(found.union(s)) for s in (1, 2, 3)] == [20, 40, 50]


def test_one_stage_is_plain_trajectory_matching(tmp_path: Path) -> None:
    run = Run.create(tmp_path / "run", configuration(stages=1))
    reporter = Stopper()
    found = distill(run, reporter)
    assert reporter.tasks == ["experts", "stage 1/1"]
    assert found.stages == 1


def test_both_engines_and_both_memories_learn_the_same_images(tmp_path: Path) -> None:
    found = {}
    for engine in ("fused", "autograd"):
        for memory in ("recompute", "cache"):
            run = Run.create(
                tmp_path / f"{engine}-{memory}",
                configuration(engine=engine, memory=memory, stages=1, iterations=2),
            )
            found[engine, memory] = distill(run).images
    first = found.pop(("fused", "recompute"))
    for name, images in found.items():
        assert (images - first).abs().max() < 1e-3, name


def test_selection_by_test_images_trains_on_all_training_images(tmp_path: Path) -> None:
    config = configuration(selection_split="test")
    ctx = RunContext.prepare(config)
    assert len(ctx.train) == len(ctx.data.train) + len(ctx.data.validation)
    assert ctx.selection_split is ctx.data.test
    by_validation = RunContext.prepare(config.changed(selection_split="validation"))
    assert by_validation.selection_split is by_validation.data.validation
    assert len(by_validation.train) == len(ctx.data.train)
    distill(Run.create(tmp_path / "run", config), SILENT)
    assert (
        Trajectory(tmp_path / "run" / "experts" / "trajectory-000.safetensors").metadata[
            "selection_accuracy"
        ]
        > 0
    )


def test_configuration_is_stored_whole(finished: tuple[Run, int]) -> None:
    run, _ = finished
    stored = json.loads((run.path / "config.json").read_text())
    assert stored["settings"] == run.settings.to_dict()
    assert stored["versions"]["torch"] == torch.__version__


@pytest.mark.parametrize("written", [False, True], ids=["before the line", "after the line"])
def test_an_interrupt_beside_a_line_of_metrics_neither_loses_nor_repeats_it(
    written: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run.create(tmp_path / "run", configuration(stages=1, ipc=1, iterations=4))
    append = Metrics.append

    def interrupted(metrics: Metrics, **values: Any) -> None:
        if "loss" not in values or values["iteration"] != 2:
            append(metrics, **values)
            return
        monkeypatch.undo()
        if written:
            append(metrics, **values)
        raise KeyboardInterrupt

    monkeypatch.setattr(Metrics, "append", interrupted)
    with pytest.raises(KeyboardInterrupt):
        distill(run)
    distill(Run.open(run.path))
    assert [row["iteration"] for row in run.metrics.read() if "loss" in row] == [1, 2, 3, 4]
