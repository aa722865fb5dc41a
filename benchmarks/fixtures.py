"""Create a run of two stages for the measurements of evaluation and of the second stage.

The dataset is the digits, or noise in the shape of photographs.
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
from pdd_fast.data.union_set import UnionSet
from pdd_fast.progressive.context import RunContext
from pdd_fast.progressive.union import empty_union
from pdd_fast.settings import resolve
from pdd_fast.storage.run import Run

CLASSES, TRAIN, TEST = 10, 60, 20  # noise images per class
DIGITS = 8  # height and width of an image in pixels
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
    """Write noise images for ``imagefolder:`` with a fixed seed and return their folder."""
    generator = np.random.default_rng(0)
    for split, count in (("train", TRAIN), ("test", TEST)):
        for label in range(CLASSES):
            place = folder / split / str(label)
            place.mkdir(parents=True)
            for k in range(count):
                Image.fromarray(generator.integers(0, 256, (size, size, 3), dtype=np.uint8)).save(
                    place / f"{k}.png"
                )
    return folder


def begin(
    case: Case, job: Job, folder: Path, precision: str = "float32", **options: Any
) -> tuple[Run, RunContext]:
    """Return a new run in ``folder`` with the case's values, and its run context.

    ``options`` are settings of the run. Options that a run does not know are ignored.
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
    """Yield the call that ``prepared`` makes in a temporary folder, and its memory measurement."""
    measure.set_precision(implementation.precision)
    with tempfile.TemporaryDirectory() as folder:
        call = prepared(case, implementation, job, Path(folder))
        if not implementation.ours:
            measure.load_lazily_loaded()
        yield call, measure.Memory(job.device)


def real_union(ctx: RunContext, stages: int) -> UnionSet:
    """Return a union of real images, with as many images as ``stages`` stages create."""
    groups = ctx.random_real_rows(ctx.settings.ipc_by_stage, "initial images")
    union = empty_union(ctx)
    for rows in groups[:stages]:
        union = union.extended(
            ctx.train.images[rows], ctx.train.labels[rows], ctx.settings.inner_lr
        )
    return union
