"""Class matching: learn pixels in [0, 1] by comparing real and synthetic images per class.

IDC and DM build on it. It needs no trajectories.
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
from pdd_fast.runtime.method_settings import MethodSettings
from pdd_fast.settings import Settings


class ClassMatchingSettings(ImageSgdSettings):
    """Settings that IDC and DM share."""

    real_batch: int = Field(64, ge=1, description="Real images per class in a batch.")
    synthetic_batch: int = Field(
        128, ge=1, description="Maximum number of decoded synthetic images per class in a batch."
    )
    start_networks: int = Field(
        0,
        ge=0,
        description="Start networks of a stage, used in turn; 0: a new one for every iteration.",
    )
    cutmix: float = Field(
        0.5, ge=0, le=1, description="Probability of CutMix in a training step of a start network."
    )

    def check_run(self, run: Settings) -> None:
        """Raise UsageError unless the run has hard labels, no whitening and no learned filter.

        Class matching trains no experts, whose predictions are the soft labels. It has no
        transitions, whose networks the filter "learned" asks which images they have learned. Its
        pixels lie in [0, 1], which excludes whitening.
        """
        super().check_run(run)
        self.require(run, labels=("hard",), whitening=("none",), filter=("none", "forgetting"))


class Learned(NamedTuple):
    """Immutable state of a method; every iteration makes a new one."""

    iteration: Tensor  # []
    pixels: Tensor  # [n, C, H, W] in [0, 1], multi-formation images not decoded
    momentum_buffer: Tensor  # [n, C, H, W]


class Synthetic(NamedTuple):
    """Synthetic images of one class, decoded and augmented."""

    images: Tensor  # [b, C, H, W]
    learned: Tensor  # int64, rows of images that belong to this stage


class ClassMatching(BaseMethod):
    """Base class of IDC and DM: start networks, batches of every class, and the state.

    A subclass implements :meth:`iterate`.

    Args:
        problem: The stage's inputs.
    """

    Settings: ClassVar[type[MethodSettings]] = ClassMatchingSettings
    settings: ClassMatchingSettings

    def __init__(self, problem: StageProblem) -> None:
        super().__init__(problem)
        own = self.settings
        self.starts = problem.start_networks(own.start_networks, own.cutmix)
        self.batches = ClassBatches(problem, self.settings)
        pixels = self.batches.pixels(problem.images)
        # Replaced as a whole at the end of an iteration, so that an interrupt never leaves half an
        # update.
        self.done = Learned(torch.tensor(0, device="cpu"), pixels, torch.zeros_like(pixels))

    @property
    def iteration(self) -> int:
        """Number of iterations done."""
        return int(self.done.iteration)

    @property
    def images(self) -> Tensor:
        """Current images of the stage [n, C, H, W], as a distilled set stores them."""
        return self.batches.images(self.done.pixels)

    @property
    def lr_img(self) -> float:
        """Learning rate of the images in this stage."""
        return self.settings.lr_img_at(self.problem.stage)

    @abstractmethod
    def iterate(self) -> dict[str, float]:
        """Run one iteration and return the result of :meth:`finish`."""

    def step(self) -> dict[str, float]:
        """Run :meth:`iterate`; an out-of-memory error names the settings to lower."""
        own, where = self.settings, f"stage {self.problem.stage}, iteration {self.iteration + 1}"
        lower = (
            f"real_batch (now {own.real_batch}), synthetic_batch (now {own.synthetic_batch}) or "
            f"width (now {self.problem.settings.width})"
        )
        with device_memory.explained(self.problem.device, where, lower):
            return self.iterate()

    def finish(self, loss: float, pixels: Tensor, momentum_buffer: Tensor) -> dict[str, float]:
        """Make the pixels, clamped to [0, 1], and the momentum buffer the new state.

        Args:
            loss: The iteration's matching loss.
            pixels: [n, C, H, W].
            momentum_buffer: [n, C, H, W].

        Returns:
            Values to report: "loss".

        Raises:
            RunError: The loss or a pixel is not finite.
        """
        number = self.iteration + 1
        if not math.isfinite(loss) or not bool(pixels.isfinite().all()):
            raise RunError(
                f"stage {self.problem.stage}, iteration {number}: the matching loss is {loss:g} "
                "and the images are no "
                f"longer finite; start again with a smaller lr_img (now {self.lr_img:g})"
            )
        # Contiguous, as tensors read from a checkpoint are: another memory layout would change the
        # order of summation, and a continued run would round differently.
        self.done = Learned(
            torch.tensor(number, device="cpu"),
            pixels.clamp(0, 1).contiguous(),
            momentum_buffer.contiguous(),
        )
        return {"loss": loss}

    def state(self) -> dict[str, Tensor]:
        """Return the state on the CPU; see :meth:`BaseMethod.state`."""
        return {name: tensor.cpu() for name, tensor in self.done._asdict().items()}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Restore a state; see :meth:`BaseMethod.load_state`."""
        device = self.done.pixels.device
        learned = (state[name].to(device) for name in ("pixels", "momentum_buffer"))
        self.done = Learned(state["iteration"], *learned)


class ClassBatches:
    """Sampler of a real and a synthetic batch for every class, with the same augmentation.

    All images of a class share their augmentation parameters, as in the published codes of DSA, DM
    and IDC. The comparison then depends on the content of the images alone.

    Args:
        problem: The stage's inputs.
        settings: The batch sizes.
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
        """Return normalized ``images`` [n, C, H, W] as pixels in [0, 1]."""
        return self._normalization.invert(images).clamp(0, 1)

    def images(self, pixels: Tensor) -> Tensor:
        """Return ``pixels`` [n, C, H, W] as a distilled set stores them; differentiable."""
        return self._normalization.apply(pixels)

    def drawn(
        self, pixels: Tensor, generator: torch.Generator
    ) -> tuple[list[Tensor], list[Synthetic]]:
        """Sample an augmented batch of real and one of synthetic images for every class.

        Args:
            pixels: [n, C, H, W], the images of this stage.
            generator: Source of the random values.

        Returns:
            For every class ``real_batch`` real images [b, C, H, W], or all if there are fewer; and
            at most ``synthetic_batch`` decoded synthetic images of all stages so far,
            differentiable with respect to ``pixels``.
        """
        settings, frozen = self._settings, self._frozen
        real = [_some(rows, settings.real_batch, generator) for rows in self._real_rows]
        synthetic = [_some(rows, settings.synthetic_batch, generator) for rows in self._rows]
        shared = self._problem.dsa.sample(len(real), self._problem.image_size, generator)
        index = torch.cat(synthetic)
        own = index >= len(frozen)
        # Rows are selected before they are put together: concatenating the whole union would copy
        # the earlier stages' images in every iteration.
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
