"""Per-channel normalisation, and its inverse for pictures."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Normalisation:
    """(pixel − mean) / std per channel, with pixels in [0, 1]."""

    mean: tuple[float, ...]
    std: tuple[float, ...]

    @classmethod
    def fit(cls, pixels: Tensor) -> Normalisation:
        """Mean and standard deviation per channel of pixels [n, C, H, W] in [0, 1]."""
        # Channel by channel, so that the float64 copy is a C-th of the data.
        channels = [pixels[:, c].double() for c in range(pixels.shape[1])]
        std = tuple(float(c.std(correction=0)) for c in channels)
        # A channel that is constant everywhere is only centred.
        return cls(tuple(float(c.mean()) for c in channels), tuple(s if s > 0 else 1.0 for s in std))

    def _vectors(self, like: Tensor) -> tuple[Tensor, Tensor]:
        mean, std = (torch.tensor(v, dtype=like.dtype, device=like.device) for v in (self.mean, self.std))
        return mean.view(-1, 1, 1), std.view(-1, 1, 1)

    def apply(self, pixels: Tensor) -> Tensor:
        mean, std = self._vectors(pixels)
        return (pixels - mean) / std

    def invert(self, images: Tensor) -> Tensor:
        mean, std = self._vectors(images)
        return images * std + mean

    def to_dict(self) -> dict[str, Any]:
        return {"kind": "channel", "mean": list(self.mean), "std": list(self.std)}

    @classmethod
    def from_dict(cls, stored: dict[str, Any]) -> Normalisation:
        return cls(tuple(map(float, stored["mean"])), tuple(map(float, stored["std"])))
