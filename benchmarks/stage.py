"""Measure one whole stage: the second of a run.

The transition trains every start network on the union and then, recorded, on real data. The
iterations match these trajectories. In the end a fresh network is trained on the images and scored
on the validation split.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import pdd_fast
from pdd_fast.benchmarks import measure
from pdd_fast.benchmarks.baselines import Problem, trained
from pdd_fast.benchmarks.cases import Case
from pdd_fast.benchmarks.evaluation import student
from pdd_fast.benchmarks.fixtures import begin, ready, real_union
from pdd_fast.benchmarks.implementations import Implementation
from pdd_fast.benchmarks.measure import Job
from pdd_fast.benchmarks.plain_dsa import PlainSampler
from pdd_fast.benchmarks.plain_network import plain_convnet
from pdd_fast.data.union_set import UnionSet
from pdd_fast.methods.mtt.settings import TrajectoryMatchingSettings
from pdd_fast.progressive.context import RunContext
from pdd_fast.progressive.experts import make_experts
from pdd_fast.progressive.stages import distill
from pdd_fast.progressive.union import distilled_set
from pdd_fast.storage.run import Run
from pdd_fast.storage.trajectories import list_trajectories


class PlainStage:
    """Run the second stage in plain PyTorch, as MTT's scripts do.

    Networks train with torch.optim.SGD, and create_graph=True goes through every unrolled step.
    """

    def __init__(
        self, ctx: RunContext, union: UnionSet, starts: list[Tensor], channels_last: bool
    ) -> None:
        self.ctx, self.union, self.starts, self.channels_last = (ctx, union, starts, channels_last)
        assert isinstance(ctx.settings.method, TrajectoryMatchingSettings)
        self.own = ctx.settings.method
        self.generator = torch.Generator().manual_seed(0)
        self.sampler = PlainSampler(ctx.dsa, ctx.device, torch.float32)

    def __call__(self) -> float:
        """Return the validation accuracy of the stage's images."""
        images, lr = self.learn([self.trajectory(start) for start in self.starts])
        return self.select(images, lr)

    def trajectory(self, start: Tensor) -> list[Tensor]:
        """Return checkpoints [P] on real data, from ``start`` trained on the union."""
        settings, union, train = self.ctx.settings, self.union, self.ctx.train
        training = student(self.ctx, 0, self.channels_last)
        pdd_fast.load_parameters(training.net, start.to(self.ctx.device))
        sgd = self.ctx.synthetic_sgd
        training.run(
            union.images,
            union.labels,
            union.lrs[-1],
            settings.transition_epochs * sgd.steps_per_epoch(len(union.images)),
        )
        training.optimizer = torch.optim.SGD(
            training.net.parameters(), settings.expert_lr, settings.expert_momentum
        )
        training.batch = settings.expert_batch
        found = [pdd_fast.flatten_parameters(training.net)]
        for _ in range(settings.transition_real_epochs):
            training.steps(
                train.images, train.labels, -(-len(train.images) // settings.expert_batch)
            )
            found.append(pdd_fast.flatten_parameters(training.net))
        return found

    def problem(self, trajectories: list[list[Tensor]], images: Tensor, labels: Tensor) -> Problem:
        """Sample one iteration: a trajectory, a start on it, batches of the union, and DSA."""
        settings, data, own = self.ctx.settings, self.ctx.data, self.own
        net = plain_convnet(
            data.in_channels, data.num_classes, data.image_size, settings.width, settings.depth
        )
        trajectory = trajectories[self.integer(len(trajectories))]
        first = self.integer(own.max_start_epoch + 1)
        size, batches = len(images) - len(self.union.images), list[Tensor]()
        while len(batches) < own.inner_steps:
            order = torch.randperm(len(images), generator=self.generator)
            batches += order[: len(images) // size * size].split(size)
        problem = Problem(
            net.to(images.device),
            trajectory[first],
            trajectory[first + own.expert_epochs],
            images.detach(),
            labels,
            torch.tensor(0.0),
            batches[: own.inner_steps],
            channels_last=self.channels_last,
        )
        H, W = images.shape[2:]
        problem.augments = [self.sampler.sample(size, (H, W)) for _ in problem.batches]
        return problem

    def integer(self, bound: int) -> int:
        """Return a random integer below ``bound``."""
        return int(torch.randint(bound, (), generator=self.generator))

    def learn(self, trajectories: list[list[Tensor]]) -> tuple[Tensor, float]:
        """Return the stage's images, and the learning rate to train on them."""
        settings, ctx, union, own = self.ctx.settings, self.ctx, self.union, self.own
        rows = ctx.random_real_rows(settings.ipc_by_stage, "initial images")[union.stages]
        images = ctx.train.images[rows].requires_grad_()
        labels = torch.cat([union.labels, ctx.train.labels[rows]])
        lr = torch.tensor(settings.inner_lr, device=ctx.device, requires_grad=True)
        optimizer = torch.optim.SGD(
            [{"params": [images], "lr": own.lr_img}, {"params": [lr], "lr": own.lr_lr}],
            momentum=own.momentum,
        )
        for _ in range(settings.iterations):
            # The earlier images are constants and cost no gradient.
            together = torch.cat([union.images, images])
            problem = self.problem(trajectories, together, labels)
            optimizer.zero_grad()
            problem.matching_loss(trained(problem, together, lr)).backward(inputs=[images, lr])
            optimizer.step()
        return images.detach(), float(lr.detach())

    def select(self, images: Tensor, lr: float) -> float:
        """Return the mean validation accuracy after training on the union with these images."""
        settings, ctx, union = self.ctx.settings, self.ctx, self.union
        labels = ctx.train.labels[
            ctx.random_real_rows(settings.ipc_by_stage, "initial images")[union.stages]
        ]
        both = union.extended(images, labels, lr)
        scores = []
        for number in range(settings.eval_networks):
            training = student(ctx, number, self.channels_last)
            for stage in range(1, both.stages + 1):
                seen, y = both.up_to(stage)
                steps = settings.eval_epochs * ctx.synthetic_sgd.steps_per_epoch(len(seen))
                training.run(seen, y, both.lrs[stage - 1], steps)
            scores.append(training.accuracy(ctx.selection_split.images, ctx.selection_split.labels))
        return sum(scores) / len(scores)


def before_the_stage(run: Run, ctx: RunContext) -> UnionSet:
    """Create the state before the second stage: experts, and real images as the first stage's."""
    make_experts(run)
    union = real_union(ctx, 1)
    distilled_set(union, ctx).save(run.stage_file(1))
    return union


def prepared(
    case: Case, implementation: Implementation, job: Job, folder: Path
) -> Callable[[], Any]:
    """Return the stage as one call, which can be made once."""
    own = implementation.options if implementation.ours else {}
    run, ctx = begin(case, job, folder, implementation.precision, **own)
    union = before_the_stage(run, ctx)
    if implementation.ours:
        return lambda: distill(run)
    starts = [trajectory.checkpoint(0) for trajectory in list_trajectories(run.experts_dir)]
    # The package loads the data as part of a stage, so this baseline does too.
    return lambda: PlainStage(
        RunContext.prepare(run.settings), union, starts, implementation.options["channels_last"]
    )()


def measured(case: Case, implementation: Implementation, job: Job) -> dict[str, Any]:
    """Measure one implementation."""
    with ready(prepared, case, implementation, job) as (call, memory):
        seconds, _ = measure.timed(call, job.device)
        return measure.sample({"stage": [seconds]}, memory.found())
