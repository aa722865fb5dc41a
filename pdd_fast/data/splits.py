"""Labeled images in memory, and the splits of the training data."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from pdd_fast.data.normalization import Normalization, unit
from pdd_fast.data.whitening import AT_ONCE, Whitening
from pdd_fast.runtime.errors import UsageError


@dataclass(frozen=True)
class Split:
    """Images and labels, each one tensor on one device."""

    images: Tensor  # [n, C, H, W] float32, normalized or whitened
    labels: Tensor  # [n] int64

    def __len__(self) -> int:
        return len(self.labels)

    def rows_of(self, label: int) -> Tensor:
        """Return the rows of the images of a class."""
        return (self.labels == label).nonzero().flatten()

    def to(self, device: torch.device) -> Split:
        """Return the split on ``device``."""
        return Split(self.images.to(device), self.labels.to(device))

    def part(self, begin: int, end: int) -> Split:
        """Return images ``begin`` to ``end`` - 1 as a view."""
        return Split(self.images[begin:end], self.labels[begin:end])


@dataclass(frozen=True)
class ImageData:
    """Dataset whose training images are split in two, one after the other in one tensor."""

    name: str
    classes: tuple[str, ...]
    full_train: Split  # all training images: those of ``train``, then those of ``validation``
    validation_images: int  # images of ``validation``
    test: Split
    # The identity if images are whitened, except in runs of earlier versions.
    normalization: Normalization
    # Fitted to all normalized training images and then applied to them.
    whitening: Whitening | None = None
    fingerprint: str = ""  # of the raw pixels, labels and classes (pdd_fast.data.fingerprint)

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width of an image, pixels."""
        return self.test.images.shape[2], self.test.images.shape[3]

    @property
    def in_channels(self) -> int:
        """Channels of an image."""
        return self.test.images.shape[1]

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.classes)

    @cached_property
    def train(self) -> Split:
        """Training images without the validation split; a view."""
        return self.full_train.part(0, len(self.full_train) - self.validation_images)

    @cached_property
    def validation(self) -> Split:
        """Validation split of the training images, for selection; a view."""
        return self.full_train.part(
            len(self.full_train) - self.validation_images, len(self.full_train)
        )

    def to(self, device: torch.device) -> ImageData:
        """Return the data on ``device``."""
        return replace(self, full_train=self.full_train.to(device), test=self.test.to(device))


@dataclass(frozen=True)
class Pixels:
    """Output of a reader: all pixels and labels, not normalized."""

    classes: tuple[str, ...]
    train: Tensor  # [n, C, H, W] uint8, or float32 in [0, 1]
    train_labels: Tensor  # [n] int64
    test: Tensor
    test_labels: Tensor


# Function that determines, from the pixels of all training images, how images are normalized and
# whether they are whitened.
Fit = Callable[[Tensor], tuple[Normalization, Whitening | None]]


def normalized(pixels: Tensor) -> tuple[Normalization, None]:
    """Return constants fitted to ``pixels``, and no whitening; a :data:`Fit`."""
    return Normalization.fit(pixels), None


def prepare(
    name: str, pixels: Pixels, validation_fraction: float, fit: Fit = normalized
) -> ImageData:
    """Return the output of a reader checked, normalized, whitened and split.

    Beside pixels and images, this takes the memory of 1024 images and of the whitening's matrices.

    Args:
        name: name of the dataset.
        pixels: output of a reader.
        validation_fraction: share of every class in the validation split, in (0, 1).
        fit: determines normalization and whitening.

    Raises:
        UsageError: labels or shapes do not fit, a class has too few images for a validation split,
            or ``validation_fraction`` is not in (0, 1).
    """
    if not 0 < validation_fraction < 1:
        raise UsageError(f"validation_fraction must lie between 0 and 1, got {validation_fraction}")
    if pixels.train.shape[1:] != pixels.test.shape[1:]:
        raise UsageError(
            f"{name}: test images must have the shape of training images "
            f"{tuple(pixels.train.shape[1:])}, got {tuple(pixels.test.shape[1:])}"
        )
    for part, images, labels in (
        ("training", pixels.train, pixels.train_labels),
        ("test", pixels.test, pixels.test_labels),
    ):
        if len(images) == 0:
            raise UsageError(f"{name}: {part} images must be at least 1, got none")
        if len(images) != len(labels):
            raise UsageError(
                f"{name}: {part} labels must be {len(images)}, one per image, got {len(labels)}"
            )
        low, high = int(labels.min()), int(labels.max())
        if low < 0 or high >= len(pixels.classes):
            raise UsageError(
                f"{name}: {part} labels must lie in [0, {len(pixels.classes)}), got {low}..{high}"
            )
    validation = _validation_mask(name, pixels.train_labels, pixels.classes, validation_fraction)
    normalization, whitening = fit(pixels.train)
    # Stable, so that images of both parts stay in the reader's order.
    order = validation.long().argsort(stable=True)
    return ImageData(
        name,
        pixels.classes,
        Split(_images(pixels.train, normalization, whitening, order), pixels.train_labels[order]),
        int(validation.sum()),
        Split(_images(pixels.test, normalization, whitening), pixels.test_labels),
        normalization,
        whitening,
    )


