"""Which real examples a stage is made from: easy ones first, harder ones later, by how often networks forget them.

An example is forgotten at an epoch after which a network gets it wrong that got it right an epoch before (Toneva et
al., ICLR 2019, arXiv 1812.05159). Stage s takes the examples of scores in [w(s − 1), ws), the last stage all from there
on (Chen et al., ICLR 2024). Everything of a stage is made from them: the images it starts from, and the real epochs of
the trajectories that it matches.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from pdd_fast.data import Split
from pdd_fast.engines import Engine
from pdd_fast.errors import UsageError
from pdd_fast.files import read_tensors, save_tensors
from pdd_fast.reporting import Reporter
from pdd_fast.trajectories import Trajectory
from pdd_fast.workbench import Workbench

# Of every class a stage has at least so many examples; where a band has fewer, those of the nearest scores join.
_FEWEST = 10
_BATCH = 1000  # images whose logits are made at once


def times_forgotten(engine: Engine, trajectory: Trajectory, split: Split, device: torch.device) -> Tensor:
    """How often the network of ``trajectory`` forgot each example, float32 [n] on the CPU; as often as it had epochs,
    which is more than any, where it never got it right."""
    count, before = torch.zeros(len(split)), torch.zeros(len(split), dtype=torch.bool)
    ever = before.clone()
    for epoch in range(trajectory.epochs + 1):
        theta = trajectory.checkpoint(epoch).to(device)
        right = torch.cat(
            [
                engine.logits(theta, images).argmax(1) == labels
                for images, labels in zip(split.images.split(_BATCH), split.labels.split(_BATCH), strict=True)
            ]
        ).cpu()
        count += before & ~right
        ever |= right
        before = right
    return torch.where(ever, count, float(trajectory.epochs))


def forgetting_scores(bench: Workbench, experts: Sequence[Trajectory], file: Path, reporter: Reporter) -> Tensor:
    """The mean over all experts of :func:`times_forgotten`, [n] of the examples of ``bench.train``.

    Args:
        file: where they are kept, expert by expert, so that no work is lost.

    Raises:
        UsageError: what is kept is of other examples or experts.
    """
    split, total, done = bench.train, torch.zeros(len(bench.train), dtype=torch.float64), 0
    whose = {"data": bench.data.name, "experts": len(experts), "select": bench.config.select}
    if file.exists():
        tensors, metadata = read_tensors(file)
        total, done = tensors.get("total", total[:0]), int(metadata.get("done", 0))
        found = {key: metadata.get(key) for key in whose}
        if found != whose or total.shape != (len(split),):
            raise UsageError(f"{file} must be for {len(split)} examples and {whose}, got {len(total)} and {found}")
    with reporter.task("forgetting scores", total=len(experts), unit="network", done=done) as task:
        for number in range(done, len(experts)):
            total = total + times_forgotten(bench.engine, experts[number], split, bench.device)
            save_tensors(file, {"total": total}, whose | {"done": number + 1})
            task.advance(1)
    return (total / len(experts)).float()


def band(scores: Tensor, labels: Tensor, stage: int, stages: int, width: float, least: int) -> Tensor:
    """The examples of a stage, bool [n]: of scores in [width·(stage − 1), width·stage), in the last stage all from
    there on, and in classes with fewer than ``least`` of them as many more as are missing, by how far off they are."""
    low, high = width * (stage - 1), float("inf") if stage == stages else width * stage
    inside = (scores >= low) & (scores < high)
    distance = torch.where(scores < low, low - scores, scores - high)
    for label in labels.unique().tolist():
        of_class = labels == label
        missing = least - int((inside & of_class).sum())
        if missing > 0:
            rows = (of_class & ~inside).nonzero().flatten()
            nearest = distance[rows].argsort(stable=True)[:missing]
            inside[rows[nearest]] = True
    return inside


def stage_bands(bench: Workbench, scores: Tensor) -> list[Tensor]:
    """The examples of every stage, bool [n] each."""
    config = bench.config
    least = max(_FEWEST, config.ipc)  # enough for images that no other stage starts from
    labels = bench.train.labels.cpu()
    return [
        band(scores, labels, stage, config.stages, config.filter_band, least) for stage in range(1, config.stages + 1)
    ]


def initial_rows(bench: Workbench, bands: Sequence[Tensor]) -> list[Tensor]:
    """For every stage rows of ``bench.train`` to start from, class by class, out of its band; no image twice."""
    labels, found = bench.train.labels.cpu(), []
    free = torch.ones(len(labels), dtype=torch.bool)
    for stage, (count, inside) in enumerate(zip(bench.config.ipc_by_stage, bands, strict=True), start=1):
        draw, own = bench.generator("initial images", stage), list[Tensor]()
        for label in range(bench.data.num_classes):
            rows = (inside & free & (labels == label)).nonzero().flatten()
            own.append(rows[torch.randperm(len(rows), generator=draw)[:count]])
        found.append(torch.cat(own).to(bench.device))
        free[found[-1].cpu()] = False
    return found
