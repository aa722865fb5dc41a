"""What every part of a run works with: data, network, augmentation and device, set up once from its
configuration.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pdd_fast import engines
from pdd_fast.augmentation.dsa import DSA
from pdd_fast.data import ImageData, Split, load
from pdd_fast.data.fingerprint import difference, identity
from pdd_fast.networks.convnet import ConvNet
from pdd_fast.networks.parameters import initial_parameters
from pdd_fast.runtime import device_memory, precision, seeds
from pdd_fast.runtime.devices import resolve_device
from pdd_fast.runtime.errors import UsageError
from pdd_fast.runtime.paths import FOLDER
from pdd_fast.settings import Settings
from pdd_fast.storage.run import Run
from pdd_fast.training.memory import training_bytes
from pdd_fast.training.sgd import Sgd, TrainState

# Of networks trained side by side on a GPU. A step of 16 of width 128 on 256 images of 32×32 is 1.2
# TFLOP, milliseconds on any of them: launches no longer count, and more networks would only make an
# interruption lose more.
_MOST_SIDE_BY_SIDE = 16


@dataclass(frozen=True)
class RunContext:
    """Everything on ``device``; nothing here changes while a run goes on."""

    settings: Settings
    device: torch.device
    data: ImageData
    engine: engines.Engine
    dsa: DSA
    side_by_side: int  # networks that are trained at once

    @classmethod
    def prepare(cls, settings: Settings, folder: Path | None = None) -> RunContext:
        """Loads the data, builds the network, and sets the process's number of threads where the
        configuration has one.

        Args:
            folder: of the run, where the whitening is kept once it was fitted.

        Raises:
            UsageError: data are missing or do not fit the configuration, or the device cannot be
                used.
        """
        where = resolve_device(settings.device)
        if settings.threads:
            torch.set_num_threads(settings.threads)
        images = load(
            settings.dataset,
            settings.data_dir,
            settings.validation_fraction,
            settings.whitening,
            None if folder is None else _whitening_file(folder),
            settings.normalization,
            settings.whitening_epsilon,
        )
        side = min(images.image_size)
        if side < 2**settings.depth:
            raise UsageError(
                f"depth must be at most {side.bit_length() - 1} for images of {side} pixels, got "
                f"{settings.depth}"
            )
        if settings.factor > side:
            raise UsageError(
                f"factor must be at most {side} for images of {side} pixels, got {settings.factor}"
            )
        with torch.device("cpu"):  # whatever the caller's default device is
            net = ConvNet(
                images.in_channels,
                images.num_classes,
                images.image_size,
                settings.width,
                settings.depth,
            )
        net = net.to(where)
        engine = engines.choose(
            net, settings.engine, precision.resolve(settings.precision, where), settings.convolution
        )
        dsa = DSA(settings.augment, mode=settings.augment_mode)
        together = settings.side_by_side or _fitting(settings, net, engine, where)
        return cls(settings, where, images.to(where), engine, dsa, together)

    @classmethod
    def of_run(
        cls, run: Run, settings: Settings | None = None, to_judge: bool = False
    ) -> RunContext:
        """:meth:`prepare` for a run, whose data must be those that it was begun with, wherever they
        lie now.

        Args:
            config: in place of the run's own.
            to_judge: the run is finished: nothing in it is written, and its images may lie in
                another order.

        Raises:
            UsageError: as :meth:`prepare`; or the data are others.
        """
        ctx = cls.prepare(settings or run.settings, run.path)
        if reason := difference(run.data, identity(ctx.data), in_order=not to_judge):
            raise UsageError(
                f"dataset must be what {run.path} was begun with, got another in its place: "
                f"{reason}; say with "
                f"--dataset {FOLDER}DIR or --data-dir DIR where it lies now"
            )
        if not to_judge:
            run.note_data(identity(ctx.data))
        return ctx

    @property
    def train(self) -> Split:
        """What experts and transitions are trained on and real images are taken from."""
        return self.data.full_train if self.settings.selection_split == "test" else self.data.train

    @property
    def selection_split(self) -> Split:
        """What the best images are chosen by."""
        return self.data.test if self.settings.selection_split == "test" else self.data.validation

    @property
    def network(self) -> dict[str, Any]:
        """The network in words, for the files that hold its weights or images made for it."""
        return {
            "name": "ConvNet",
            "in_channels": self.data.in_channels,
            "num_classes": self.data.num_classes,
            "image_size": list(self.data.image_size),
            "width": self.settings.width,
            "depth": self.settings.depth,
        }

    def groups(self, count: int) -> list[range]:
        """The numbers below ``count`` in groups that are trained side by side: always the same,
        because networks in a group of another size are rounded differently.
        """
        size = self.side_by_side
        return [range(first, min(first + size, count)) for first in range(0, count, size)]

    def seed(self, *purpose: str | int) -> int:
        return seeds.derive(self.settings.seed, *purpose)

    def generator(self, *purpose: str | int) -> torch.Generator:
        return seeds.generator(self.settings.seed, *purpose)

    def initial_parameters(self, *purpose: str | int) -> Tensor:
        """Freshly drawn parameters [P]."""
        return initial_parameters(self.engine.net, self.seed(*purpose, "parameters"))

    def initial_state(self, purpose: str, numbers: Sequence[int]) -> TrainState:
        """Freshly drawn networks at rest, each by its own number."""
        return TrainState.start(
            torch.stack([self.initial_parameters(purpose, number) for number in numbers])
        )

    @property
    def real_sgd(self) -> Sgd:
        """How networks are trained on real data."""
        settings = self.settings
        return Sgd(
            self.engine,
            self.dsa,
            settings.expert_batch,
            settings.expert_momentum,
            graph=settings.graph != "off",
        )

    @property
    def synthetic_sgd(self) -> Sgd:
        """How networks are trained on a union: transition, selection and evaluation alike."""
        settings = self.settings
        momentum, decay = settings.union_momentum, settings.union_weight_decay
        return Sgd(
            self.engine,
            self.dsa,
            settings.union_batch,
            momentum,
            decay,
            graph=settings.graph != "off",
        )

    def train_on_union(
        self,
        train_state: TrainState,
        images: Tensor,
        labels: Tensor,
        lr: float,
        epochs: int,
        generators: Sequence[torch.Generator],
    ) -> None:
        """``epochs`` epochs of :attr:`synthetic_sgd` at ``lr``, a tenth of it in the second
        half."""
        sgd = self.synthetic_sgd
        steps = epochs * sgd.steps_per_epoch(len(images))
        sgd.run(train_state, images, labels, lr, steps, generators)

    def random_real_rows(self, per_class: Sequence[int], *purpose: str | int) -> list[Tensor]:
        """For every group of ``per_class`` images a class: rows of :attr:`train`, class by class,
        no image twice.
        """
        generator = self.generator(*purpose)
        groups: list[list[Tensor]] = [[] for _ in per_class]
        for label in range(self.data.num_classes):
            rows = self.train.rows_of(label).cpu()
            order = rows[torch.randperm(len(rows), generator=generator, device="cpu")]
            for group, part in zip(
                groups, order[: sum(per_class)].split(list(per_class)), strict=True
            ):
                group.append(part)
        return [torch.cat(group).to(self.device) for group in groups]


def _whitening_file(folder: Path) -> Path:
    """Return where the whitening of a run is kept: also in its distilled sets, for a run that has
    lost the file.
    """
    names = ("whitening.safetensors", "distilled.safetensors", "stage-1/distilled.safetensors")
    return next((folder / name for name in names if (folder / name).exists()), folder / names[0])


def _fitting(settings: Settings, net: ConvNet, engine: engines.Engine, device: torch.device) -> int:
    """How many networks to train side by side where nobody said.

    1 on the CPU, where it pays for images as small as digits alone: a step of four took 0.6 of
    their time one by one at width 32 on 8×8, 1.0 at width 128 on 32×32, and 1.7 at width 32 on
    32×32 (one thread).
    """
    batch = max(settings.expert_batch, settings.union_batch)
    shape = engines.PassShape(batch, (net.in_channels, *net.image_size), torch.float32, device)
    size = training_bytes(engine, shape)
    # Libraries count a tensor's numbers in 32 bits: 16 networks of width 128 on 256 images of 64×64
    # are one too many.
    largest = batch * settings.width * math.prod(net.image_size)
    return device_memory.largest_group(
        size, device, max(1, min(_MOST_SIDE_BY_SIDE, (2**31 - 1) // largest))
    )
