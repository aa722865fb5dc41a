"""Which real examples a stage is made from: easy ones first, harder ones later (Chen et al., ICLR
2024).

With ``filter=forgetting`` by how often networks forget them. An example is forgotten at an epoch
after which a network gets it wrong that got it right an epoch before (Toneva et al., ICLR 2019,
arXiv 1812.05159). Stage s takes the examples of scores in [w(s − 1), ws), the last stage all from
there on.

With ``filter=learned`` by what the earlier stages have taught. A stage drops the examples that all
networks get right from which its trajectories start, those that were trained on the earlier stages'
images; the first stage drops none.

Everything of a stage is made from its examples: the images it starts from, and the real epochs of
the trajectories that it matches.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from pdd_fast.data import Split
from pdd_fast.data.fingerprint import difference, identity
from pdd_fast.engines import Engine
from pdd_fast.progressive.context import RunContext
from pdd_fast.progressive.experts import stored_experts, stored_start
from pdd_fast.runtime.errors import UsageError
from pdd_fast.runtime.files import read_tensors, save_tensors
from pdd_fast.runtime.progress import Reporter
from pdd_fast.storage.run import Run
from pdd_fast.storage.trajectories import Trajectory
from pdd_fast.training.sgd import logits_in_parts

# Of every class a stage has at least so many examples; where a filter leaves fewer, those nearest
# to staying join.
_FEWEST = 10


def gets_right(engine: Engine, theta: Tensor, split: Split) -> Tensor:
    """Which examples the network at ``theta`` [P] puts in their class, bool [n] on the CPU."""
    return (logits_in_parts(engine, theta, split.images).argmax(1) == split.labels).cpu()


def times_forgotten(
    engine: Engine, trajectory: Trajectory, split: Split, device: torch.device
) -> Tensor:
    """How often the network of ``trajectory`` forgot each example, float32 [n] on the CPU; as often
    as it had epochs, which is more than any, where it never got it right.
    """
    count, before = (
        torch.zeros(len(split), device="cpu"),
        torch.zeros(len(split), dtype=torch.bool, device="cpu"),
    )
    ever = before.clone()
    for epoch in range(trajectory.epochs + 1):
        right = gets_right(engine, trajectory.checkpoint(epoch).to(device), split)
        count += before & ~right
        ever |= right
        before = right
    return torch.where(ever, count, float(trajectory.epochs))


def forgetting_scores(
    ctx: RunContext, experts: Sequence[Trajectory], file: Path, reporter: Reporter
) -> Tensor:
    """The mean over all experts of :func:`times_forgotten`, [n] of the examples of ``ctx.train``;
    kept in ``file``, errors as :func:`_summed`.
    """

    def each(number: int) -> Tensor:
        return times_forgotten(ctx.engine, experts[number], ctx.train, ctx.device)

    total = _summed(ctx, each, len(experts), file, "forgetting scores", reporter)
    return (total / len(experts)).float()


def times_learned(
    ctx: RunContext, start: Callable[[int], Tensor], networks: int, file: Path, reporter: Reporter
) -> Tensor:
    """How many of the ``networks`` at ``start(number)`` [P] get each example of ``ctx.train``
    right, float64 [n]; kept in ``file``, errors as :func:`_summed`.
    """

    def each(number: int) -> Tensor:
        return gets_right(ctx.engine, start(number).to(ctx.device), ctx.train)

    return _summed(ctx, each, networks, file, "what is learned", reporter)


def _summed(
    ctx: RunContext,
    each: Callable[[int], Tensor],
    networks: int,
    file: Path,
    title: str,
    reporter: Reporter,
) -> Tensor:
    """The sum over networks of ``each(number)``, [n] of the examples of ``ctx.train``, as float64
    [n].

    Args:
        file: where it is kept, network by network, so that no work is lost.

    Raises:
        UsageError: what is kept is of other examples or networks.
    """
    split, total, done = (
        ctx.train,
        torch.zeros(len(ctx.train), dtype=torch.float64, device="cpu"),
        0,
    )
    whose, data = {"experts": networks, "select": ctx.settings.selection_split}, identity(ctx.data)
    if file.exists():
        tensors, metadata = read_tensors(file)
        total, done = tensors.get("total", total[:0]), int(metadata.get("done", 0))
        found = {key: metadata.get(key) for key in whose}
        if found != whose or total.shape != (len(split),):
            raise UsageError(
                f"{file} must be for {len(split)} examples and {whose}, got {len(total)} and "
                f"{found}"
            )
        if reason := difference(metadata, data, in_order=True):
            raise UsageError(f"{file} must be for the run's data, got one for {reason}")
    if done == networks:
        return total
    with reporter.task(title, total=networks, unit="network", done=done) as task:
        for number in range(done, networks):
            total = total + each(number)
            save_tensors(file, {"total": total}, data | whose | {"done": number + 1})
            task.advance(1)
    return total


def band(
    scores: Tensor, labels: Tensor, stage: int, stages: int, width: float, least: int
) -> Tensor:
    """The examples of a stage, bool [n]: of scores in [width·(stage − 1), width·stage), in the last
    stage all from there on, and in classes with fewer than ``least`` of them as many more as are
    missing, by how far off they are.
    """
    low, high = width * (stage - 1), float("inf") if stage == stages else width * stage
    inside = (scores >= low) & (scores < high)
    return _filled(inside, torch.where(scores < low, low - scores, scores - high), labels, least)


def unlearned(right: Tensor, networks: int, labels: Tensor, least: int) -> Tensor:
    """The examples that not all of ``networks`` get right, bool [n], of how many get each right,
    [n]; in classes with fewer than ``least`` of them as many more as are missing. Those are right
    for all networks alike: the first rows.
    """
    return _filled(right < networks, right, labels, least)


def _filled(inside: Tensor, distance: Tensor, labels: Tensor, least: int) -> Tensor:
    """``inside``, bool [n], and in classes with fewer than ``least`` of them as many more as are
    missing, the least ``distance`` [n] first, and of equals the first rows.
    """
    inside = inside.clone()
    for label in labels.unique().tolist():
        of_class = labels == label
        missing = least - int((inside & of_class).sum())
        if missing > 0:
            rows = (of_class & ~inside).nonzero().flatten()
            nearest = distance[rows].argsort(stable=True)[:missing]
            inside[rows[nearest]] = True
    return inside


def stage_bands(ctx: RunContext, scores: Tensor) -> list[Tensor]:
    """The examples of every stage, bool [n] each."""
    settings, labels, least = ctx.settings, ctx.train.labels.cpu(), _least(ctx)
    return [
        band(scores, labels, stage, settings.stages, settings.filter_band, least)
        for stage in range(1, settings.stages + 1)
    ]


def _least(ctx: RunContext) -> int:
    """Examples that a stage has of every class, at least: enough for images that no other stage
    starts from.
    """
    return max(_FEWEST, sum(ctx.settings.real_by_stage))


def initial_rows(ctx: RunContext, bands: Sequence[Tensor]) -> list[Tensor]:
    """For every stage that has a band here, from the first on: rows of ``ctx.train`` to start
    from, class by class, out of its band; no image twice.
    """
    labels, found = ctx.train.labels.cpu(), []
    free = torch.ones(len(labels), dtype=torch.bool, device="cpu")
    for stage, (count, inside) in enumerate(
        zip(ctx.settings.real_by_stage[: len(bands)], bands, strict=True), start=1
    ):
        generator, own = ctx.generator("initial images", stage), list[Tensor]()
        for label in range(ctx.data.num_classes):
            rows = (inside & free & (labels == label)).nonzero().flatten()
            own.append(rows[torch.randperm(len(rows), generator=generator, device="cpu")[:count]])
        found.append(torch.cat(own).to(ctx.device))
        free[found[-1].cpu()] = False
    return found


class Examples(ABC):
    """The real examples of ``ctx.train`` that stages are made from. Asked stage by stage, because
    a stage's may follow from what those before it have made; the answer is the same however often a
    run was interrupted.
    """

    # Whether a stage's examples can be told only when the starts of its trajectories are there.
    follow_from_starts = False

    def __init__(self, run: Run, ctx: RunContext, reporter: Reporter) -> None:
        self._run, self._ctx, self._reporter = run, ctx, reporter

    @abstractmethod
    def rows(self, stage: int) -> Tensor | None:
        """Rows of ``ctx.train`` that ``stage`` is made from, on the CPU; None where these are
        all.
        """

    @abstractmethod
    def initial_rows(self, stage: int) -> Tensor:
        """Rows of ``ctx.train`` that the images of ``stage`` start from, class by class; no image
        in two stages.
        """


class AllExamples(Examples):
    """Every stage is made from all."""

    def rows(self, stage: int) -> None:
        return None

    def initial_rows(self, stage: int) -> Tensor:
        return self._ctx.random_real_rows(self._ctx.settings.real_by_stage, "initial images")[
            stage - 1
        ]


class FilteredExamples(Examples):
    """Every stage is made from those that :meth:`inside` tells."""

    @abstractmethod
    def inside(self, stage: int) -> Tensor:
        """Which of ``ctx.train`` the examples of ``stage`` are, bool [n] on the CPU."""

    def rows(self, stage: int) -> Tensor:
        return self.inside(stage).nonzero().flatten()

    def initial_rows(self, stage: int) -> Tensor:
        return initial_rows(self._ctx, [self.inside(earlier) for earlier in range(1, stage + 1)])[
            -1
        ]


class ForgottenExamples(FilteredExamples):
    """By bands of forgetting scores."""

    @cached_property
    def _bands(self) -> list[Tensor]:
        run, ctx = self._run, self._ctx
        return stage_bands(
            ctx, forgetting_scores(ctx, stored_experts(run), run.forgetting_file, self._reporter)
        )

    def inside(self, stage: int) -> Tensor:
        return self._bands[stage - 1]


class UnlearnedExamples(FilteredExamples):
    """Those that not all starts of a stage's trajectories get right."""

    follow_from_starts = True

    def inside(self, stage: int) -> Tensor:
        run, ctx = self._run, self._ctx
        if stage == 1:
            return torch.ones(len(ctx.train), dtype=torch.bool, device="cpu")
        folder, networks = run.stage_trajectories_dir(stage), ctx.settings.num_experts
        right = times_learned(
            ctx,
            lambda k: stored_start(ctx, folder, k),
            networks,
            run.learned_file(stage),
            self._reporter,
        )
        return unlearned(right, networks, ctx.train.labels.cpu(), _least(ctx))


FILTERS: dict[str, type[Examples]] = {  # by Settings.filter
    "none": AllExamples,
    "forgetting": ForgottenExamples,
    "learned": UnlearnedExamples,
}
