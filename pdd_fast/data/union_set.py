"""The growing union of a run's stages, as tensors to compute with."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from pdd_fast.augmentation.multi_formation import decode, decode_labels


@dataclass
class UnionSet:
    """The images of the stages so far, on the run's device."""

    images: Tensor  # [n, C, H, W], as they are stored
    labels: Tensor  # [n], or probabilities [n, classes]
    stage: Tensor  # [n], 1-based
    lrs: list[float] = field(default_factory=list)
    factor: int = 1  # every stored image holds factor² (pdd_fast.augmentation.multi_formation)

    @property
    def stages(self) -> int:
        """Number of stages."""
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
        """Return images and labels of stage ``stage`` alone, views like those of :meth:`up_to`."""
        return self._seen(self.stage == stage)

    def _seen(self, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Images and labels of the rows in ``mask``, in stages of a run one after another."""
        rows = mask.nonzero().flatten().tolist()
        part: Tensor | slice = mask  # of a set that was put together elsewhere
        if rows and rows[-1] - rows[0] + 1 == len(rows):
            part = slice(rows[0], rows[-1] + 1)
        return decode(self.images[part], self.factor), decode_labels(self.labels[part], self.factor)

    def extended(self, images: Tensor, labels: Tensor, lr: float) -> UnionSet:
        """Return the union with another stage, whose networks are trained at ``lr``."""
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
