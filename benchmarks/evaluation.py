"""Measure one union evaluation.

Fresh networks train on the growing union, on real images instead, and on the last union alone, each
with the same number of SGD steps. The result is their test accuracies.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import pdd_fast
from pdd_fast.benchmarks import measure
from pdd_fast.benchmarks.cases import Case
from pdd_fast.benchmarks.fixtures import begin, ready, real_union
from pdd_fast.benchmarks.implementations import Implementation
from pdd_fast.benchmarks.measure import Job
from pdd_fast.benchmarks.plain_dsa import PlainSampler
from pdd_fast.benchmarks.plain_network import plain_convnet
from pdd_fast.benchmarks.plain_training import PlainTraining
from pdd_fast.data.union_set import UnionSet
from pdd_fast.evaluation.evaluate import evaluate_run
from pdd_fast.progressive.context import RunContext
from pdd_fast.progressive.union import distilled_set

Phase = tuple[Tensor, Tensor, float, int]  # images, labels, learning rate, steps


def student(ctx: RunContext, number: int, channels_last: bool) -> PlainTraining:
    """Return a fresh network to train on unions as the run's settings say."""
    settings = ctx.settings
    data = ctx.data
    net = plain_convnet(
        data.in_channels, data.num_classes, data.image_size, settings.width, settings.depth
    )
    pdd_fast.load_parameters(net, ctx.initial_parameters("evaluation", number).cpu())
    sampler = PlainSampler(ctx.dsa, ctx.device, torch.float32, number)
    generator = torch.Generator(ctx.device).manual_seed(number)
    return PlainTraining(
        net.to(ctx.device),
        sampler,
        generator,
        batch=settings.union_batch,
        momentum=settings.union_momentum,
        decay=settings.union_weight_decay,
        channels_last=channels_last,
    )


def schedules(ctx: RunContext, union: UnionSet) -> list[list[Phase]]:
    """Return three schedules: the growing union, as many real images, and the last union alone."""
    settings, train = ctx.settings, ctx.train
    counts = [
        settings.union_epochs * ctx.synthetic_sgd.steps_per_epoch(len(union.up_to(stage)[0]))
        for stage in range(1, union.stages + 1)
    ]
    groups = ctx.random_real_rows(settings.ipc_by_stage, "random images", 0)
    in_order, real = [], []
    for stage, count in enumerate(counts, start=1):
        rows = torch.cat(groups[:stage])
        in_order.append((*union.up_to(stage), union.lrs[stage - 1], count))
        real.append((train.images[rows], train.labels[rows], settings.inner_lr, count))
    return [in_order, real, [(union.images, union.labels, union.lrs[-1], sum(counts))]]


def plain(ctx: RunContext, union: UnionSet, channels_last: bool) -> list[float]:
    """Run the whole evaluation in eager PyTorch and return the test accuracies of every phase."""
    found, test = [], ctx.data.test
    for repeat in range(ctx.settings.repeats):
        for schedule in schedules(ctx, union):
            training = student(ctx, repeat, channels_last)
            for images, labels, lr, steps in schedule:
                training.run(images, labels, lr, steps)
                found.append(training.accuracy(test.images, test.labels))
    return found


def prepared(
    case: Case, implementation: Implementation, job: Job, folder: Path
) -> Callable[[], Any]:
    """Return the evaluation as one call."""
    own = implementation.options if implementation.ours else {}
    run, ctx = begin(case, job, folder, implementation.precision, **own)
    union = real_union(ctx, ctx.settings.stages)
    if not implementation.ours:
        # The package loads the data as part of an evaluation, so this baseline does too.
        return lambda: plain(
            RunContext.prepare(run.settings), union, implementation.options["channels_last"]
        )
    distilled_set(union, ctx).save(run.distilled_file)
    return lambda: evaluate_run(run)


def measured(case: Case, implementation: Implementation, job: Job) -> dict[str, Any]:
    """Measure one implementation."""
    with ready(prepared, case, implementation, job) as (call, memory):
        # No warm-up: an evaluation has hundreds of steps, and the slower first ones are part of it.
        taken = measure.repeated(call, job.device, most=1)
        return measure.sample({"evaluation": taken}, memory.found())
