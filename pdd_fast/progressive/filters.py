"""Select the real examples of each stage: easy ones first, harder ones later.

The idea is that of Chen et al., ICLR 2024.

``filter=forgetting`` selects by how often networks forget an example. A network forgets an example
at an epoch after which it misclassifies the example, although it was right one epoch before (Toneva
et al., ICLR 2019, arXiv 1812.05159). Stage s uses scores in [(s − 1)·w, s·w), with w the width of a
band; the last stage has no upper bound.

``filter=learned`` drops the examples that the earlier stages have taught. An example is dropped if
all start networks of the stage's trajectories classify it correctly. These networks were trained on
the images of the earlier stages. The first stage drops none.

Everything in a stage is made from its examples: its initial images, and the real epochs of the
trajectories that it matches.
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
from pdd_fast.progressive.experts import stored_experts
from pdd_fast.progressive.recording import stored_start
from pdd_fast.runtime.errors import UsageError
from pdd_fast.runtime.files import read_tensors, save_tensors
from pdd_fast.runtime.progress import Reporter
from pdd_fast.storage.run import Run
from pdd_fast.storage.trajectories import Trajectory
from pdd_fast.training.sgd import logits_in_parts

# Minimum per class, topped up with the closest rejected examples.
_FEWEST = 10


def gets_right(engine: Engine, theta: Tensor, split: Split) -> Tensor:
    """Return which examples the network ``theta`` [P] classifies correctly, bool [n] on the CPU."""
    return (logits_in_parts(engine, theta, split.images).argmax(1) == split.labels).cpu()


def times_forgotten(
    engine: Engine, trajectory: Trajectory, split: Split, device: torch.device
) -> Tensor:
    """Return how often the network of ``trajectory`` forgot each example.

    Returns:
        Counts, float32 [n] on the CPU. An example that was never classified correctly gets the
        number of epochs, which no count exceeds.
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
    """Return the mean of :func:`times_forgotten` over all experts, [n] for ``ctx.train``.

    The scores are saved in ``file``. The errors are those of :func:`_summed`.
    """

    def each(number: int) -> Tensor:
        return times_forgotten(ctx.engine, experts[number], ctx.train, ctx.device)

    total = _summed(ctx, each, len(experts), file, "forgetting scores", reporter)
    return (total / len(experts)).float()


def times_learned(
    ctx: RunContext, start: Callable[[int], Tensor], networks: int, file: Path, reporter: Reporter
) -> Tensor:
    """Return how many networks classify each example of ``ctx.train`` correctly, float64 [n].

    ``start(number)`` returns the parameters [P] of a network. The counts are saved in ``file``. The
    errors are those of :func:`_summed`.
    """

    def each(number: int) -> Tensor:
        return gets_right(ctx.engine, start(number).to(ctx.device), ctx.train)

    return _summed(ctx, each, networks, file, "learned examples", reporter)


def _summed(
    ctx: RunContext,
    each: Callable[[int], Tensor],
    networks: int,
    file: Path,
    title: str,
    reporter: Reporter,
) -> Tensor:
    """Return the sum of ``each(number)`` over all networks, float64 [n] for ``ctx.train``.

    Args:
        ctx: Run context.
        each: Returns the values [n] of a network.
        networks: Number of networks.
        file: File that saves the sum after every network, so that no work is lost.
        title: Title in the progress.
        reporter: Receives the progress.

    Raises:
        UsageError: The file is for other examples or networks.
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
    """Return which examples belong to a stage by their forgetting scores, bool [n].

    Stage s uses scores in [(s − 1)·width, s·width); the last stage has no upper bound. A class with
    fewer than ``least`` examples is topped up with the closest rejected ones.
    """
    low, high = width * (stage - 1), float("inf") if stage == stages else width * stage
    inside = (scores >= low) & (scores < high)
    return _filled(inside, torch.where(scores < low, low - scores, scores - high), labels, least)


def unlearned(right: Tensor, networks: int, labels: Tensor, least: int) -> Tensor:
    """Return which examples not all networks classify correctly, bool [n].

    ``right`` [n] counts the networks that classify each example correctly. A class with fewer than
    ``least`` examples is topped up with its first rows, because all rejected examples have the same
    count.
    """
    return _filled(right < networks, right, labels, least)


def _filled(inside: Tensor, distance: Tensor, labels: Tensor, least: int) -> Tensor:
    """Return ``inside`` [n], with at least ``least`` examples per class.

    A smaller class is topped up with the examples of the smallest ``distance`` [n]. Ties are broken
    in favor of the earlier row.
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
    """Return which examples belong to each stage, bool [n] per stage."""
    settings, labels, least = ctx.settings, ctx.train.labels.cpu(), _least(ctx)
    return [
        band(scores, labels, stage, settings.stages, settings.filter_band, least)
        for stage in range(1, settings.stages + 1)
    ]


