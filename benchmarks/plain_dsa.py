"""Differentiable Siamese augmentation as a good user writes it in eager PyTorch: a handful of calls per operation.

It takes the draws of :class:`pdd_fast.AugmentParameters`, so that all contenders compute the same function, and nothing
else of the package. Formulas: docs/mathematics.md, section 5.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from pdd_fast.augmentation import AugmentParameters


class PlainAugment:
    """One batch's draws, on the device and in the precision of the images."""

    def __init__(self, draw: AugmentParameters, device: torch.device, dtype: torch.dtype) -> None:
        self.operations = draw.operations
        self.cutout_size = draw.cutout_size
        # An operation's own numbers only: with one operation drawn, that is one to three copies to the device.
        used = [name for operation in draw.operations for name in DRAWS_OF[operation]]
        self.numbers = {name: getattr(draw, name).to(device).view(-1, 1, 1, 1) for name in used}
        for name, value in self.numbers.items():
            if value.is_floating_point():
                self.numbers[name] = value.to(dtype)

    def __call__(self, images: Tensor) -> Tensor:
        """Augmented images [b, C, H, W]."""
        for operation in self.operations:
            images = getattr(self, operation)(images)
        return images

    def color(self, x: Tensor) -> Tensor:
        x = x + self.numbers["brightness"]
        mean = x.mean(1, keepdim=True)
        x = (x - mean) * self.numbers["saturation"] + mean
        mean = x.mean((1, 2, 3), keepdim=True)
        return (x - mean) * self.numbers["contrast"] + mean

    def crop(self, x: Tensor) -> Tensor:
        # Two gathers: their gradients scatter, where that of x[batch, rows, columns] would sort all indices first.
        for dim, name in ((2, "shift_h"), (3, "shift_w")):
            side = x.shape[dim]
            index = torch.arange(side, device=x.device).view(-1, 1) if dim == 2 else torch.arange(side, device=x.device)
            index = index + self.numbers[name]  # [b, 1, H, 1] or [b, 1, 1, W]
            inside = (index >= 0) & (index < side)
            x = x.gather(dim, index.clamp(0, side - 1).expand(x.shape)) * inside
        return x

    def cutout(self, x: Tensor) -> Tensor:
        rows = (
            torch.arange(x.shape[2], device=x.device).view(-1, 1) - self.numbers["cutout_h"] + self.cutout_size[0] // 2
        )
        columns = torch.arange(x.shape[3], device=x.device) - self.numbers["cutout_w"] + self.cutout_size[1] // 2
        blank = (rows >= 0) & (rows < self.cutout_size[0]) & (columns >= 0) & (columns < self.cutout_size[1])
        return x.masked_fill(blank, 0)

    def flip(self, x: Tensor) -> Tensor:
        return torch.where(self.numbers["flip"], x.flip(3), x)

    def scale(self, x: Tensor) -> Tensor:
        zero = torch.zeros_like(self.numbers["scale_w"])
        return sample(x, self.numbers["scale_w"], zero, zero, self.numbers["scale_h"])

    def rotate(self, x: Tensor) -> Tensor:
        cosine, sine = self.numbers["angle"].cos(), self.numbers["angle"].sin()
        return sample(x, cosine, -sine, sine, cosine)


DRAWS_OF = {
    "color": ("brightness", "saturation", "contrast"),
    "crop": ("shift_h", "shift_w"),
    "cutout": ("cutout_h", "cutout_w"),
    "flip": ("flip",),
    "scale": ("scale_h", "scale_w"),
    "rotate": ("angle",),
}


def sample(x: Tensor, xx: Tensor, xy: Tensor, yx: Tensor, yy: Tensor) -> Tensor:
    """``x`` sampled at the grid of [[xx, xy, 0], [yx, yy, 0]], zero outside."""
    zero = torch.zeros_like(xx)
    matrix = torch.cat([xx, xy, zero, yx, yy, zero], 1).view(-1, 2, 3)
    grid = F.affine_grid(matrix, list(x.shape), align_corners=True)
    return F.grid_sample(x, grid, mode="bilinear", padding_mode="zeros", align_corners=True)
