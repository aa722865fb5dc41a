"""Record the trajectories of networks that train on real data, interrupted or not.

Experts start from random initialization. The trajectories of a transition start from networks that
were trained on a union.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from pdd_fast.data.fingerprint import identity
from pdd_fast.progressive.context import RunContext
from pdd_fast.progressive.trajectory_checks import check_finite, check_recorded
from pdd_fast.runtime.errors import RunError
from pdd_fast.runtime.progress import Reporter
from pdd_fast.settings import Settings
from pdd_fast.storage.trajectories import (
    Trajectory,
    is_finite,
    partial_path,
    read_partial,
    read_partial_start,
    trajectory_path,
    write_partial,
    write_trajectory,
)
from pdd_fast.training.sgd import Loop, TrainState, accuracies


def record_trajectories(
    ctx: RunContext,
    folder: Path,
    start: Callable[[range], Tensor],
    epochs: int,
    purpose: str,
    reporter: Reporter,
    title: str,
    rows: Tensor | None = None,
) -> None:
    """Train one network per expert on real data, and record its parameters after every epoch.

    Networks train in parallel, in groups that are always the same. Each epoch of each network has a
    generator of its own, so an interrupted group continues with the same bits. If only some
    trajectories of a group are finished, the whole group is trained again and only the missing ones
    are written.

    Args:
        ctx: Run context.
        folder: Folder of the trajectories.
        start: Returns the start networks [K, P] of a group.
        epochs: Number of epochs per trajectory.
        purpose: Purpose of the generators, which the files record too.
        reporter: Receives the progress.
        title: Title in progress and error messages.
        rows: Rows of ``ctx.train`` to train on, on the CPU. None: all.

    Raises:
        UsageError: A stored trajectory has another network, length or dataset, or is not finite.
        RunError: A network diverged.
    """
    settings, train, split = ctx.settings, ctx.train, ctx.selection_split
    groups, there = ctx.groups(settings.num_experts), _finished(ctx, folder, epochs)
    for group in groups:
        if there.issuperset(group):
            _forget(folder, group)  # A kill may have come between the last two writes.
    if len(there) == settings.num_experts:
        return
    folder.mkdir(parents=True, exist_ok=True)
    with reporter.task(
        title, total=settings.num_experts * epochs, unit="epoch", done=len(there) * epochs
    ) as task:
        for group in groups:
            missing = [k for k in group if k not in there]
            if not missing:
                continue
            training = _Group.resume(ctx, folder, group) or _Group.start(group, start(group))
            training.require_converging(title, settings)
            task.advance(training.epochs * len(missing))
            # Indices, not a copy of the images: the easy examples are most of a dataset.
            own_rows = None if rows is None else rows.expand(len(group), -1)
            loop = Loop(
                ctx.real_sgd, training.train_state, train.images, train.labels, rows=own_rows
            )
            saved = time.monotonic()
            for epoch in range(training.epochs, epochs):
                loop.epoch(settings.expert_lr, [ctx.generator(purpose, k, epoch) for k in group])
                training.add_checkpoint()
                training.require_converging(title, settings)
                task.advance(len(missing), network=_in_words(missing))
                if time.monotonic() - saved > settings.checkpoint_seconds and epoch + 1 < epochs:
                    training.save(folder)
                    saved = time.monotonic()
            del loop  # Free the memory of its graphs before the next group's start is trained.
            reached = accuracies(ctx.engine, training.train_state.theta, split.images, split.labels)
            for k in missing:
                place = k - group[0]
                own = [checkpoint[place] for checkpoint in training.checkpoints]
                write_trajectory(
                    trajectory_path(folder, k), own, _metadata(ctx, k, purpose, reached[place])
                )
                task.advance(0, accuracy=reached[place])
            _forget(folder, group)  # Not earlier: a group's missing trajectories continue from it.


def keep_starts(
    ctx: RunContext, folder: Path, start: Callable[[range], Tensor], reporter: Reporter, title: str
) -> None:
    """Make and save the start networks that trajectories in ``folder`` still lack.

    ``start(group)`` returns the start networks [K, P] of a group. They are saved as trajectories of
    zero epochs, from which :func:`record_trajectories` continues.
    """
    settings = ctx.settings
    missing = [
        group
        for group in ctx.groups(settings.num_experts)
        if not all(trajectory_path(folder, k).exists() for k in group)
        and _Group.resume(ctx, folder, group) is None
    ]
    if not missing:
        return
    there = settings.num_experts - sum(map(len, missing))
    with reporter.task(title, total=settings.num_experts, unit="network", done=there) as task:
        for group in missing:
            started = _Group.start(group, start(group))
            started.require_converging(title, settings)
            started.save(folder)
            task.advance(len(group))


def stored_start(ctx: RunContext, folder: Path, k: int) -> Tensor:
    """Return the start network [P] of trajectory ``k`` in ``folder``, finished or not.

    Raises:
        UsageError: There is no such start network.
    """
    if trajectory_path(folder, k).exists():
        return Trajectory(trajectory_path(folder, k)).checkpoint(0)
    (group,) = (group for group in ctx.groups(ctx.settings.num_experts) if k in group)
    return read_partial_start(folder, group[0], k - group[0])


@dataclass(frozen=True)
class _Group:
    """Networks that train in parallel, and their checkpoints so far."""

    networks: range
    checkpoints: list[Tensor]  # [K, P] after every epoch, that of the start first, on the CPU
    train_state: TrainState  # on the device

    @classmethod
    def start(cls, networks: range, theta: Tensor) -> _Group:
        """Return the group before its first epoch, at ``theta`` [K, P]."""
        group = cls(networks, [], TrainState.start(theta))
        group.add_checkpoint()
        return group

    @classmethod
    def resume(cls, ctx: RunContext, folder: Path, networks: range) -> _Group | None:
        """Return the group as :meth:`save` left it; None if nothing usable is saved."""
        partial = read_partial(folder, networks[0])
        if partial is None:
            return None
        checkpoints, state = partial
        momentum_buffer = state.get("momentum_buffer", state.get("velocity"))  # name before 0.1
        theta = checkpoints[-1]
        # A group of another size (e.g., from another device) cannot be continued as this one.
        if momentum_buffer is None or theta.shape != momentum_buffer.shape:
            return None
        if theta.shape[:-1] != (len(networks),):
            return None
        moved = (t.to(ctx.device, copy=True) for t in (theta, momentum_buffer))
        return cls(networks, checkpoints, TrainState(*moved))

    @property
    def epochs(self) -> int:
        """Number of epochs done."""
        return len(self.checkpoints) - 1

    def add_checkpoint(self) -> None:
        """Add a copy of the current parameters to the checkpoints."""
        self.checkpoints.append(self.train_state.theta.to("cpu", copy=True))

    def save(self, folder: Path) -> None:
        """Write what :meth:`resume` reads."""
        state = {"momentum_buffer": self.train_state.momentum_buffer}
        write_partial(folder, self.networks[0], self.checkpoints, state)

    def require_converging(self, title: str, settings: Settings) -> None:
        """Raise RunError if the last checkpoint of a network is not finite.

        Without this check, all later results would be NaN, and the images would be blamed.
        """
        for k, theta in zip(self.networks, self.checkpoints[-1], strict=True):
            if not is_finite(theta):
                when, advice = (
                    (f"in epoch {self.epochs}", f"expert_lr (now {settings.expert_lr:g})")
                    if self.epochs
                    else ("on the images of the stages before", "inner_lr or lr_lr")
                )
                raise RunError(
                    f"{title}: network {k + 1} diverged {when}, its weights are NaN or infinite; "
                    f"lower {advice}"
                )


def _finished(ctx: RunContext, folder: Path, epochs: int) -> set[int]:
    """Return the numbers of the finished trajectories, after a check of each."""
    found = set()
    for k in range(ctx.settings.num_experts):
        if trajectory_path(folder, k).exists():
            trajectory = Trajectory(trajectory_path(folder, k))
            check_recorded(trajectory, ctx, epochs)
            check_finite(trajectory, ctx.settings)
            found.add(k)
    return found


def _forget(folder: Path, group: range) -> None:
    # The group's own file is that of its first network. Groups of another size may have left files
    # of the others.
    for k in group:
        partial_path(folder, k).unlink(missing_ok=True)


def _metadata(ctx: RunContext, k: int, purpose: str, reached: float) -> dict[str, Any]:
    return {
        "network": ctx.network,
        **identity(ctx.data),
        "normalization": ctx.data.normalization.to_dict(),
        "whitening": ctx.settings.whitening,
        **({} if ctx.data.whitening is None else {"whitening_epsilon": ctx.data.whitening.epsilon}),
        "seed": ctx.settings.seed,
        "index": k,
        "purpose": purpose,
        "selection_accuracy": round(reached, 2),
    }


def _in_words(numbers: Sequence[int]) -> int | str:
    """Return the numbers of a range of networks, counted from 1: 3, or "1-8"."""
    first, last = numbers[0] + 1, numbers[-1] + 1
    return first if first == last else f"{first}-{last}"
