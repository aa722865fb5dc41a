"""Build the problem that a stage gives its method from the run context."""

from __future__ import annotations

from functools import partial

from torch import Tensor

from pdd_fast.data.union_set import UnionSet
from pdd_fast.methods.base import StageProblem
from pdd_fast.progressive.context import RunContext
from pdd_fast.progressive.start_networks import StartNetworks
from pdd_fast.storage.trajectories import Trajectory


def stage_problem(
    ctx: RunContext,
    stage: int,
    rows: Tensor | None,
    union: UnionSet,
    trajectories: list[Trajectory],
    images: Tensor,
    labels: Tensor,
) -> StageProblem:
    """Return the problem of ``stage``; :class:`StageProblem` describes its fields."""
    return StageProblem(
        stage=stage,
        settings=ctx.settings,
        train=ctx.train,
        rows=rows,
        union=union,
        trajectories=trajectories,
        images=images,
        labels=labels,
        engine=ctx.engine,
        dsa=ctx.dsa,
        normalization=ctx.data.normalization,
        num_classes=ctx.data.num_classes,
        device=ctx.device,
        side_by_side=ctx.side_by_side,
        start_networks=partial(StartNetworks, ctx, union),
    )
