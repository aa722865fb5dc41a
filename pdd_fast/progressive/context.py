"""Run context: data, network, augmentation and device, prepared once from the settings."""

from __future__ import annotations

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

# Maximum number of networks that a captured graph trains on a GPU. A step of 16 networks of width
# 128 on 256 images of 32×32 takes 1.2 TFLOP, which is milliseconds on any GPU. The launch of the
# graph no longer matters then, and with more networks an interruption would only lose more work.
_MOST_SIDE_BY_SIDE = 16


@dataclass(frozen=True)
class RunContext:
    """Data, network, augmentation and device of a run.

    A context is immutable. All its tensors lie on ``device``.
    """

    settings: Settings
    device: torch.device
    data: ImageData
    engine: engines.Engine
    dsa: DSA
    side_by_side: int  # number of networks to train in parallel

    @classmethod
    def prepare(cls, settings: Settings, folder: Path | None = None) -> RunContext:
        """Load the data, build the network, and return the run context.

        Args:
            settings: Settings of the run.
            folder: Run directory, in which the whitening is saved once it is fitted. None: do not
                save it.

        Raises:
            UsageError: The data are missing or do not fit the settings, or the device cannot be
                used.
        """
        where = resolve_device(settings.device)
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
        with torch.device("cpu"):  # The caller may have set another default device.
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
        """Return the context of a run, and check that its data are those it was begun with.

        The data may lie in another folder than before.

        Args:
            run: Run to prepare.
            settings: Settings to use instead of the run's own.
            to_judge: Whether the run is finished and is only evaluated. Nothing is written to it
                then, and its images may be in another order.

        Raises:
            UsageError: As in :meth:`prepare`, or the data differ.
        """
        ctx = cls.prepare(settings or run.settings, run.path)
        if reason := difference(run.data, identity(ctx.data), in_order=not to_judge):
            raise UsageError(
                f"dataset must be the one that {run.path} was begun with, got another: {reason}; "
                f"name its folder with --dataset {FOLDER}DIR or --data-dir DIR"
            )
        if not to_judge:
            run.note_data(identity(ctx.data))
        return ctx

    @property
    def train(self) -> Split:
        """Return the split for training experts and transitions and for taking real images."""
        return self.data.full_train if self.settings.selection_split == "test" else self.data.train

    @property
    def selection_split(self) -> Split:
        """Return the split by which the best images are chosen."""
        return self.data.test if self.settings.selection_split == "test" else self.data.validation

    @property
    def network(self) -> dict[str, Any]:
        """Return the description of the network that files with weights or images store."""
        return {
            "name": "ConvNet",
            "in_channels": self.data.in_channels,
            "num_classes": self.data.num_classes,
            "image_size": list(self.data.image_size),
            "width": self.settings.width,
            "depth": self.settings.depth,
        }

    def groups(self, count: int) -> list[range]:
        """Split the numbers below ``count`` into groups of networks that train in parallel."""
        size = self.side_by_side
        return [range(first, min(first + size, count)) for first in range(0, count, size)]

    def seed(self, *purpose: str | int) -> int:
        """Return the seed for ``purpose``, derived from the run's seed."""
        return seeds.derive(self.settings.seed, *purpose)

    def generator(self, *purpose: str | int) -> torch.Generator:
        """Return a new generator for ``purpose``, derived from the run's seed."""
        return seeds.generator(self.settings.seed, *purpose)

    def initial_parameters(self, *purpose: str | int) -> Tensor:
        """Return randomly initialized parameters [P]."""
        return initial_parameters(self.engine.net, self.seed(*purpose, "parameters"))

    def initial_state(self, purpose: str, numbers: Sequence[int]) -> TrainState:
        """Return randomly initialized networks with zero momentum buffers.

        The parameters of each network depend on its own number alone.
        """
        return TrainState.start(
            torch.stack([self.initial_parameters(purpose, number) for number in numbers])
        )

    @property
    def real_sgd(self) -> Sgd:
        """Return the SGD that trains networks on real data."""
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
        """Return the SGD that trains networks on a union.

        Transition, selection and evaluation use the same one.
        """
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
        """Train networks on a union with :attr:`synthetic_sgd`, in place.

        The learning rate is ``lr`` in the first half of the ``epochs`` epochs, and a tenth of it in
        the second half.
        """
        sgd = self.synthetic_sgd
        steps = epochs * sgd.steps_per_epoch(len(images))
        sgd.run(train_state, images, labels, lr, steps, generators)

    def random_real_rows(self, per_class: Sequence[int], *purpose: str | int) -> list[Tensor]:
        """Return disjoint random groups of rows of :attr:`train`.

        Group i holds ``per_class[i]`` images of each class, class by class. No image occurs twice.
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
    """Return the file that holds a run's whitening.

    If the run has lost the file, one of its distilled sets holds the whitening too.
    """
    names = ("whitening.safetensors", "distilled.safetensors", "stage-1/distilled.safetensors")
    return next((folder / name for name in names if (folder / name).exists()), folder / names[0])


def _fitting(settings: Settings, net: ConvNet, engine: engines.Engine, device: torch.device) -> int:
    """Choose the default number of networks to train in parallel.

    It is 1 on the CPU, where a step needs no launch that networks could share.
    """
    batch = max(settings.expert_batch, settings.union_batch)
    shape = engines.PassShape(batch, (net.in_channels, *net.image_size), torch.float32, device)
    one, two = (training_bytes(engine, shape, networks) for networks in (1, 2))
    return device_memory.largest_group(two - one, device, _MOST_SIDE_BY_SIDE, 2 * one - two)
