"""Names that a setting and the code behind it share, defined once.

This module imports no torch.
"""

from __future__ import annotations

from typing import Literal, get_args

Augmentation = Literal["color", "crop", "cutout", "flip", "scale", "rotate"]
AUGMENTATIONS: tuple[str, ...] = get_args(Augmentation)

Convolution = Literal["auto", "direct", "winograd"]
# The order is the numbering in csrc/ops/convnet/params.h.
CONVOLUTIONS: tuple[str, ...] = get_args(Convolution)

Distance = Literal["squared", "cosine"]
DISTANCES: tuple[str, ...] = get_args(Distance)

EngineName = Literal["auto", "fused", "autograd"]
ENGINES: tuple[str, ...] = get_args(EngineName)

Memory = Literal["recompute", "cache", "auto"]
MEMORY: tuple[str, ...] = get_args(Memory)

Precision = Literal["float32", "tf32", "bfloat16"]
PRECISIONS: tuple[str, ...] = get_args(Precision)
PrecisionSetting = Literal["auto", Precision]  # auto depends on the device

Normalization = Literal["fitted", "published"]
Whitening = Literal["none", "zca"]
Labels = Literal["hard", "soft", "learned"]
