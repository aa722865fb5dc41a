"""Labelled images in memory, and how training data are split."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from pdd_fast.data.normalisation import Normalisation
from pdd_fast.data.whitening import Whitening
from pdd_fast.errors import UsageError


@dataclass(frozen=True)
class Split:
    """Images and labels, each one tensor on one device."""

    images: Tensor  # [n, C, H, W] float32, normalised and, on request, whitened
    labels: Tensor  # [n] int64

    def __len__(self) -> int:
        return len(self.labels)

    def rows_of(self, label: int) -> Tensor:
        """Rows of the images of a class."""
        return (self.labels == label).nonzero().flatten()

    def to(self, device: torch.device) -> Split:
        return Split(self.images.to(device), self.labels.to(device))

    def rows(self, index: Tensor) -> Split:
        return Split(self.images[index], self.labels[index])


@dataclass(frozen=True)
class ImageData:
    """A data set with its training images split in two."""

    name: str
    classes: tuple[str, ...]
    train: Split
    validation: Split  # held out of the training images, for selection
    test: Split
    normalisation: Normalisation  # fitted on all training images
    whitening: Whitening | None = None  # fitted on all normalised training images, which it then was applied to

    @property
    def image_size(self) -> tuple[int, int]:
        return self.train.images.shape[2], self.train.images.shape[3]

    @property
    def in_channels(self) -> int:
        return self.train.images.shape[1]

    @property
    def num_classes(self) -> int:
        return len(self.classes)

    @cached_property
    def full_train(self) -> Split:
        """All training images; a copy, made once because callers ask anew for every epoch and every class."""
        images = torch.cat([self.train.images, self.validation.images])
        return Split(images, torch.cat([self.train.labels, self.validation.labels]))

    def to(self, device: torch.device) -> ImageData:
        parts = {name: getattr(self, name).to(device) for name in ("train", "validation", "test")}
        return replace(self, **parts)


@dataclass(frozen=True)
class Pixels:
    """What a reader gives: whole sets of pixels and labels, nothing normalised yet."""

    classes: tuple[str, ...]
    train: Tensor  # [n, C, H, W] uint8, or float32 in [0, 1]
    train_labels: Tensor  # [n] int64
    test: Tensor
    test_labels: Tensor


def prepare(
    name: str, pixels: Pixels, validation_fraction: float, whiten: Callable[[Tensor], Whitening] | None = None
) -> ImageData:
    """Checks, normalises, whitens and splits what a reader gave.

    Args:
        whiten: what gives the whitening for all training images, normalised; None: images are not whitened.

    Raises:
        UsageError: labels or shapes do not fit, a class has too few images to hold one out, or ``validation_fraction``
            is not in (0, 1).
    """
    if not 0 < validation_fraction < 1:
        raise UsageError(f"validation_fraction must lie between 0 and 1, got {validation_fraction}")
    train, test = _unit(pixels.train), _unit(pixels.test)
    if train.shape[1:] != test.shape[1:]:
        raise UsageError(
            f"{name}: test images must have the shape of training images {tuple(train.shape[1:])}, got "
            f"{tuple(test.shape[1:])}"
        )
    for part, images, labels in (
        ("training", train, pixels.train_labels), ("test", test, pixels.test_labels),
    ):  # fmt: skip
        if len(images) == 0:
            raise UsageError(f"{name}: there are no {part} images")
        if len(images) != len(labels):
            raise UsageError(f"{name}: there are {len(images)} {part} images but {len(labels)} labels")
        low, high = int(labels.min()), int(labels.max())
        if low < 0 or high >= len(pixels.classes):
            raise UsageError(f"{name}: {part} labels must lie in [0, {len(pixels.classes)}), got {low}..{high}")
    normalisation = Normalisation.fit(train)
    everything, judged = (
        Split(normalisation.apply(images), labels)
        for images, labels in ((train, pixels.train_labels), (test, pixels.test_labels))
    )
    del train, test  # in 32 bits they take as much as what was made of them
    whitening = None
    if whiten is not None:
        whitening = whiten(everything.images)
        for split in (everything, judged):
            whitening.apply_(split.images)
    held_out = _held_out(name, everything, pixels.classes, validation_fraction)
    return ImageData(
        name,
        pixels.classes,
        everything.rows((~held_out).nonzero().flatten()),
        everything.rows(held_out.nonzero().flatten()),
        judged,
        normalisation,
        whitening,
    )


def _unit(pixels: Tensor) -> Tensor:
    return pixels.float() / 255 if pixels.dtype == torch.uint8 else pixels.float()


def stratified_mask(labels: Tensor, num_classes: int, fraction: float) -> Tensor:
    """Bool [n]: ``fraction`` of every class, at least one image and never all of them. The choice is fixed for given
    labels, so that runs with different seeds are judged by the same images."""
    draw = torch.Generator().manual_seed(0)
    mask = torch.zeros(len(labels), dtype=torch.bool)
    for label in range(num_classes):
        rows = (labels == label).nonzero().flatten()
        count = min(max(1, round(fraction * len(rows))), len(rows) - 1)
        mask[rows[torch.randperm(len(rows), generator=draw)[:count]]] = True
    return mask


def _held_out(name: str, split: Split, classes: tuple[str, ...], fraction: float) -> Tensor:
    """Mask of the validation images."""
    for label, title in enumerate(classes):
        count = len(split.rows_of(label))
        if count < 2:
            raise UsageError(f"{name}: class {title!r} must have at least 2 training images, got {count}")
    return stratified_mask(split.labels, len(classes), fraction)


def require_images_per_class(split: Split, ipc: int, classes: tuple[str, ...]) -> None:
    """Raises UsageError where a class has fewer than ``ipc`` images to start from."""
    counts = torch.bincount(split.labels.cpu(), minlength=len(classes))
    fewest = int(counts.argmin())
    if counts[fewest] < ipc:
        raise UsageError(
            f"ipc must be at most the training images of every class, got {ipc}: class {classes[fewest]!r} has "
            f"{int(counts[fewest])}"
        )
