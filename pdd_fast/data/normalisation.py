"""Per-channel normalisation, and its inverse for pictures."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# Images whose bytes are counted at once: 4 MB of a channel of 32×32.
_AT_ONCE = 4096


def unit(pixels: Tensor) -> Tensor:
    """Pixels [n, C, H, W] as float32 in planar memory (NCHW): bytes scaled to [0, 1], floats as they are."""
    floats = pixels.to(torch.float32, memory_format=torch.contiguous_format)
    return floats.div_(255) if pixels.dtype == torch.uint8 else floats


@dataclass(frozen=True)
class Normalisation:
    """(pixel − mean) / std per channel, with pixels in [0, 1]."""

    mean: tuple[float, ...]
    std: tuple[float, ...]

    @classmethod
    def fit(cls, pixels: Tensor) -> Normalisation:
        """Mean and standard deviation per channel of pixels [n, C, H, W]: uint8, or floating-point in [0, 1]."""
        if pixels.dtype == torch.uint8:
            return cls._of_bytes(pixels)
        # Channel by channel, so that the float64 copy is 2/C of the data. Digits alone come as floats.
        channels = [pixels[:, c].double() for c in range(pixels.shape[1])]
        std = tuple(float(c.std(correction=0)) for c in channels)
        # A channel that is constant everywhere is only centred.
        return cls(tuple(float(c.mean()) for c in channels), tuple(s if s > 0 else 1.0 for s in std))

    @classmethod
    def _of_bytes(cls, pixels: Tensor) -> Normalisation:
        """From how often each of the 256 levels occurs: no floating-point copy of the pixels, and the same bits for
        every number of threads."""
        levels = unit(torch.arange(256, dtype=torch.uint8)).double()  # as float32 rounds them
        mean, std = [], []
        for c in range(pixels.shape[1]):
            counts = torch.zeros(256, dtype=torch.int64)
            for part in pixels.split(_AT_ONCE):
                counts += torch.bincount(part[:, c].flatten(), minlength=256)
            total = counts.sum()
            centre = (counts * levels).sum() / total
            deviation = float(((counts * (levels - centre).square()).sum() / total).sqrt())
            mean.append(float(centre))
            std.append(deviation if deviation > 0 else 1.0)
        return cls(tuple(mean), tuple(std))

    def _vectors(self, like: Tensor) -> tuple[Tensor, Tensor]:
        mean, std = (torch.tensor(v, dtype=like.dtype, device=like.device) for v in (self.mean, self.std))
        return mean.view(-1, 1, 1), std.view(-1, 1, 1)

    def apply(self, pixels: Tensor) -> Tensor:
        mean, std = self._vectors(pixels)
        return (pixels - mean).div_(std)  # one new tensor and not two

    def invert(self, images: Tensor) -> Tensor:
        mean, std = self._vectors(images)
        return images * std + mean

    def to_dict(self) -> dict[str, Any]:
        return {"kind": "channel", "mean": list(self.mean), "std": list(self.std)}

    @classmethod
    def from_dict(cls, stored: dict[str, Any]) -> Normalisation:
        return cls(tuple(map(float, stored["mean"])), tuple(map(float, stored["std"])))
