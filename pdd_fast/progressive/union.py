"""The growing union of a run's stages, as tensors to compute with."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from pdd_fast._version import __version__
from pdd_fast.augmentation.multi_formation import decode, decode_labels
from pdd_fast.data.fingerprint import difference, identity
from pdd_fast.progressive.context import RunContext
from pdd_fast.runtime.errors import UsageError
from pdd_fast.storage.distilled import DistilledSet, labels_outside, load_distilled, preprocessing


def misfit(stored: DistilledSet, ctx: RunContext) -> str:
    """Say what of ``stored`` does not fit the data of ``ctx``, e.g. the shape of an image; ""
    where all does.
    """
    shape, expected = tuple(stored.images.shape[1:]), tuple(ctx.data.test.images.shape[1:])
    name = stored.metadata.get("data", "unknown data")
    reason = difference(stored.metadata | {"data": name}, identity(ctx.data))
    if reason or shape != expected:
        return reason or f"{name} with images of shape {shape}, not {expected}"
    outside = labels_outside(stored.labels, ctx.data.num_classes)
    return f"{name} with other labels: {outside}" if outside else ""


@dataclass
class UnionSet:
    """The images of the stages so far, on the run's device."""

    images: Tensor  # [n, C, H, W], as they are stored
    labels: Tensor  # [n], or probabilities [n, classes]
    stage: Tensor  # [n], 1-based
    lrs: list[float] = field(default_factory=list)
    factor: int = 1  # every stored image holds factor² (pdd_fast.augmentation.multi_formation)

    @classmethod
    def empty(cls, ctx: RunContext) -> UnionSet:
        train = ctx.train
        none, labels = train.labels[:0].clone(), train.labels[:0].clone()
        if ctx.settings.labels != "hard":
            labels = train.images.new_empty(0, ctx.data.num_classes)
        return cls(train.images[:0].clone(), labels, none, factor=ctx.settings.factor)

    @classmethod
    def load(cls, path: Path, ctx: RunContext) -> UnionSet:
        """Return the union in a file of the run that ``ctx`` is of.

        Raises:
            UsageError: it is missing or damaged, or its images were made of other data than the
                run's, or in another way than the run's data are now.
        """
        stored = load_distilled(path)
        if reason := misfit(stored, ctx):
            raise UsageError(f"{path} must be for the run's data, got one for {reason}")
        if not stored.is_seen_as(ctx.data):
            raise UsageError(
                f"{path} must hold images with {preprocessing(ctx.data)}, as the run's data are "
                f"now, got "
                f"{preprocessing(stored)}; bring back the run's whitening.safetensors and data, "
                f"or make the run again"
            )
        return cls.of(stored, ctx)

    @classmethod
    def of(cls, stored: DistilledSet, ctx: RunContext) -> UnionSet:
        """What ``stored`` holds, on the device of ``ctx``."""
        images, labels, stage = (
            t.to(ctx.device) for t in (stored.images, stored.labels, stored.stage)
        )
        return cls(images, labels, stage, stored.learning_rates.tolist(), stored.factor)

    @property
    def stages(self) -> int:
        return len(self.lrs)

    @property
    def sizes(self) -> list[int]:
        """How many images networks are trained on, of stages 1..s for every s."""
        per_stage = torch.bincount(self.stage, minlength=self.stages + 1)[1:]
        return (per_stage.cumsum(0) * self.factor**2).tolist()

    def up_to(self, stage: int | None = None) -> tuple[Tensor, Tensor]:
        """Images and labels of stages 1..``stage`` (None: all), as networks are trained on them.

        Views where nothing has to be decoded, because an evaluation holds those of every stage at
        once: as copies, half as many images as all stages' number of them times the union.
        """
        return self._seen(self.stage <= (self.stages if stage is None else stage))

    def only(self, stage: int) -> tuple[Tensor, Tensor]:
        """Images and labels of stage ``stage`` alone, as networks are trained on them; views like
        :meth:`up_to`.
        """
        return self._seen(self.stage == stage)

    def _seen(self, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Images and labels of the rows in ``mask``, in stages of a run one after another."""
        rows = mask.nonzero().flatten().tolist()
        part: Tensor | slice = mask  # of a set that was put together elsewhere
        if rows and rows[-1] - rows[0] + 1 == len(rows):
            part = slice(rows[0], rows[-1] + 1)
        return decode(self.images[part], self.factor), decode_labels(self.labels[part], self.factor)

    def extended(self, images: Tensor, labels: Tensor, lr: float) -> UnionSet:
        number = self.stage.new_full((len(labels),), self.stages + 1)
        return UnionSet(
            torch.cat([self.images, images]),
            torch.cat([self.labels, labels]),
            torch.cat([self.stage, number]),
            [
                *self.lrs,
                torch.tensor(lr, dtype=torch.float32, device="cpu").item(),
            ],  # as it is stored
            self.factor,
        )

    def distilled(self, ctx: RunContext) -> DistilledSet:
        """As it is stored: nothing in it depends on when or how often a run was interrupted."""
        settings = ctx.settings
        return DistilledSet(
            images=self.images.cpu(),
            labels=self.labels.cpu(),
            stage=self.stage.cpu(),
            learning_rates=torch.tensor(self.lrs, device="cpu"),
            factor=self.factor,
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
