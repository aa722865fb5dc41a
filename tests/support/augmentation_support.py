"""Helpers of the tests of augmentation."""

from __future__ import annotations

import math

import torch
from torch import Tensor

OPERATIONS = ("color", "crop", "cutout", "flip", "scale", "rotate")


EVERYTHING = "color_crop_cutout_flip_scale_rotate"


# Strategy, draw, lowest, highest, for images of 16 x 11 pixels; integers where the ends are.
RANGES: list[tuple[str, str, float | int, float | int]] = [
    ("color", "brightness", -0.5, 0.5),
    ("color", "saturation", 0.0, 2.0),
    ("color", "contrast", 0.5, 1.5),
    ("crop", "shift_h", -2, 2),
    ("crop", "shift_w", -1, 1),
    ("cutout", "cutout_h", 0, 16),  # 8 rows are blanked
    ("cutout", "cutout_w", 0, 11),  # 6 columns are blanked
    ("scale", "scale_h", 1 / 1.2, 1.2),
    ("scale", "scale_w", 1 / 1.2, 1.2),
    ("rotate", "angle", -math.pi / 12, math.pi / 12),
]


DRAWN = {draw for _, draw, _, _ in RANGES} | {"flip"}


def color(image: Tensor, brightness: float, saturation: float, contrast: float) -> Tensor:
    C, H, W = image.shape
    image = image + brightness
    for i in range(H):
        for j in range(W):
            mean = sum(float(image[c, i, j]) for c in range(C)) / C
            for c in range(C):
                image[c, i, j] = (image[c, i, j] - mean) * saturation + mean
    mean = float(image.sum()) / (C * H * W)
    return (image - mean) * contrast + mean


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)
