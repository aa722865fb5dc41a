"""Methods that learn pixels in [0, 1] by comparing synthetic with real images of a class, without
trajectories.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import ClassVar, NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from pdd_fast.augmentation.dsa import augment
from pdd_fast.augmentation.multi_formation import decode, decode_labels
from pdd_fast.methods.base import BaseMethod, ImageSgdSettings, StageProblem
from pdd_fast.runtime import device_memory
from pdd_fast.runtime.errors import RunError
from pdd_fast.settings import MethodSettings, Settings


class ClassMatchingSettings(ImageSgdSettings):
    """Settings that IDC and DM share."""

    real_batch: int = Field(
        64, ge=1, description="Real images of a class that synthetic ones are matched to."
    )
    synthetic_batch: int = Field(
        128,
        ge=1,
        description="Most synthetic images of a class in a batch, of the whole union and enlarged.",
    )
    start_networks: int = Field(
        0,
        ge=0,
        description="Start networks of a stage, taken in turn; 0: a new one for every iteration.",
    )
    cutmix: float = Field(
        0.5,
        ge=0,
        le=1,
        description="Probability that a training step of a start network mixes its images.",
    )

    def check_run(self, run: Settings) -> None:
        """Check the run's settings.

        Such a method has no experts, whose predictions soft labels are, and no transitions, which
        the filter asks what is learned; it works on pixels in [0, 1].
        """
        super().check_run(run)
        self.require(run, labels=("hard",), whitening=("none",), filter=("none", "forgetting"))


class Learned(NamedTuple):
    """All that such a method is. Never written to: an iteration gives a new one."""

    iteration: Tensor  # []
    pixels: Tensor  # [n, C, H, W] as they are stored
    momentum_buffer: Tensor  # [n, C, H, W]


class Synthetic(NamedTuple):
    """A class's synthetic images, as networks see them."""

    images: Tensor  # [b, C, H, W]
    learned: Tensor  # int64, which of them are this stage's


class ClassMatching(BaseMethod):
    """What they have in common: start networks, batches of every class, and what is kept. Each has
    its own :meth:`iterate`.
    """

    Settings: ClassVar[type[MethodSettings]] = ClassMatchingSettings
    settings: ClassMatchingSettings

    def __init__(self, problem: StageProblem) -> None:
        super().__init__(problem)
        own = self.settings
        self.starts = problem.start_networks(own.start_networks, own.cutmix)
        self.batches = ClassBatches(problem, self.settings)
        pixels = self.batches.pixels(problem.images)
        # Replaced as a whole at the end of an iteration, so that an interrupt never leaves half of
        # one.
        self.done = Learned(torch.tensor(0, device="cpu"), pixels, torch.zeros_like(pixels))

    @property
    def iteration(self) -> int:
        return int(self.done.iteration)

    @property
    def images(self) -> Tensor:
        return self.batches.images(self.done.pixels)

    @property
    def lr_img(self) -> float:
        return self.settings.lr_img_at(self.problem.stage)

    @abstractmethod
    def iterate(self) -> dict[str, float]:
        """An iteration, which ends with :meth:`finish`."""

    def step(self) -> dict[str, float]:
        own, where = self.settings, f"stage {self.problem.stage}, iteration {self.iteration + 1}"
        lower = (
            f"real_batch (now {own.real_batch}), synthetic_batch (now {own.synthetic_batch}) or "
            f"width (now {self.problem.settings.width})"
        )
        with device_memory.explained(self.problem.device, where, lower):
            return self.iterate()

    def finish(self, loss: float, pixels: Tensor, momentum_buffer: Tensor) -> dict[str, float]:
        """Ends an iteration: what it learned is what is there from now on.

        Raises:
            RunError: not all of it is finite.
        """
        number = self.iteration + 1
        if not math.isfinite(loss) or not bool(pixels.isfinite().all()):
            raise RunError(
                f"stage {self.problem.stage}, iteration {number}: the matching loss is {loss:g} "
                f"and the images are no "
                f"longer finite; start again with a smaller lr_img (now {self.lr_img:g})"
            )
        # As they come back from a file: in another order of memory products are summed in another
        # order.
        self.done = Learned(
            torch.tensor(number, device="cpu"),
            pixels.clamp(0, 1).contiguous(),
            momentum_buffer.contiguous(),
        )
        return {"loss": loss}

    def state(self) -> dict[str, Tensor]:
        return {name: tensor.cpu() for name, tensor in self.done._asdict().items()}

    def load_state(self, state: dict[str, Tensor]) -> None:
        device = self.done.pixels.device
        learned = (state[name].to(device) for name in ("pixels", "momentum_buffer"))
        self.done = Learned(state["iteration"], *learned)