def _images(
    pixels: Tensor,
    normalization: Normalization,
    whitening: Whitening | None,
    order: Tensor | None = None,
) -> Tensor:
    """Return the images [n, C, H, W] of ``pixels``, with row ``order[i]`` at place i.

    Rows are converted in groups and written to their places, so that no second floating-point copy
    of the set exists. Groups follow the reader's order, so that rounding does not depend on the
    split.

    Args:
        pixels: [n, C, H, W].
        normalization: applied first.
        whitening: applied second, if given.
        order: int64 [n]; None: the reader's order.
    """
    place = torch.arange(len(pixels), device="cpu") if order is None else order.argsort()
    images = torch.empty(pixels.shape, dtype=torch.float32, device="cpu")
    for some, places in zip(pixels.split(AT_ONCE), place.split(AT_ONCE), strict=True):
        part = normalization.apply(unit(some))
        images[places] = part if whitening is None else whitening.apply_(part)
    return images


def stratified_mask(labels: Tensor, num_classes: int, fraction: float) -> Tensor:
    """Return a bool mask [n] of ``fraction`` of every class.

    It has at least one image of every class and never all. It depends on the labels only, so that
    runs with different seeds are evaluated on the same images.

    Args:
        labels: int64 [n].
        num_classes: number of classes.
        fraction: share of every class.
    """
    generator = torch.Generator().manual_seed(0)
    mask = torch.zeros(len(labels), dtype=torch.bool, device="cpu")
    for label in range(num_classes):
        rows = (labels == label).nonzero().flatten()
        count = min(max(1, round(fraction * len(rows))), len(rows) - 1)
        mask[rows[torch.randperm(len(rows), generator=generator, device="cpu")[:count]]] = True
    return mask


def _validation_mask(
    name: str, labels: Tensor, classes: tuple[str, ...], fraction: float
) -> Tensor:
    """Return the mask of the validation images."""
    for title, count in zip(
        classes, torch.bincount(labels, minlength=len(classes)).tolist(), strict=True
    ):
        if count < 2:
            raise UsageError(
                f"{name}: class {title!r} must have at least 2 training images, got {count}"
            )
    return stratified_mask(labels, len(classes), fraction)


def require_images_per_class(
    split: Split, ipc: int, classes: tuple[str, ...], each: int = 1
) -> None:
    """Raise UsageError unless every class has enough images to start from.

    Args:
        split: the real images.
        ipc: stored images per class.
        classes: names of the classes.
        each: real images per stored image (factor²).
    """
    counts = torch.bincount(split.labels.cpu(), minlength=len(classes))
    fewest = int(counts.argmin())
    if counts[fewest] < each:
        most = math.isqrt(int(counts[fewest]))
        raise UsageError(
            f"factor must be at most {most}, got {math.isqrt(each)}: class {classes[fewest]!r} has "
            f"{int(counts[fewest])} training images, and a stored image needs {each}"
        )
    if counts[fewest] < ipc * each:
        need = "" if each == 1 else f", and every stored image needs {each}"
        raise UsageError(
            f"ipc must be at most {int(counts[fewest]) // each}, got {ipc}: class "
            f"{classes[fewest]!r} has {int(counts[fewest])} training images{need}"
        )
