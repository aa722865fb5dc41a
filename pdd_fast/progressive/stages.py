"""The stages of progressive dataset distillation (Chen et al., ICLR 2024, arXiv 2310.06982),
whatever the method.

Everything random derives from the run's seed and from what it is drawn for
(pdd_fast.runtime.seeds), so the state of a run is what lies in its directory: a run that was killed
goes on with the same bits.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from pdd_fast.augmentation.multi_formation import combine
from pdd_fast.data import require_images_per_class
from pdd_fast.data.union_set import UnionSet
from pdd_fast.methods import METHODS, BaseMethod
from pdd_fast.progressive.context import RunContext
from pdd_fast.progressive.experts import (
    ensure_experts,
    keep_starts,
    record_trajectories,
    stored_experts,
)
from pdd_fast.progressive.filters import FILTERS, Examples
from pdd_fast.progressive.problem import stage_problem
from pdd_fast.progressive.soft_labels import soft_labels
from pdd_fast.progressive.union import distilled_set, empty_union, load_union
from pdd_fast.runtime.devices import peak_memory
from pdd_fast.runtime.errors import UsageError
from pdd_fast.runtime.progress import SILENT, Reporter, Task
from pdd_fast.settings import Settings
from pdd_fast.storage.distilled import DistilledSet
from pdd_fast.storage.run import Run
from pdd_fast.storage.trajectories import Trajectory, list_trajectories
from pdd_fast.training.sgd import TrainState, accuracies


def distill(run: Run, reporter: Reporter = SILENT) -> DistilledSet:
    """Everything of ``run`` that is not there yet: experts, stages, ``distilled.safetensors``.

    Raises:
        UsageError: data are missing or too few; the configuration does not fit them; its base
            method is unknown here.
        RunError: the optimization left the range in which going on makes sense. What was computed
            is kept.
    """
    with run.lock():
        settings = run.settings
        if settings.method.name not in METHODS:
            raise UsageError(
                f"method must be {' or '.join(METHODS)}, got {settings.method.name!r}; register it "
                f"first"
            )
        ctx, recorded = RunContext.of_run(run), METHODS[settings.method.name].needs_trajectories
        if settings.filter == "learned" and not recorded:
            raise UsageError(
                f"filter must be none or forgetting where method is {settings.method.name}, got "
                f"learned"
            )
        require_images_per_class(ctx.train, settings.ipc, ctx.data.classes, each=settings.factor**2)
        if recorded or settings.filter == "forgetting" or settings.labels != "hard":
            ensure_experts(run, ctx, reporter)
        union, examples = empty_union(ctx), FILTERS[settings.filter](run, ctx, reporter)
        for stage in range(1, settings.stages + 1):
            if run.stage_file(stage).exists():
                union = load_union(run.stage_file(stage), ctx)
                continue
            trajectories = list[Trajectory]()
            if recorded:
                if _records(settings, stage):
                    transition(run, ctx, union, examples, reporter)
                trajectories = _trajectories(run, stage)
            union = _run_stage(run, ctx, union, trajectories, examples, reporter)
            distilled_set(union, ctx).save(run.stage_file(stage))
            run.checkpoint_file(stage).unlink(missing_ok=True)
        distilled = distilled_set(union, ctx)
        distilled.save(run.distilled_file)
        return distilled


def _records(settings: Settings, stage: int) -> bool:
    """Whether a stage matches trajectories of its own: on other examples than the experts', or from
    other starts.
    """
    return settings.filter == "forgetting" or (stage > 1 and settings.conditioning == "on")


def _trajectories(run: Run, stage: int) -> list[Trajectory]:
    """What stage ``stage`` matches; of stage 0, whose networks have seen nothing, the experts."""
    if stage == 0 or not _records(run.settings, stage):
        return stored_experts(run)
    return list_trajectories(run.stage_trajectories_dir(stage))


def transition(
    run: Run, ctx: RunContext, union: UnionSet, examples: Examples, reporter: Reporter
) -> None:
    """Trajectories for the stage after ``union``: each start network is trained on the union, where
    there is one, and then, recorded, on the stage's real ``examples``. Starts are chained: they are
    those of the stage before, trained further.
    """
    settings, stage = ctx.settings, union.stages + 1
    conditioned = settings.conditioning == "on" and union.stages > 0
    starts, folder = (
        _trajectories(run, stage - 1 if conditioned else 0),
        run.stage_trajectories_dir(stage),
    )

    def start(group: range) -> Tensor:
        train_state = TrainState.start(
            torch.stack([starts[k].checkpoint(0) for k in group]).to(ctx.device)
        )
        if conditioned:
            generators = [ctx.generator("transition", stage, k) for k in group]
            ctx.train_on_union(
                train_state, *union.up_to(), union.lrs[-1], settings.transition_epochs, generators
            )
        return train_state.theta

    if examples.follow_from_starts:
        keep_starts(ctx, folder, start, reporter, f"starts of stage {stage}/{settings.stages}")
    record_trajectories(
        ctx,
        folder,
        start,
        settings.transition_real_epochs,
        f"stage-{stage}",
        reporter,
        f"transition to stage {stage}/{settings.stages}",
        examples.rows(stage),
    )


@dataclass(frozen=True)
class _Best:
    """The images that selection liked most so far."""

    images: Tensor
    labels: Tensor
    lr: float
    accuracy: float  # percent, mean over the selection networks
    iteration: int
    judged: int  # the iteration that was judged last, whether it was better or not


class _Selection:
    """Judges a stage's images as the final evaluation will: networks that were trained through the
    earlier unions are trained on this one and scored on the selection split.
    """

    def __init__(self, ctx: RunContext, union: UnionSet) -> None:
        self._ctx, self._union = ctx, union
        self._students = []
        for group in ctx.groups(ctx.settings.eval_networks):
            train_state = ctx.initial_state("selection", group)
            for stage in range(1, union.stages + 1):
                self._train(group, train_state, *union.up_to(stage), union.lrs[stage - 1], stage)
            self._students.append((group, train_state))

    def _train(
        self,
        group: range,
        train_state: TrainState,
        images: Tensor,
        labels: Tensor,
        lr: float,
        stage: int,
    ) -> None:
        generators = [self._ctx.generator("selection", j, stage) for j in group]
        self._ctx.train_on_union(
            train_state, images, labels, lr, self._ctx.settings.eval_epochs, generators
        )

    def score(self, union: UnionSet) -> float:
        """Return the mean accuracy in percent.

        Every candidate gets the same random values, so that scores can be compared.
        """
        validation, scores = self._ctx.selection_split, list[float]()
        for group, carried in self._students:
            train_state = carried.copy()
            self._train(group, train_state, *union.up_to(), union.lrs[-1], union.stages)
            scores += accuracies(
                self._ctx.engine, train_state.theta, validation.images, validation.labels
            )
        return sum(scores) / len(scores)


def _run_stage(
    run: Run,
    ctx: RunContext,
    union: UnionSet,
    trajectories: list[Trajectory],
    examples: Examples,
    reporter: Reporter,
) -> UnionSet:
    """Learns the images of the stage after ``union`` from ``examples``, matching ``trajectories``
    where the method does.
    """
    settings, stage = ctx.settings, union.stages + 1
    images, labels = _initial(run, ctx, examples.initial_rows(stage))
    conditions = union if settings.conditioning == "on" else empty_union(ctx)
    method = METHODS[settings.method.name](
        stage_problem(ctx, stage, examples.rows(stage), conditions, trajectories, images, labels)
    )
    best = _resume(run, stage, method)
    run.truncate_metrics(stage, method.iteration, -1 if best is None else best.judged)
    selection = _Selection(ctx, union)
    row: dict[str, Any] = {}  # of metrics.jsonl, the last iteration's
    try:
        with reporter.task(
            f"stage {stage}/{settings.stages}",
            total=settings.iterations,
            unit="iteration",
            done=method.iteration,
        ) as task:
            saved = time.monotonic()
            while True:
                if _is_judged(settings.eval_every, method.iteration, settings.iterations) and (
                    best is None or best.judged < method.iteration
                ):
                    best = _judge(run, selection, union, method, best, task)
                if method.iteration == settings.iterations:
                    break
                began = time.perf_counter()
                values = method.step()
                seconds = time.perf_counter() - began
                row = {"stage": stage, "iteration": method.iteration, **values, "seconds": seconds}
                row["memory"] = peak_memory(ctx.device)
                run.metrics.append(**row)
                task.advance(1, **values)
                if time.monotonic() - saved > settings.checkpoint_seconds:
                    _checkpoint(run, stage, method, best)
                    saved = time.monotonic()
    except BaseException:
        _checkpoint(run, stage, method, best)
        # An interrupt may come between an iteration, which the checkpoint holds, and its line, or
        # just after the line.
        if row and row not in run.metrics.read():
            run.metrics.append(**row)
        raise
    assert best is not None
    return union.extended(best.images, best.labels, best.lr)


def _initial(run: Run, ctx: RunContext, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Images as they are stored, which hold the real ones in ``rows`` of ``ctx.train`` (so many
    of each class, class by class), and their labels.
    """
    settings, each = ctx.settings, ctx.settings.factor**2
    groups = rows.view(-1, each).T  # [each, n]: of every stored image what its cells hold
    images, labels = (
        combine(ctx.train.images[groups.flatten()], settings.factor),
        ctx.train.labels[groups[0]],
    )
    if settings.labels != "hard":
        labels = soft_labels(ctx.engine, stored_experts(run), images)
    return images, labels


