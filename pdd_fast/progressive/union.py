"""Load the union of a run's stages from files, and convert it for saving."""

from __future__ import annotations

from pathlib import Path

import torch

from pdd_fast._version import __version__
from pdd_fast.data.fingerprint import difference, identity
from pdd_fast.data.union_set import UnionSet
from pdd_fast.progressive.context import RunContext
from pdd_fast.runtime.errors import UsageError
from pdd_fast.storage.distilled import DistilledSet, labels_outside, load_distilled, preprocessing


def misfit(stored: DistilledSet, ctx: RunContext) -> str:
    """Return how ``stored`` does not fit the data of ``ctx``, e.g. by the shape of an image.

    The result is empty if everything fits.
    """
    shape, expected = tuple(stored.images.shape[1:]), tuple(ctx.data.test.images.shape[1:])
    name = stored.metadata.get("data", "unknown data")
    reason = difference(stored.metadata | {"data": name}, identity(ctx.data))
    if reason or shape != expected:
        return reason or f"{name} with images of shape {shape}, not {expected}"
    outside = labels_outside(stored.labels, ctx.data.num_classes)
    return f"{name} with other labels: {outside}" if outside else ""


def empty_union(ctx: RunContext) -> UnionSet:
    """Return the union of no stages."""
    train = ctx.train
    none, labels = train.labels[:0].clone(), train.labels[:0].clone()
    if ctx.settings.labels != "hard":
        labels = train.images.new_empty(0, ctx.data.num_classes)
    return UnionSet(train.images[:0].clone(), labels, none, factor=ctx.settings.factor)


def load_union(path: Path, ctx: RunContext) -> UnionSet:
    """Return the union in a file of the run that ``ctx`` belongs to.

    Raises:
        UsageError: The file is missing or damaged, or its images were made from other data or with
            other preprocessing than the run has now.
    """
    stored = load_distilled(path)
    if reason := misfit(stored, ctx):
        raise UsageError(f"{path} must be for the run's data, got one for {reason}")
    if not stored.is_seen_as(ctx.data):
        raise UsageError(
            f"{path} must hold images with {preprocessing(ctx.data)}, as the run's data are now, "
            f"got {preprocessing(stored)}; bring back the run's whitening.safetensors and data, "
            "or make the run again"
        )
    return union_of(stored, ctx)


def union_of(stored: DistilledSet, ctx: RunContext) -> UnionSet:
    """Return the union in ``stored``, on the device of ``ctx``."""
    images, labels, stage = (t.to(ctx.device) for t in (stored.images, stored.labels, stored.stage))
    return UnionSet(images, labels, stage, stored.learning_rates.tolist(), stored.factor)


def distilled_set(union: UnionSet, ctx: RunContext) -> DistilledSet:
    """Return ``union`` in the form that is saved.

    Nothing in it depends on the time or on interruptions of the run.
    """
    settings = ctx.settings
    return DistilledSet(
        images=union.images.cpu(),
        labels=union.labels.cpu(),
        stage=union.stage.cpu(),
        learning_rates=torch.tensor(union.lrs, device="cpu"),
        factor=union.factor,
        normalization=ctx.data.normalization,
        whitening=ctx.data.whitening,
        metadata={
            **identity(ctx.data),
            "augmentation": {"strategy": settings.augment, "mode": settings.augment_mode},
            "network": ctx.network,
            "labels": settings.labels,
            "method": settings.method.name,
            "seed": settings.seed,
            "pdd_fast": __version__,
        },
    )
