"""The growing union of a run's stages, as tensors to compute with."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from pdd_fast._version import __version__
from pdd_fast.distilled import DistilledSet, load_distilled
from pdd_fast.workbench import Workbench


@dataclass
class Union:
    """The images of the stages so far, on the run's device."""

    images: Tensor  # [n, C, H, W]
    labels: Tensor  # [n]
    stage: Tensor  # [n], 1-based
    rates: list[float] = field(default_factory=list)

    @classmethod
    def empty(cls, bench: Workbench) -> Union:
        train = bench.train
        return cls(train.images[:0].clone(), train.labels[:0].clone(), train.labels[:0].clone())

    @classmethod
    def load(cls, path: Path, bench: Workbench) -> Union:
        stored = load_distilled(path)
        images, labels, stage = (t.to(bench.device) for t in (stored.images, stored.labels, stored.stage))
        return cls(images, labels, stage, rates=stored.learning_rates.tolist())

    @property
    def stages(self) -> int:
        return len(self.rates)

    def up_to(self, stage: int) -> tuple[Tensor, Tensor]:
        """Images and labels of stages 1..``stage``; views, because an evaluation holds those of every stage at once:
        as copies, half as many images as all stages' number of them times the union."""
        return self._rows(self.stage <= stage)

    def only(self, stage: int) -> tuple[Tensor, Tensor]:
        """Images and labels of stage ``stage`` alone; views."""
        return self._rows(self.stage == stage)

    def _rows(self, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Images and labels of the rows in ``mask``, in stages of a run one after another."""
        rows = mask.nonzero().flatten().tolist()
        if rows and rows[-1] - rows[0] + 1 == len(rows):
            part = slice(rows[0], rows[-1] + 1)
            return self.images[part], self.labels[part]
        return self.images[mask], self.labels[mask]  # a set that was put together elsewhere

    def extended(self, images: Tensor, labels: Tensor, rate: float) -> Union:
        number = self.stage.new_full((len(labels),), self.stages + 1)
        return Union(
            torch.cat([self.images, images]),
            torch.cat([self.labels, labels]),
            torch.cat([self.stage, number]),
            [*self.rates, rate],
        )

    def distilled(self, bench: Workbench) -> DistilledSet:
        """As it is stored: nothing in it depends on when or how often a run was interrupted."""
        config = bench.config
        return DistilledSet(
            images=self.images.cpu(),
            labels=self.labels.cpu(),
            stage=self.stage.cpu(),
            learning_rates=torch.tensor(self.rates),
            normalisation=bench.data.normalisation,
            whitening=bench.data.whitening,
            metadata={
                "data": bench.data.name,
                "classes": list(bench.data.classes),
                "augmentation": {"strategy": config.augment, "mode": config.augment_mode},
                "network": bench.network,
                "base": config.base,
                "seed": config.seed,
                "pdd_fast": __version__,
            },
        )
