"""Implement differentiable Siamese augmentation in eager PyTorch, as an experienced user would.

Each operation takes a handful of calls. The module takes :class:`pdd_fast.AugmentParameters`, so
that all implementations compute the same function, or samples its own parameters from the same
ranges. It uses nothing else of the package. Formulas: docs/mathematics.md, section 5.
"""

from __future__ import annotations

import math
import random

import torch
from torch import Tensor
from torch.nn import functional as F

from pdd_fast.augmentation.dsa import DSA
from pdd_fast.augmentation.parameters import AugmentParameters


class PlainAugment:
    """Augmentation parameters of one batch, on the device and in the precision of the images."""

    def __init__(
        self,
        operations: tuple[str, ...],
        cutout_size: tuple[int, int],
        values: dict[str, Tensor],
        dtype: torch.dtype,
    ) -> None:
        self.operations, self.cutout_size = operations, cutout_size
        self.values = {name: value.view(-1, 1, 1, 1) for name, value in values.items()}
        for name, value in self.values.items():
            if value.is_floating_point():
                self.values[name] = value.to(dtype)

    @classmethod
    def of(
        cls, aug_params: AugmentParameters, device: torch.device, dtype: torch.dtype
    ) -> PlainAugment:
        """Return ``aug_params`` on ``device``."""
        # Only the operation's own parameters move: one to three copies to the device for one
        # operation.
        used = [name for operation in aug_params.operations for name in AUG_PARAMS_OF[operation]]
        return cls(
            aug_params.operations,
            aug_params.cutout_size,
            {name: getattr(aug_params, name).to(device) for name in used},
            dtype,
        )

    def __call__(self, images: Tensor) -> Tensor:
        """Return the augmented images [b, C, H, W]."""
        for operation in self.operations:
            images = getattr(self, operation)(images)
        return images

    def color(self, x: Tensor) -> Tensor:
        """Change brightness, saturation and contrast."""
        x = x + self.values["brightness"]
        mean = x.mean(1, keepdim=True)
        x = (x - mean) * self.values["saturation"] + mean
        mean = x.mean((1, 2, 3), keepdim=True)
        return (x - mean) * self.values["contrast"] + mean

    def crop(self, x: Tensor) -> Tensor:
        """Shift the images, zero outside."""
        # Two gathers: their gradients scatter, while that of x[batch, rows, columns] sorts all
        # indices first.
        for dim, name in ((2, "shift_h"), (3, "shift_w")):
            side = x.shape[dim]
            index = (
                torch.arange(side, device=x.device).view(-1, 1)
                if dim == 2
                else torch.arange(side, device=x.device)
            )
            index = index + self.values[name]  # [b, 1, H, 1] or [b, 1, 1, W]
            inside = (index >= 0) & (index < side)
            x = x.gather(dim, index.clamp(0, side - 1).expand(x.shape)) * inside
        return x

    def cutout(self, x: Tensor) -> Tensor:
        """Set a rectangle to zero."""
        rows = (
            torch.arange(x.shape[2], device=x.device).view(-1, 1)
            - self.values["cutout_h"]
            + self.cutout_size[0] // 2
        )
        columns = (
            torch.arange(x.shape[3], device=x.device)
            - self.values["cutout_w"]
            + self.cutout_size[1] // 2
        )
        blank = (
            (rows >= 0)
            & (rows < self.cutout_size[0])
            & (columns >= 0)
            & (columns < self.cutout_size[1])
        )
        return x.masked_fill(blank, 0)

    def flip(self, x: Tensor) -> Tensor:
        """Mirror some of the images."""
        return torch.where(self.values["flip"], x.flip(3), x)

    def scale(self, x: Tensor) -> Tensor:
        """Scale height and width."""
        zero = torch.zeros_like(self.values["scale_w"])
        return sample(x, self.values["scale_w"], zero, zero, self.values["scale_h"])

    def rotate(self, x: Tensor) -> Tensor:
        """Rotate around the center."""
        cosine, sine = self.values["angle"].cos(), self.values["angle"].sin()
        return sample(x, cosine, -sine, sine, cosine)


