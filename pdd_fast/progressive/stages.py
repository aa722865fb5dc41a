"""Run the stages of progressive dataset distillation, with any method.

The algorithm is that of Chen et al., ICLR 2024 (arXiv 2310.06982).

Random values depend only on the run's seed and on their purpose (pdd_fast.runtime.seeds). The state
of a run is therefore what lies in its directory, and a killed run continues with the same bits.
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
from pdd_fast.progressive.experts import ensure_experts, stored_experts
from pdd_fast.progressive.filters import FILTERS, Examples
from pdd_fast.progressive.problem import stage_problem
from pdd_fast.progressive.recording import keep_starts, record_trajectories
from pdd_fast.progressive.soft_labels import soft_labels
from pdd_fast.progressive.union import distilled_set, empty_union, load_union
from pdd_fast.runtime.devices import peak_memory, threads
from pdd_fast.runtime.errors import UsageError
from pdd_fast.runtime.progress import SILENT, Reporter, Task
from pdd_fast.settings import Settings
from pdd_fast.storage.distilled import DistilledSet
from pdd_fast.storage.run import Run
from pdd_fast.storage.trajectories import Trajectory, list_trajectories
from pdd_fast.training.sgd import TrainState, accuracies


def distill(run: Run, reporter: Reporter = SILENT) -> DistilledSet:
    """Make what ``run`` still lacks, and return the distilled set.

    A run consists of experts, stages and ``distilled.safetensors``.

    Raises:
        UsageError: Data are missing or too few, the settings do not fit them, or the method is not
            registered.
        RunError: The optimization left the range in which it can continue. The results so far are
            saved.
    """
    with run.lock(), threads(run.settings.threads):
        settings = run.settings
        if settings.method.name not in METHODS:
            raise UsageError(
                f"method must be {' or '.join(METHODS)}, got {settings.method.name!r}; register it "
                "first"
            )
        ctx, recorded = RunContext.of_run(run), METHODS[settings.method.name].needs_trajectories
        if settings.filter == "learned" and not recorded:
            raise UsageError(
                f"filter must be none or forgetting where method is {settings.method.name}, got "
                "learned"
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
    """Return whether a stage matches trajectories of its own.

    It does if its examples or its start networks differ from those of the experts.
    """
    return settings.filter == "forgetting" or (stage > 1 and settings.conditioning == "on")


def _trajectories(run: Run, stage: int) -> list[Trajectory]:
    """Return the trajectories that ``stage`` matches.

    For stage 0, whose networks are untrained, these are the experts.
    """
    if stage == 0 or not _records(run.settings, stage):
        return stored_experts(run)
    return list_trajectories(run.stage_trajectories_dir(stage))


def transition(
    run: Run, ctx: RunContext, union: UnionSet, examples: Examples, reporter: Reporter
) -> None:
    """Record the trajectories for the stage after ``union``.

    If there is a union to build on, each start network is first trained on it. The network is then
    trained on the stage's real ``examples``, and this part is recorded. Start networks are chained:
    those of a stage are those of the stage before, trained further.
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
        keep_starts(
            ctx, folder, start, reporter, f"start networks of stage {stage}/{settings.stages}"
        )
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
    """Images with the highest selection accuracy so far."""

    images: Tensor
    labels: Tensor
    lr: float
    accuracy: float  # percent, mean over the selection networks
    iteration: int
    judged: int  # last iteration that was judged, whether it was better or not


class _Selection:
    """Scores of a stage's images, computed as in the final evaluation.

    Networks that were trained on the earlier unions are trained on the current one and scored on
    the selection split.
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
    """Learn the images of the stage after ``union``, and return the extended union.

    The images are made from ``examples``. The method matches ``trajectories`` if it needs them.
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
    row: dict[str, Any] = {}  # line of metrics.jsonl for the last iteration
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
        # An interrupt may come before or after the line of an iteration is written. The checkpoint
        # holds the iteration in both cases.
        if row and row not in run.metrics.read():
            run.metrics.append(**row)
        raise
    assert best is not None
    return union.extended(best.images, best.labels, best.lr)


def _initial(run: Run, ctx: RunContext, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Return the initial images of a stage as they are stored, and their labels.

    ``rows`` of ``ctx.train`` has the same number of real images in each class, class by class. A
    stored image holds ``factor``² of them.
    """
    settings, each = ctx.settings, ctx.settings.factor**2
    groups = rows.view(-1, each).T  # [each, n], one row per cell of a stored image
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
    """Restore ``method`` from the stage's checkpoint, and return the best images so far.

    The result is None if there are none.
    """
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
            f"{file} must hold {error}, got a file of another version; remove it to begin stage "
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
