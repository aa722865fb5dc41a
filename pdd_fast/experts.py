"""Training trajectories on real data: the experts, and those that start from networks trained on a union."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from torch import Tensor

from pdd_fast.errors import UsageError
from pdd_fast.reporting import SILENT, Reporter
from pdd_fast.runs import Run
from pdd_fast.training import Student, accuracy
from pdd_fast.trajectories import (
    Trajectory,
    partial_path,
    read_partial,
    trajectory_path,
    write_partial,
    write_trajectory,
)
from pdd_fast.workbench import Workbench


def make_experts(run: Run, reporter: Reporter = SILENT) -> None:
    """Trains the experts that ``run`` still lacks; goes on with one that was interrupted.

    Raises:
        UsageError: the data cannot be loaded, or stored experts do not fit.
    """
    with run.lock():
        ensure_experts(run, Workbench.prepare(run.config), reporter)


def ensure_experts(run: Run, bench: Workbench, reporter: Reporter) -> None:
    """:func:`make_experts` for a run that is locked and set up already."""
    record_trajectories(
        bench,
        run.experts_dir,
        lambda k: bench.initial_parameters("expert", k),
        bench.config.expert_train_epochs,
        "expert",
        reporter,
        "experts",
    )


def record_trajectories(
    bench: Workbench,
    folder: Path,
    start: Callable[[int], Tensor],
    epochs: int,
    purpose: str,
    reporter: Reporter,
    title: str,
) -> None:
    """Trains one network per expert on real data from ``start(k)`` [P], keeping the weights of every epoch.

    Epoch e of network k draws from a generator of its own, so an interrupted network goes on with the same bits.

    Raises:
        UsageError: a trajectory that is there already is of another network, length or data set.
    """
    config, train = bench.config, bench.train
    missing = [k for k in range(config.experts) if not trajectory_path(folder, k).exists()]
    for k in set(range(config.experts)) - set(missing):
        _check_fits(Trajectory(trajectory_path(folder, k)), bench, epochs)
        partial_path(folder, k).unlink(missing_ok=True)  # where a kill came between the last two writes
    if not missing:
        return
    folder.mkdir(parents=True, exist_ok=True)
    done = (config.experts - len(missing)) * epochs
    with reporter.task(title, total=config.experts * epochs, unit="epoch", done=done) as task:
        for k in missing:
            checkpoints, student = _begin(bench, folder, k, start)
            task.advance(len(checkpoints) - 1)
            saved = time.monotonic()
            for epoch in range(len(checkpoints) - 1, epochs):
                draw = bench.generator(purpose, k, epoch)
                bench.real_sgd.epoch(student, train.images, train.labels, config.expert_lr, draw)
                checkpoints.append(student.theta.cpu().clone())
                task.advance(1, network=k + 1)
                if time.monotonic() - saved > config.checkpoint_seconds and epoch + 1 < epochs:
                    write_partial(folder, k, checkpoints, {"velocity": student.velocity.cpu()})
                    saved = time.monotonic()
            reached = accuracy(bench.engine, student.theta, bench.held_out.images, bench.held_out.labels)
            metadata = {
                "network": bench.network,
                "data": bench.data.name,
                "seed": config.seed,
                "index": k,
                "purpose": purpose,
                "held_out_accuracy": round(reached, 2),
            }
            write_trajectory(trajectory_path(folder, k), checkpoints, metadata)
            partial_path(folder, k).unlink(missing_ok=True)
            task.advance(0, accuracy=reached)


def _check_fits(trajectory: Trajectory, bench: Workbench, epochs: int) -> None:
    found = (trajectory.metadata.get("data"), trajectory.metadata.get("network"), trajectory.epochs)
    expected = (bench.data.name, bench.network, epochs)
    for name, value, wanted in zip(("data", "network", "epochs"), found, expected, strict=True):
        if value != wanted:
            raise UsageError(f"{trajectory.path}: {name} must be {wanted} as in the run's configuration, got {value}")


def _begin(bench: Workbench, folder: Path, k: int, start: Callable[[int], Tensor]) -> tuple[list[Tensor], Student]:
    """Checkpoints so far (on the CPU) and the network in training (on the run's device)."""
    partial = read_partial(folder, k)
    if partial is None:
        theta = start(k)
        return [theta.cpu().clone()], Student.start(theta)
    checkpoints, state = partial
    return checkpoints, Student(checkpoints[-1].to(bench.device, copy=True), state["velocity"].to(bench.device))
