"""A run of two stages to evaluate, or to make the second stage of: the digits, or noise in the
shape of photographs.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from pdd_fast.benchmarks import measure
from pdd_fast.benchmarks.cases import Case
from pdd_fast.benchmarks.implementations import Implementation
from pdd_fast.benchmarks.measure import Job
from pdd_fast.progressive.context import RunContext
from pdd_fast.progressive.union import UnionSet
from pdd_fast.settings import resolve
from pdd_fast.storage.run import Run

CLASSES, TRAIN, TEST = 10, 60, 20  # images of noise in each class
DIGITS = 8  # pixels of their sides
SETTINGS: dict[str, Any] = {
    "stages": 2,
    "ipc": 4,
    "num_experts": 2,
    "expert_train_epochs": 4,
    "max_start_epoch": 1,
    "expert_epochs": 3,
    "expert_batch": 256,
    "eval_every": 0,
    "eval_networks": 1,
    "repeats": 1,
    "expert_lr": 0.02,
    "inner_lr": 0.02,
    "lr_img": 10.0,
    "lr_lr": 1e-5,
    "union_batch": 256,
    "augment": "color_crop_cutout_flip_scale_rotate",
}


def noise(folder: Path, size: int) -> Path:
    """Images of noise as ``imagefolder:`` reads them, the same ones every time."""
    draw = np.random.default_rng(0)
    for split, count in (("train", TRAIN), ("test", TEST)):
        for label in range(CLASSES):
            place = folder / split / str(label)
            place.mkdir(parents=True)
            for k in range(count):
                Image.fromarray(draw.integers(0, 256, (size, size, 3), dtype=np.uint8)).save(
                    place / f"{k}.png"
                )
    return folder


def begin(
    case: Case, job: Job, folder: Path, precision: str = "float32", **options: Any
) -> tuple[Run, RunContext]:
    """A new run in ``folder`` with a case's numbers, and what it works with.

    Args:
        options: settings of the run; those that a run does not know are left out.
    """
    data = "digits" if case.size == DIGITS else f"imagefolder:{noise(folder / 'data', case.size)}"
    epochs = case.epochs or 50
    settings = resolve(
        **SETTINGS,
        dataset=data,
        width=case.width,
        depth=case.depth,
        union_epochs=epochs,
        eval_epochs=epochs,
        transition_epochs=epochs,
        iterations=case.iterations,
        inner_steps=case.steps or 1,
        device=str(job.device),
        threads=job.threads,
        precision=precision,
        **options,
    )
    return Run.create(folder / "run", settings), RunContext.prepare(settings)


@contextmanager
def ready(
    prepared: Callable[[Case, Implementation, Job, Path], Callable[[], Any]],
    case: Case,
    implementation: Implementation,
    job: Job,
) -> Iterator[tuple[Callable[[], Any], measure.Memory]]:
    """The call that ``prepared`` gives for a folder of its own, and the memory from here on."""
    measure.set_precision(implementation.precision)
    with tempfile.TemporaryDirectory() as folder:
        call = prepared(case, implementation, job, Path(folder))
        if not implementation.ours:
            measure.load_lazily_loaded()
        yield call, measure.Memory(job.device)


def real_union(ctx: RunContext, stages: int) -> UnionSet:
    """Real images in the place of learned ones, as many as ``stages`` stages make."""
    groups = ctx.random_real_rows(ctx.settings.ipc_by_stage, "initial images")
    union = UnionSet.empty(ctx)
    for rows in groups[:stages]:
        union = union.extended(
            ctx.train.images[rows], ctx.train.labels[rows], ctx.settings.inner_lr
        )
    return union
