"""Record training trajectories on real data.

Experts start from random initialization. The trajectories of a transition start from networks that
were trained on a union.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from pdd_fast.data import Normalization
from pdd_fast.data.fingerprint import difference, identity
from pdd_fast.data.whitening import EPSILON
from pdd_fast.networks.parameters import parameter_count
from pdd_fast.progressive.context import RunContext
from pdd_fast.runtime.errors import RunError, UsageError
from pdd_fast.runtime.paths import expanded
from pdd_fast.runtime.progress import SILENT, Reporter
from pdd_fast.settings import Settings
from pdd_fast.storage.replay_buffers import BufferTrajectory, buffer_files, read_buffer
from pdd_fast.storage.run import Run
from pdd_fast.storage.trajectories import (
    Trajectory,
    is_finite,
    list_trajectories,
    partial_path,
    read_partial,
    read_partial_start,
    require_alike,
    trajectory_path,
    write_partial,
    write_trajectory,
)
from pdd_fast.training.sgd import Loop, TrainState, accuracies


def make_experts(run: Run, reporter: Reporter = SILENT) -> None:
    """Train the experts that ``run`` still lacks.

    Interrupted experts continue where they stopped.

    Raises:
        UsageError: The data cannot be loaded, or stored experts do not fit.
    """
    with run.lock():
        ensure_experts(run, RunContext.of_run(run), reporter)


def ensure_experts(run: Run, ctx: RunContext, reporter: Reporter) -> None:
    """Do the work of :func:`make_experts` for a run that is already locked and prepared."""
    if ctx.settings.experts_from:
        for trajectory in stored_experts(run):
            _check_serves(trajectory, ctx)
            _check_finite(trajectory, ctx.settings)
        return
    record_trajectories(
        ctx,
        run.experts_dir,
        lambda group: ctx.initial_state("expert", group).theta,
        ctx.settings.expert_train_epochs,
        "expert",
        reporter,
        "experts",
    )


def stored_experts(run: Run) -> list[Trajectory]:
    """Return the experts of ``run``: its own, or those in the folder ``experts_from``.

    Raises:
        UsageError: There are none, or fewer than ``num_experts``.
    """
    settings = run.settings
    if not settings.experts_from:
        return list_trajectories(run.experts_dir)
    folder = expanded(settings.experts_from)
    if (folder / "experts").is_dir():
        folder = folder / "experts"
    buffers = buffer_files(folder)
    found: list[Trajectory] = [trajectory for path in buffers for trajectory in read_buffer(path)]
    found = found or list_trajectories(folder)
    require_alike(found)
    if len(found) < settings.num_experts:
        raise UsageError(
            f"experts must be at most {len(found)}, as many as {folder} holds, got "
            f"{settings.num_experts}"
        )
    return found[: settings.num_experts]


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
    settings, train = ctx.settings, ctx.train
    groups, there = ctx.groups(settings.num_experts), set[int]()
    for k in range(settings.num_experts):
        if trajectory_path(folder, k).exists():
            trajectory = Trajectory(trajectory_path(folder, k))
            _check_fits(trajectory, ctx, epochs)
            _check_finite(trajectory, settings)
            there.add(k)
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
            checkpoints, train_state = _unfinished(ctx, folder, group) or _begin(start(group))
            _require_converging(checkpoints[-1], group, len(checkpoints) - 1, title, settings)
            task.advance((len(checkpoints) - 1) * len(missing))
            # Indices, not a copy of the images: the easy examples are most of a dataset.
            own_rows = None if rows is None else rows.expand(len(group), -1)
            loop = Loop(ctx.real_sgd, train_state, train.images, train.labels, rows=own_rows)
            saved = time.monotonic()
            for epoch in range(len(checkpoints) - 1, epochs):
                loop.epoch(settings.expert_lr, [ctx.generator(purpose, k, epoch) for k in group])
                checkpoints.append(train_state.theta.to("cpu", copy=True))
                _require_converging(checkpoints[-1], group, epoch + 1, title, settings)
                task.advance(len(missing), network=_in_words(missing))
                if time.monotonic() - saved > settings.checkpoint_seconds and epoch + 1 < epochs:
                    write_partial(
                        folder,
                        group[0],
                        checkpoints,
                        {"momentum_buffer": train_state.momentum_buffer},
                    )
                    saved = time.monotonic()
            del loop  # Free the memory of its graphs before the next group's start is trained.
            reached = accuracies(
                ctx.engine,
                train_state.theta,
                ctx.selection_split.images,
                ctx.selection_split.labels,
            )
            for k in missing:
                place = k - group[0]
                own = [checkpoint[place] for checkpoint in checkpoints]
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
    settings, groups = ctx.settings, ctx.groups(ctx.settings.num_experts)
    missing = [
        group
        for group in groups
        if not all(trajectory_path(folder, k).exists() for k in group)
        and _unfinished(ctx, folder, group) is None
    ]
    if not missing:
        return
    there = settings.num_experts - sum(map(len, missing))
    with reporter.task(title, total=settings.num_experts, unit="network", done=there) as task:
        for group in missing:
            checkpoints, train_state = _begin(start(group))
            _require_converging(checkpoints[-1], group, 0, title, settings)
            write_partial(
                folder, group[0], checkpoints, {"momentum_buffer": train_state.momentum_buffer}
            )
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


def _forget(folder: Path, group: range) -> None:
    # The group's own file is that of its first network. Groups of another size may have left files
    # of the others.
    for k in group:
        partial_path(folder, k).unlink(missing_ok=True)


def _require_converging(
    theta: Tensor, group: range, epoch: int, title: str, settings: Settings
) -> None:
    """Raise RunError if a network of ``group`` is no longer finite.

    ``theta`` [K, P] holds the networks after ``epoch`` epochs. Without this check, all later
    results would be NaN, and the images would be blamed.
    """
    for k, own in zip(group, theta, strict=True):
        if not is_finite(own):
            when = f"in epoch {epoch}" if epoch else "on the images of the stages before"
            advice = (
                f"lower expert_lr (now {settings.expert_lr:g})"
                if epoch
                else "lower inner_lr or lr_lr"
            )
            raise RunError(
                f"{title}: network {k + 1} diverged {when}, its weights are NaN or infinite; "
                f"{advice}"
            )


def _check_finite(trajectory: Trajectory, settings: Settings) -> None:
    """Raise UsageError if a checkpoint that the run may read is not finite.

    Without this check, an iteration might read such a checkpoint only after hours.
    """
    last = (
        trajectory.epochs if settings.filter == "forgetting" else settings.method.trajectory_epochs
    )
    epochs = [*range(last + 1), trajectory.epochs]  # The last checkpoint gives soft labels.
    for epoch in epochs if settings.labels != "hard" else epochs[:-1]:
        trajectory.checkpoint(epoch)


def _check_serves(trajectory: Trajectory, ctx: RunContext) -> None:
    """Raise UsageError if an expert from elsewhere does not fit the run.

    MTT's files do not record the data that they were trained on.
    """
    metadata, reach = trajectory.metadata, ctx.settings.method.trajectory_epochs
    if reason := difference(metadata, identity(ctx.data)):
        raise UsageError(f"{trajectory.path}: data must be the run's, got {reason}")
    _require_same(
        trajectory,
        **_made_of_pixels(metadata, ctx),
        network=(metadata.get("network", ctx.network), ctx.network),
        parameters=(trajectory.parameters, parameter_count(ctx.engine.net)),
    )
    if trajectory.epochs < reach:
        raise UsageError(
            f"{trajectory.path} must have at least max_start_epoch + expert_epochs epochs "
            f"({reach}), got {trajectory.epochs}"
        )
    if isinstance(trajectory, BufferTrajectory):
        trajectory.require_fits(ctx.engine.net)


def _made_of_pixels(metadata: dict[str, Any], ctx: RunContext) -> dict[str, tuple[Any, Any]]:
    """Return pairs for :func:`_require_same` that tell how images were made from pixels.

    There are none for a trajectory that does not record it.
    """
    if "whitening" not in metadata:
        return {}
    pairs: dict[str, tuple[Any, Any]] = {
        "whitening": (metadata["whitening"], ctx.settings.whitening)
    }
    if ctx.data.whitening is not None:
        pairs["whitening_epsilon"] = (
            metadata.get("whitening_epsilon", EPSILON),
            ctx.data.whitening.epsilon,
        )
    wanted = ctx.data.normalization
    if "normalization" in metadata:
        stored = Normalization.from_dict(metadata["normalization"])
        found, same = str(stored), stored.is_close(wanted)
    else:  # Earlier versions used only fitted constants, and normalized before whitening.
        found = "by constants fitted to the images"
        found += (
            ", which earlier versions whitened then; train them again"
            if ctx.data.whitening is not None
            else ""
        )
        same = ctx.settings.normalization == "fitted" and wanted != Normalization.identity(
            len(wanted.mean)
        )
    return pairs | {"normalization": (str(wanted) if same else found, str(wanted))}


def _check_fits(trajectory: Trajectory, ctx: RunContext, epochs: int) -> None:
    metadata = trajectory.metadata
    if reason := difference(metadata, identity(ctx.data), in_order=True):
        raise UsageError(f"{trajectory.path}: data must be the run's, got {reason}")
    _require_same(
        trajectory,
        **_made_of_pixels(metadata, ctx),
        network=(metadata.get("network"), ctx.network),
        epochs=(trajectory.epochs, epochs),
    )


def _require_same(trajectory: Trajectory, **pairs: tuple[Any, Any]) -> None:
    """Raise UsageError at the first of ``pairs`` in which the found value is not the wanted one."""
    for name, (found, wanted) in pairs.items():
        if found != wanted:
            raise UsageError(
                f"{trajectory.path}: {name} must be {wanted} as in the run's configuration, got "
                f"{found}"
            )


def _unfinished(
    ctx: RunContext, folder: Path, group: range
) -> tuple[list[Tensor], TrainState] | None:
    """Return the saved checkpoints [K, P] and training state of an interrupted group.

    The checkpoints lie on the CPU, and the training state on the device. None: nothing usable is
    saved.
    """
    partial = read_partial(folder, group[0])
    if partial is None:
        return None
    checkpoints, state = partial
    momentum_buffer = state.get("momentum_buffer", state.get("velocity"))  # the name before 0.1
    # A group of another size (e.g., from another device) cannot be continued as this one.
    if momentum_buffer is None or checkpoints[-1].shape != momentum_buffer.shape:
        return None
    if checkpoints[-1].shape[:-1] != (len(group),):
        return None
    return checkpoints, TrainState(
        *(t.to(ctx.device, copy=True) for t in (checkpoints[-1], momentum_buffer))
    )


def _begin(theta: Tensor) -> tuple[list[Tensor], TrainState]:
    """Return the same as :func:`_unfinished`, for networks that start at ``theta`` [K, P]."""
    train_state = TrainState.start(theta)
    return [train_state.theta.to("cpu", copy=True)], train_state
