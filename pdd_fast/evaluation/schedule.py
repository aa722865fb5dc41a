"""Train fresh networks on a schedule of image sets and test them in between."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from pdd_fast.augmentation.dsa import augment
from pdd_fast.networks.zoo import accuracy, build
from pdd_fast.progressive.context import RunContext
from pdd_fast.training.sgd import accuracies


class Phase(NamedTuple):
    """Training on one image set, as a part of a schedule."""

    images: Tensor  # [n, C, H, W]
    labels: Tensor  # [n], or weights [n, classes]
    lr: float
    steps: int
    stops: list[int]  # numbers of steps after which to test
    rows: Tensor | None = None  # int64 [K, m] on the CPU, each network's images; None: all


def follow(network: str, ctx: RunContext, schedule: list[Phase], group: range) -> list[list[float]]:
    """Train a fresh network for each repeat in ``group`` on ``schedule`` and test it.

    Args:
        network: A name of :data:`pdd_fast.networks.zoo.TITLES`. The ConvNet trains on the run's
            engine; others train one after another with torch's optimizer and autograd.
        ctx: The run's context.
        schedule: The phases, in order.
        group: The repeats to train.

    Returns:
        For each network its test accuracy (%) at every stop.
    """
    if network == "convnet":
        return _follow_convnet(ctx, schedule, group)
    return [
        _follow_module(network, ctx, schedule, place, repeat) for place, repeat in enumerate(group)
    ]


def fresh_module(ctx: RunContext, network: str, repeat: int) -> nn.Module:
    """Return the untrained network of a repeat, the same on every device."""
    data, settings = ctx.data, ctx.settings
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        # torch.manual_seed would also change the random states of GPUs.
        torch.default_generator.manual_seed(ctx.seed("evaluation", repeat, "parameters", network))
        net = build(
            network,
            data.in_channels,
            data.num_classes,
            data.image_size,
            settings.width,
            settings.depth,
        )
    return net.to(ctx.device)


def _follow_convnet(ctx: RunContext, schedule: list[Phase], group: range) -> list[list[float]]:
    """Train the networks of a group in parallel on the run's engine; see :func:`follow`."""
    train_state, test = ctx.initial_state("evaluation", group), ctx.data.test
    scores: list[list[float]] = [[] for _ in group]
    for number, phase in enumerate(schedule):
        generators = [ctx.generator("evaluation", repeat, number) for repeat in group]
        seen = ctx.synthetic_sgd.run(
            train_state,
            phase.images,
            phase.labels,
            phase.lr,
            phase.steps,
            generators,
            phase.stops,
            phase.rows,
        )
        for theta in seen:
            found = accuracies(ctx.engine, theta, test.images, test.labels)
            for row, score in zip(scores, found, strict=True):
                row.append(score)
    return scores


def _follow_module(
    network: str, ctx: RunContext, schedule: list[Phase], place: int, repeat: int
) -> list[float]:
    """Train one network with torch's optimizer and return its accuracies; see :func:`follow`.

    Args:
        network: A name of :data:`pdd_fast.networks.zoo.TITLES`.
        ctx: The run's context.
        schedule: The phases, in order.
        place: Index of the repeat in its group, by which ``Phase.rows`` is indexed.
        repeat: The repeat, which fixes the random values.
    """
    net, sgd, test = fresh_module(ctx, network, repeat), ctx.synthetic_sgd, ctx.data.test
    scores = list[float]()
    optimizer = torch.optim.SGD(
        net.parameters(), lr=1.0, momentum=sgd.momentum, weight_decay=sgd.weight_decay
    )
    for number, phase in enumerate(schedule):
        every = torch.arange(len(phase.images), device="cpu")
        rows = every if phase.rows is None else phase.rows[place]
        generator, size = ctx.generator("evaluation", repeat, number), ctx.data.image_size
        # The learning rates come first, so that zip samples no batch beyond their end.
        steps = zip(
            sgd.lrs(phase.lr, phase.steps), _batches(rows, sgd.batch, generator), strict=False
        )
        for done, (lr, batch) in enumerate(steps, start=1):
            aug_params, index = sgd.dsa.sample(len(batch), size, generator), batch.to(ctx.device)
            optimizer.param_groups[0]["lr"] = lr
            optimizer.zero_grad()
            logits = net(augment(phase.images[index], aug_params))
            nn.functional.cross_entropy(logits, phase.labels[index]).backward()
            optimizer.step()
            if done in phase.stops:
                scores.append(accuracy(net, test.images, test.labels))
    return scores


def _batches(rows: Tensor, size: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Yield batches of ``rows`` without end; every epoch has a new order."""
    while True:
        yield from rows[torch.randperm(len(rows), generator=generator, device="cpu")].split(size)
