"""Baselines of a distilled set; every comparison takes the same number of SGD steps."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from pdd_fast.data.union_set import UnionSet
from pdd_fast.evaluation.schedule import Phase
from pdd_fast.progressive.context import RunContext
from pdd_fast.progressive.experts import stored_experts
from pdd_fast.progressive.soft_labels import soft_labels
from pdd_fast.progressive.union import load_union, misfit, union_of
from pdd_fast.runtime.errors import UsageError
from pdd_fast.runtime.progress import Reporter
from pdd_fast.storage.distilled import load_distilled, preprocessing
from pdd_fast.storage.run import Run
from pdd_fast.storage.trajectories import Trajectory

# Results of networks that train on one set from the first step. Only their final accuracies are
# comparable with the others, after equally many steps and on equally many images.
ALONE = ("last-union", "one-stage", "against")


class Comparison(Protocol):
    """One result of an evaluation: the image sets that its networks are trained on."""

    @property
    def name(self) -> str:
        """The result's name in evaluation.json."""

    @property
    def labels(self) -> str:
        """The kind of labels: hard, soft or learned."""

    def schedules(self, group: range) -> list[list[Phase]]:
        """Return the schedules of the repeats in ``group``; each starts with fresh networks."""


@dataclass(frozen=True)
class InOrder:
    """Training on U_1, then U_2, ..., each at its stage's learning rate.

    The momentum buffer is carried over.
    """

    union: UnionSet
    labels: str
    steps: list[int]
    name: str = "pdd"

    def schedules(self, group: range) -> list[list[Phase]]:
        """Return one schedule for all repeats."""
        return [
            [
                Phase(*self.union.up_to(stage), self.union.lrs[stage - 1], count, [count])
                for stage, count in enumerate(self.steps, start=1)
            ]
        ]


@dataclass(frozen=True)
class RandomReal:
    """Training on equally many random real images and stages; every repeat has other images."""

    name: str
    labels: str
    ctx: RunContext
    real_labels: Tensor  # labels of ctx.train, [n] or [n, classes]
    steps: list[int]

    def schedules(self, group: range) -> list[list[Phase]]:
        """Return one schedule whose rows differ between networks."""
        chosen = [random_rows(self.ctx, repeat) for repeat in group]
        images, lr = self.ctx.train.images, self.ctx.settings.inner_lr
        schedule = []
        for stage, count in enumerate(self.steps, start=1):
            rows = torch.stack([torch.cat(parts[:stage]) for parts in chosen]).cpu()
            schedule.append(Phase(images, self.real_labels, lr, count, [count], rows))
        return [schedule]


@dataclass(frozen=True)
class Alone:
    """Training on a set's last union from the first step, at its last learning rate."""

    name: str
    labels: str
    union: UnionSet
    steps: list[int]

    def schedules(self, group: range) -> list[list[Phase]]:
        """Return one schedule of one phase, tested after as many steps as the other results."""
        stops = list(accumulate(self.steps))
        return [[Phase(*self.union.up_to(), self.union.lrs[-1], stops[-1], stops)]]


@dataclass(frozen=True)
class Subsets:
    """Training of a fresh network for every stage, on that stage's images alone."""

    union: UnionSet
    labels: str
    steps: list[int]
    name: str = "subsets"

    def schedules(self, group: range) -> list[list[Phase]]:
        """Return a schedule for each stage."""
        return [
            [Phase(*self.union.only(stage), self.union.lrs[stage - 1], count, [count])]
            for stage, count in enumerate(accumulate(self.steps), start=1)
        ]


def comparisons(
    run: Run, ctx: RunContext, against: Path | None, subsets: bool, reporter: Reporter
) -> list[Comparison]:
    """Return the comparisons of a finished run, "pdd" first.

    Args:
        run: The run.
        ctx: Its context.
        against: Another run directory or distilled set on the same data.
        subsets: Add :class:`Subsets`.
        reporter: Told if "random-soft" is left out.

    Raises:
        UsageError: The run's files do not fit its data, or ``against`` does not.
    """
    union, settings = load_union(run.distilled_file, ctx), ctx.settings
    other = _other(against, ctx) if against is not None else None
    sgd, labels = ctx.synthetic_sgd, settings.labels
    steps = [settings.union_epochs * sgd.steps_per_epoch(size) for size in union.sizes]
    found: list[Comparison] = [
        InOrder(union, labels, steps),
        RandomReal("random", "hard", ctx, ctx.train.labels, steps),
    ]
    experts = _experts(run, reporter) if labels != "hard" else []
    if experts:
        found.append(RandomReal("random-soft", "soft", ctx, _soft(ctx, experts), steps))
    found.append(Alone("last-union", labels, union, steps))
    if other is not None:
        name = "one-stage" if other[0].stages == 1 else "against"
        found.append(Alone(name, other[1], other[0], steps))
    if subsets:
        found.append(Subsets(union, labels, steps))
    return found


def random_rows(ctx: RunContext, repeat: int) -> list[Tensor]:
    """Return the rows of ``ctx.train`` that a repeat uses as random real images, by stage."""
    return ctx.random_real_rows(ctx.settings.ipc_by_stage, "random images", repeat)


def _other(path: Path, ctx: RunContext) -> tuple[UnionSet, str]:
    """Return the union in ``path`` and its kind of labels."""
    other = load_distilled(path)
    if reason := misfit(other, ctx):
        expected = tuple(ctx.data.test.images.shape[1:])
        raise UsageError(
            f"--against must name a run on {ctx.data.name} {expected}, got {path} on {reason}"
        )
    if not other.is_seen_as(ctx.data):
        wanted, found = preprocessing(ctx.data), preprocessing(other)
        found = found if found != wanted else f"{found}, but fitted to other images"
        raise UsageError(f"--against must name a run with {wanted}, got {path} with {found}")
    # Sets written before 0.1 do not record the kind of their labels.
    kind = other.metadata.get("labels", "hard" if other.labels.dim() == 1 else "soft")
    return union_of(other, ctx), kind


def _experts(run: Run, reporter: Reporter) -> list[Trajectory]:
    """Return the run's experts; report if they are missing and return none."""
    try:
        return stored_experts(run)
    except UsageError as error:  # a run may be shared without them
        reporter.message(f"random-soft is left out, because it needs the experts: {error}")
        return []


def _soft(ctx: RunContext, experts: list[Trajectory]) -> Tensor:
    """Return soft labels [n, classes] of ``ctx.train``; zero for images that no repeat uses."""
    repeats = range(ctx.settings.repeats)
    rows = torch.cat([row for repeat in repeats for row in random_rows(ctx, repeat)]).unique()
    labels = ctx.train.images.new_zeros(len(ctx.train), ctx.data.num_classes)
    labels[rows] = soft_labels(ctx.engine, experts, ctx.train.images[rows])
    return labels
