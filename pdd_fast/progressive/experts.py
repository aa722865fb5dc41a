"""Train the experts of a run, or take stored ones."""

from __future__ import annotations

from pdd_fast.progressive.context import RunContext
from pdd_fast.progressive.recording import record_trajectories
from pdd_fast.progressive.trajectory_checks import check_finite, check_serves
from pdd_fast.runtime.devices import threads
from pdd_fast.runtime.errors import UsageError
from pdd_fast.runtime.paths import expanded
from pdd_fast.runtime.progress import SILENT, Reporter
from pdd_fast.storage.replay_buffers import buffer_files, read_buffer
from pdd_fast.storage.run import Run
from pdd_fast.storage.trajectories import Trajectory, list_trajectories, require_alike


def make_experts(run: Run, reporter: Reporter = SILENT) -> None:
    """Train the experts that ``run`` still lacks.

    Interrupted experts continue where they stopped.

    Raises:
        UsageError: The data cannot be loaded, or stored experts do not fit.
    """
    with run.lock(), threads(run.settings.threads):
        ensure_experts(run, RunContext.of_run(run), reporter)


def ensure_experts(run: Run, ctx: RunContext, reporter: Reporter) -> None:
    """Do the work of :func:`make_experts` for a run that is already locked and prepared."""
    if ctx.settings.experts_from:
        for trajectory in stored_experts(run):
            check_serves(trajectory, ctx)
            check_finite(trajectory, ctx.settings)
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
            f"num_experts must be at most {len(found)}, as many as {folder} holds, got "
            f"{settings.num_experts}"
        )
    return found[: settings.num_experts]