def _least(ctx: RunContext) -> int:
    """Return the minimum number of examples per class in a stage.

    It is enough for initial images that no other stage uses.
    """
    return max(_FEWEST, sum(ctx.settings.real_by_stage))


def initial_rows(ctx: RunContext, bands: Sequence[Tensor]) -> list[Tensor]:
    """Return the rows of ``ctx.train`` for the initial images of the stages that have a band.

    ``bands`` holds one band per stage, from the first stage on. The rows of a stage come from its
    band, class by class. No image occurs twice.
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
    """Real examples of ``ctx.train`` that stages are made from.

    The methods are called stage by stage, because the examples of a stage may depend on the results
    of the earlier stages. Interruptions of a run do not change them.
    """

    # Whether the examples of a stage depend on the start networks of its trajectories.
    follow_from_starts = False

    def __init__(self, run: Run, ctx: RunContext, reporter: Reporter) -> None:
        self._run, self._ctx, self._reporter = run, ctx, reporter

    @abstractmethod
    def rows(self, stage: int) -> Tensor | None:
        """Return the rows of ``ctx.train`` that ``stage`` uses, on the CPU; None means all."""

    @abstractmethod
    def initial_rows(self, stage: int) -> Tensor:
        """Return the rows of ``ctx.train`` for the initial images of ``stage``, class by class.

        No image occurs in two stages.
        """


class AllExamples(Examples):
    """All examples in every stage."""

    def rows(self, stage: int) -> None:
        """Return None, which means all rows."""
        return None  # noqa: RET501 - the value has a meaning

    def initial_rows(self, stage: int) -> Tensor:
        """Return random rows of ``ctx.train``, class by class."""
        return self._ctx.random_real_rows(self._ctx.settings.real_by_stage, "initial images")[
            stage - 1
        ]


class FilteredExamples(Examples):
    """Examples that :meth:`inside` selects."""

    @abstractmethod
    def inside(self, stage: int) -> Tensor:
        """Return which examples of ``ctx.train`` belong to ``stage``, bool [n] on the CPU."""

    def rows(self, stage: int) -> Tensor:
        """Return the selected rows of ``ctx.train``, on the CPU."""
        return self.inside(stage).nonzero().flatten()

    def initial_rows(self, stage: int) -> Tensor:
        """Return random rows among the selected ones, class by class."""
        return initial_rows(self._ctx, [self.inside(earlier) for earlier in range(1, stage + 1)])[
            -1
        ]


class ForgottenExamples(FilteredExamples):
    """Examples selected by bands of forgetting scores."""

    @cached_property
    def _bands(self) -> list[Tensor]:
        run, ctx = self._run, self._ctx
        return stage_bands(
            ctx, forgetting_scores(ctx, stored_experts(run), run.forgetting_file, self._reporter)
        )

    def inside(self, stage: int) -> Tensor:
        """Return which examples lie in the band of ``stage``, bool [n] on the CPU."""
        return self._bands[stage - 1]


class UnlearnedExamples(FilteredExamples):
    """Examples that not all start networks of a stage's trajectories classify correctly."""

    follow_from_starts = True

    def inside(self, stage: int) -> Tensor:
        """Return which examples are not learned yet, bool [n] on the CPU."""
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
