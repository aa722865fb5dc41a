"""Per-channel normalization and its inverse."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pdd_fast.runtime.devices import threads

# Images whose bytes are counted at once: 4 MB per channel of 32×32.
_AT_ONCE = 4096
# Constants that differ by less make equivalent images: a quarter of one of 256 levels.
_TOLERANCE = 1e-3


def unit(pixels: Tensor) -> Tensor:
    """Return pixels [n, C, H, W] as float32 in planar memory (NCHW).

    Bytes are scaled to [0, 1]; floats keep their values.
    """
    floats = pixels.to(torch.float32, memory_format=torch.contiguous_format)
    return floats.div_(255) if pixels.dtype == torch.uint8 else floats


@dataclass(frozen=True)
class Normalization:
    """Normalization (pixel − mean) / std per channel, of pixels in [0, 1]."""

    mean: tuple[float, ...]
    std: tuple[float, ...]

    @classmethod
    def identity(cls, channels: int) -> Normalization:
        """Return the normalization that leaves pixels in [0, 1] unchanged."""
        return cls((0.0,) * channels, (1.0,) * channels)

    @classmethod
    def published(cls, name: str, classes: Sequence[str], channels: int) -> Normalization | None:
        """Return the constants of published code for a dataset, or None.

        Image folders are recognized by their classes: CIFAR-10's names, or the WordNet IDs of
        ImageNet and Tiny ImageNet.

        Args:
            name: name of the dataset.
            classes: names of its classes.
            channels: channels of its images.
        """
        if channels != 3:
            return None
        if name in _PUBLISHED:
            return cls(*_PUBLISHED[name])
        if tuple(classes) == _CIFAR10_CLASSES:
            return cls(*_PUBLISHED["cifar10"])
        return cls(*_IMAGENET) if all(re.fullmatch(r"n\d{8}", title) for title in classes) else None

    @classmethod
    def fit(cls, pixels: Tensor) -> Normalization:
        """Return mean and standard deviation per channel of ``pixels``.

        Args:
            pixels: [n, C, H, W], uint8, or floating-point in [0, 1].
        """
        if pixels.dtype == torch.uint8:
            return cls._of_bytes(pixels)
        # Channel by channel, so that the float64 copy takes 2/C of the data. Only digits come as
        # floats. On one thread, because the number of threads changes the order of the sums.
        with threads(1):
            channels = [pixels[:, c].double() for c in range(pixels.shape[1])]
            mean = tuple(float(c.mean()) for c in channels)
            std = tuple(float(c.std(correction=0)) for c in channels)
        # A constant channel is only centered.
        return cls(mean, tuple(s if s > 0 else 1.0 for s in std))

    @classmethod
    def _of_bytes(cls, pixels: Tensor) -> Normalization:
        """Return the constants from the frequency of each of the 256 levels.

        This needs no floating-point copy of the pixels and gives the same bits for every number of
        threads.
        """
        # Levels are rounded as in float32.
        levels = unit(torch.arange(256, dtype=torch.uint8, device="cpu")).double()
        mean, std = [], []
        for c in range(pixels.shape[1]):
            counts = torch.zeros(256, dtype=torch.int64, device="cpu")
            for part in pixels.split(_AT_ONCE):
                counts += torch.bincount(part[:, c].flatten(), minlength=256)
            total = counts.sum()
            center = (counts * levels).sum() / total
            deviation = float(((counts * (levels - center).square()).sum() / total).sqrt())
            mean.append(float(center))
            std.append(deviation if deviation > 0 else 1.0)
        return cls(tuple(mean), tuple(std))

    def __str__(self) -> str:
        if self == self.identity(len(self.mean)):
            return "none (pixels in [0, 1])"
        mean, std = (
            ", ".join(f"{value:.4g}" for value in values) for values in (self.mean, self.std)
        )
        return f"by mean {mean} and std {std}"

    def is_close(self, other: Normalization) -> bool:
        """Return whether both make the same images of the same pixels, up to rounding."""
        if len(self.mean) != len(other.mean):
            return False
        pairs = zip(self.mean + self.std, other.mean + other.std, strict=True)
        return all(
            math.isclose(one, another, rel_tol=0, abs_tol=_TOLERANCE) for one, another in pairs
        )

    def _vectors(self, like: Tensor) -> tuple[Tensor, Tensor]:
        mean, std = (
            torch.tensor(v, dtype=like.dtype, device=like.device) for v in (self.mean, self.std)
        )
        return mean.view(-1, 1, 1), std.view(-1, 1, 1)

    def apply(self, pixels: Tensor) -> Tensor:
        """Return normalized images [n, C, H, W]."""
        mean, std = self._vectors(pixels)
        return (pixels - mean).div_(std)  # in place, so that one new tensor is made and not two

    def invert(self, images: Tensor) -> Tensor:
        """Return the pixels [n, C, H, W] of normalized images."""
        mean, std = self._vectors(images)
        return images * std + mean

    def to_dict(self) -> dict[str, Any]:
        """Return the constants as JSON can store them."""
        return {"kind": "channel", "mean": list(self.mean), "std": list(self.std)}

    @classmethod
    def from_dict(cls, stored: dict[str, Any]) -> Normalization:
        """Return the normalization that :meth:`to_dict` stored."""
        return cls(tuple(map(float, stored["mean"])), tuple(map(float, stored["std"])))


# Mean and std of the public code of DC and MTT. The std of CIFAR-10 is the mean of the images' own
# std: 0.77 to 0.82 of the std of all pixels, 0.2470, 0.2435 and 0.2616, which Normalization.fit
# gives.
_PUBLISHED = {
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),
    "cifar100": ((0.5071, 0.4866, 0.4409), (0.2673, 0.2564, 0.2762)),
}
_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
_CIFAR10_CLASSES = (
    "airplane",
    "automobile",
    "bird",
    "cat",
    "deer",
    "dog",
    "frog",
    "horse",
    "ship",
    "truck",
)
