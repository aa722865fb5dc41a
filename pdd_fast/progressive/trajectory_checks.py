"""Check whether stored trajectories fit a run: its own, another run's, or MTT's replay buffers."""

from __future__ import annotations

from typing import Any

from pdd_fast.data import Normalization
from pdd_fast.data.fingerprint import difference, identity
from pdd_fast.data.whitening import EPSILON
from pdd_fast.networks.parameters import parameter_count
from pdd_fast.progressive.context import RunContext
from pdd_fast.runtime.errors import UsageError
from pdd_fast.settings import Settings
from pdd_fast.storage.replay_buffers import BufferTrajectory
from pdd_fast.storage.trajectories import Trajectory


def check_finite(trajectory: Trajectory, settings: Settings) -> None:
    """Raise UsageError if a checkpoint that the run may read is not finite.

    Without this check, an iteration might read such a checkpoint only after hours.
    """
    last = (
        trajectory.epochs if settings.filter == "forgetting" else settings.method.trajectory_epochs
    )
    epochs = [*range(last + 1), trajectory.epochs]  # The last checkpoint gives soft labels.
    for epoch in epochs if settings.labels != "hard" else epochs[:-1]:
        trajectory.checkpoint(epoch)


def check_recorded(trajectory: Trajectory, ctx: RunContext, epochs: int) -> None:
    """Raise UsageError if a trajectory of the run itself does not fit its configuration."""
    _check_data(trajectory, ctx, in_order=True)
    _require_same(
        trajectory,
        network=(trajectory.metadata.get("network"), ctx.network),
        epochs=(trajectory.epochs, epochs),
    )


def check_serves(trajectory: Trajectory, ctx: RunContext) -> None:
    """Raise UsageError if an expert from elsewhere does not fit the run.

    MTT's files do not record the data that they were trained on.
    """
    _check_data(trajectory, ctx)
    _require_same(
        trajectory,
        network=(trajectory.metadata.get("network", ctx.network), ctx.network),
        parameters=(trajectory.parameters, parameter_count(ctx.engine.net)),
    )
    reach = ctx.settings.method.trajectory_epochs
    if trajectory.epochs < reach:
        raise UsageError(
            f"{trajectory.path} must have at least max_start_epoch + expert_epochs epochs "
            f"({reach}), got {trajectory.epochs}"
        )
    if isinstance(trajectory, BufferTrajectory):
        trajectory.require_fits(ctx.engine.net)


def _check_data(trajectory: Trajectory, ctx: RunContext, in_order: bool = False) -> None:
    """Raise UsageError if a trajectory records other images, or images made otherwise."""
    metadata, data = trajectory.metadata, ctx.data
    if reason := difference(metadata, identity(data), in_order):
        raise UsageError(f"{trajectory.path}: data must be the run's, got {reason}")
    if "whitening" not in metadata:
        return
    _require_same(trajectory, whitening=(metadata["whitening"], ctx.settings.whitening))
    if data.whitening is not None:
        stored_epsilon = metadata.get("whitening_epsilon", EPSILON)
        _require_same(trajectory, whitening_epsilon=(stored_epsilon, data.whitening.epsilon))
    wanted = data.normalization
    if "normalization" in metadata:
        stored = Normalization.from_dict(metadata["normalization"])
        found, same = str(stored), stored.is_close(wanted)
    else:  # Earlier versions used only fitted constants, and normalized before whitening.
        found = "by constants fitted to the images"
        if data.whitening is not None:
            found += ", which earlier versions whitened then; train them again"
        same = ctx.settings.normalization == "fitted" and wanted != Normalization.identity(
            len(wanted.mean)
        )
    _require_same(trajectory, normalization=(str(wanted) if same else found, str(wanted)))


def _require_same(trajectory: Trajectory, **pairs: tuple[Any, Any]) -> None:
    """Raise UsageError at the first of ``pairs`` in which the found value is not the wanted one."""
    for name, (found, wanted) in pairs.items():
        if found != wanted:
            raise UsageError(
                f"{trajectory.path}: {name} must be {wanted} as in the run's configuration, got "
                f"{found}"
            )