def _is_judged(every: int, iteration: int, last: int) -> bool:
    return iteration == last or (every > 0 and iteration % every == 0)


def _judge(
    run: Run,
    selection: _Selection,
    union: UnionSet,
    method: BaseMethod,
    best: _Best | None,
    task: Task,
) -> _Best:
    stage, lr = union.stages + 1, method.learning_rate
    score = selection.score(union.extended(method.images, method.labels, lr))
    run.metrics.append(stage=stage, iteration=method.iteration, selection_accuracy=score)
    task.advance(0, accuracy=score)
    # Break ties in favor of the later iteration; ties are common on small validation sets.
    if best is None or score >= best.accuracy:
        return _Best(
            method.images.clone(), method.labels, lr, score, method.iteration, method.iteration
        )
    return replace(best, judged=method.iteration)


def _checkpoint(run: Run, stage: int, method: BaseMethod, best: _Best | None) -> None:
    tensors = {f"method.{name}": tensor for name, tensor in method.state().items()}
    state: dict[str, float] = {}
    if best is not None:
        tensors |= {"best.images": best.images.cpu(), "best.labels": best.labels.cpu()}
        state = {
            "rate": best.lr,
            "accuracy": best.accuracy,
            "iteration": best.iteration,
            "judged": best.judged,
        }
    run.save_checkpoint(stage, tensors, state)


def _resume(run: Run, stage: int, method: BaseMethod) -> _Best | None:
    """Brings ``method`` to where an earlier process left it; the best images of then."""
    loaded = run.load_checkpoint(stage)
    if loaded is None:
        return None
    tensors, state = loaded
    try:
        method.load_state(
            {name[7:]: tensor for name, tensor in tensors.items() if name.startswith("method.")}
        )
    except KeyError as error:
        file = run.checkpoint_file(stage)
        raise UsageError(
            f"{file} must hold {error}, but another version wrote it; remove it to begin stage "
            f"{stage} again"
        ) from error
    if "best.images" not in tensors:
        return None
    images, labels = (
        tensors[f"best.{name}"].to(method.images.device) for name in ("images", "labels")
    )
    return _Best(
        images,
        labels,
        state["rate"],
        state["accuracy"],
        int(state["iteration"]),
        int(state["judged"]),
    )