class ClassBatches:
    """Draws, for every class, real images and synthetic ones of the whole union, augmented alike.

    Within a class every image gets the same augmentation, as in the published codes of DSA, DM and
    IDC: what is compared is then the images' content.
    """

    def __init__(self, problem: StageProblem, settings: ClassMatchingSettings) -> None:
        self._settings = settings
        self._problem, self._real = problem, problem.real
        self._normalization, self._factor = problem.normalization, problem.settings.factor
        self._frozen, frozen_labels = problem.union.up_to()
        labels = torch.cat([frozen_labels, decode_labels(problem.labels, self._factor)]).cpu()
        real_labels = problem.real.labels.cpu()
        classes = range(problem.num_classes)
        self._rows = [(labels == c).nonzero().flatten() for c in classes]
        self._real_rows = [(real_labels == c).nonzero().flatten() for c in classes]

    def pixels(self, images: Tensor) -> Tensor:
        """Normalized ``images`` [n, C, H, W] as pixels in [0, 1]."""
        return self._normalization.invert(images).clamp(0, 1)

    def images(self, pixels: Tensor) -> Tensor:
        """``pixels`` [n, C, H, W] as a distilled set stores them; differentiable."""
        return self._normalization.apply(pixels)

    def drawn(
        self, pixels: Tensor, generator: torch.Generator
    ) -> tuple[list[Tensor], list[Synthetic]]:
        """For every class ``real_batch`` real images [b, C, H, W] and at most ``synthetic_batch``
        synthetic ones, enlarged and of all stages so far; the latter differentiable with respect to
        ``pixels`` of this stage's.

        Real ones are as many as there are where a class has fewer.
        """
        settings, frozen = self._settings, self._frozen
        real = [_some(rows, settings.real_batch, generator) for rows in self._real_rows]
        synthetic = [_some(rows, settings.synthetic_batch, generator) for rows in self._rows]
        shared = self._problem.dsa.sample(len(real), self._problem.image_size, generator)
        index = torch.cat(synthetic)
        own = index >= len(frozen)
        # Chosen first: the earlier stages' images are many, and to put all in one tensor would copy
        # them every time.
        learned = decode(self.images(pixels), self._factor)[
            (index[own] - len(frozen)).to(pixels.device)
        ]
        chosen = frozen.new_empty(len(index), *frozen.shape[1:])
        chosen[(~own).nonzero().flatten().to(frozen.device)] = frozen[index[~own].to(frozen.device)]
        chosen = chosen.index_copy(0, own.nonzero().flatten().to(frozen.device), learned)
        real_images = self._real.images[torch.cat(real).to(frozen.device)]
        found = []
        for images, rows in ((real_images, real), (chosen, synthetic)):
            sizes = [len(each) for each in rows]
            whose = torch.repeat_interleave(
                torch.arange(len(rows), device="cpu"), torch.tensor(sizes, device="cpu")
            )
            found.append(augment(images, shared[whose]).split(sizes))
        learns = [(rows >= len(frozen)).nonzero().flatten().to(frozen.device) for rows in synthetic]
        return list(found[0]), [Synthetic(*both) for both in zip(found[1], learns, strict=True)]


def _some(rows: Tensor, most: int, generator: torch.Generator) -> Tensor:
    return (
        rows
        if len(rows) <= most
        else rows[torch.randperm(len(rows), generator=generator, device="cpu")[:most]]
    )