class PlainSampler:
    """Sample parameters on the device where they are used, so that nothing is copied.

    Python chooses the single operation, so that the host does not wait for the device.
    """

    def __init__(self, dsa: DSA, device: torch.device, dtype: torch.dtype, seed: int = 0) -> None:
        self.dsa, self.device, self.dtype = dsa, device, dtype
        self.generator = torch.Generator(device).manual_seed(seed)
        self.choice = random.Random(seed)

    def sample(self, batch: int, size: tuple[int, int]) -> PlainAugment:
        """Return the parameters of a batch of images of ``size``."""
        dsa = self.dsa
        operations = (
            dsa.operations if dsa.mode == "multiple" else (self.choice.choice(dsa.operations),)
        )
        cutout = (int(size[0] * dsa.cutout + 0.5), int(size[1] * dsa.cutout + 0.5))
        values: dict[str, Tensor] = {}
        for operation in operations:
            values |= getattr(self, operation)(batch, size, cutout)
        return PlainAugment(operations, cutout, values, self.dtype)

    def uniform(self, batch: int, low: float, high: float) -> Tensor:
        """Return uniform values [batch] in [low, high)."""
        return torch.empty(batch, device=self.device).uniform_(low, high, generator=self.generator)

    def integer(self, batch: int, low: int, high: int) -> Tensor:
        """Return uniform integers [batch] in [low, high]."""
        return torch.randint(low, high + 1, (batch,), generator=self.generator, device=self.device)

    def color(
        self, batch: int, size: tuple[int, int], cutout: tuple[int, int]
    ) -> dict[str, Tensor]:
        """Sample brightness, saturation and contrast."""
        d = self.dsa
        return {
            "brightness": self.uniform(batch, -d.brightness / 2, d.brightness / 2),
            "saturation": self.uniform(batch, 0, d.saturation),
            "contrast": self.uniform(batch, 1 - d.contrast, 1 + d.contrast),
        }

    def crop(self, batch: int, size: tuple[int, int], cutout: tuple[int, int]) -> dict[str, Tensor]:
        """Sample the shifts in pixels."""
        reach = [int(side * self.dsa.crop + 0.5) for side in size]
        return {
            f"shift_{axis}": self.integer(batch, -r, r) for axis, r in zip("hw", reach, strict=True)
        }

    def cutout(
        self, batch: int, size: tuple[int, int], cutout: tuple[int, int]
    ) -> dict[str, Tensor]:
        """Sample the rectangles' centers."""
        last = [side - blank % 2 for side, blank in zip(size, cutout, strict=True)]
        return {
            f"cutout_{axis}": self.integer(batch, 0, end)
            for axis, end in zip("hw", last, strict=True)
        }

    def flip(self, batch: int, size: tuple[int, int], cutout: tuple[int, int]) -> dict[str, Tensor]:
        """Sample the images to mirror."""
        return {"flip": self.uniform(batch, 0, 1) < self.dsa.flip}

    def scale(
        self, batch: int, size: tuple[int, int], cutout: tuple[int, int]
    ) -> dict[str, Tensor]:
        """Sample the factors of height and width."""
        return {
            f"scale_{axis}": self.uniform(batch, 1 / self.dsa.scale, self.dsa.scale)
            for axis in "wh"
        }

    def rotate(
        self, batch: int, size: tuple[int, int], cutout: tuple[int, int]
    ) -> dict[str, Tensor]:
        """Sample the angles in radians."""
        most = math.radians(self.dsa.rotate)
        return {"angle": self.uniform(batch, -most, most)}


AUG_PARAMS_OF = {
    "color": ("brightness", "saturation", "contrast"),
    "crop": ("shift_h", "shift_w"),
    "cutout": ("cutout_h", "cutout_w"),
    "flip": ("flip",),
    "scale": ("scale_h", "scale_w"),
    "rotate": ("angle",),
}


def sample(x: Tensor, xx: Tensor, xy: Tensor, yx: Tensor, yy: Tensor) -> Tensor:
    """Return ``x`` sampled at the grid of [[xx, xy, 0], [yx, yy, 0]], zero outside."""
    zero = torch.zeros_like(xx)
    matrix = torch.cat([xx, xy, zero, yx, yy, zero], 1).view(-1, 2, 3)
    grid = F.affine_grid(matrix, list(x.shape), align_corners=True)
    return F.grid_sample(x, grid, mode="bilinear", padding_mode="zeros", align_corners=True)
