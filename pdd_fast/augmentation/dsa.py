"""Differentiable Siamese augmentation (DSA) with reusable augmentation parameters.

Sampling and applying are separate. The same parameters can be applied again, to other images, or
transposed, as the adjoint of an unrolled training run needs.

Source: Zhao and Bilen, ICML 2021, arXiv 2102.08259.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.function import FunctionCtx

from pdd_fast.augmentation.parameters import _COLOR, _ROWS, AugmentParameters, _neutral, _size
from pdd_fast.ops.dsa import OPERATIONS

MODES = ("single", "multiple")


@dataclass(frozen=True)
class DSA:
    """Augmentation strategy: operations and the ranges of their parameters.

    docs/mathematics.md, section 5, has the formulas.

    Args:
        strategy: names of operations joined by "_", from color, crop, cutout, flip, scale, rotate;
            "none" for no augmentation. Mode "multiple" applies them in this order.
        mode: "single" samples one operation per call for the whole batch, with parameters per
            image; "multiple" applies all operations.
        brightness: width of the range of the added value, centered on 0.
        saturation: upper end of the range of the factor, which starts at 0.
        contrast: half the width of the range of the factor, centered on 1.
        crop: largest shift as a fraction of the side.
        cutout: side of the blanked square as a fraction of the side.
        flip: probability.
        scale: largest factor; the smallest is its inverse.
        rotate: largest angle in degrees.

    Raises:
        ValueError: an operation is unknown or named twice, the mode is unknown, or a number is out
            of range.

    Example:
        >>> import torch
        >>> import pdd_fast
        >>> dsa = pdd_fast.DSA("color_crop_flip")
        >>> parameters = dsa.sample(5, 32, torch.Generator().manual_seed(0))
        >>> len(parameters), len(parameters.operations)
        (5, 1)
        >>> pdd_fast.augment(torch.rand(5, 3, 32, 32), parameters).shape
        torch.Size([5, 3, 32, 32])
    """

    strategy: str = "color_crop_cutout_flip_scale_rotate"
    mode: str = "single"
    brightness: float = 1.0
    saturation: float = 2.0
    contrast: float = 0.5
    crop: float = 0.125
    cutout: float = 0.5
    flip: float = 0.5
    scale: float = 1.2
    rotate: float = 15.0

    def __post_init__(self) -> None:
        for name in self.operations:
            if name not in OPERATIONS:
                raise ValueError(
                    f"DSA: strategy must join names of {', '.join(OPERATIONS)} by '_' (or be "
                    f"none), got {name!r}"
                )
        if len(set(self.operations)) < len(self.operations):
            raise ValueError(f"DSA: strategy must name every operation once, got {self.strategy!r}")
        if self.mode not in MODES:
            raise ValueError(f"DSA: mode must be {' or '.join(MODES)}, got {self.mode!r}")
        for name, low, high in (
            ("brightness", 0, math.inf),
            ("saturation", 0, math.inf),
            ("contrast", 0, math.inf),
            ("crop", 0, 1),
            ("cutout", 0, 1),
            ("flip", 0, 1),
            ("scale", 1, math.inf),
            ("rotate", 0, math.inf),
        ):
            value = getattr(self, name)
            if not low <= value <= high or value == math.inf:
                end = ")" if high == math.inf else "]"
                raise ValueError(f"DSA: {name} must lie in [{low}, {high}{end}, got {value}")

    @property
    def operations(self) -> tuple[str, ...]:
        """Operations of the strategy, in order."""
        return () if self.strategy.lower() in ("", "none") else tuple(self.strategy.split("_"))

    def sample(
        self,
        batch_size: int,
        image_size: int | tuple[int, int],
        generator: torch.Generator | None = None,
    ) -> AugmentParameters:
        """Return sampled augmentation parameters for a batch.

        Args:
            batch_size: number of images, at least 1.
            image_size: H = W, or (H, W), pixels.
            generator: source of randomness; its device is that of the parameters. None: torch's
                global CPU generator. Parameters sampled on the CPU give the same augmentation on
                every device.
        """
        if batch_size < 1:
            raise ValueError(f"DSA: batch_size must be at least 1, got {batch_size}")
        H, W = _size("DSA", image_size)
        device = generator.device if generator is not None else torch.device("cpu")
        values = _neutral(batch_size, device)
        # A torch call on so few elements takes 1 to 2 µs, and these calls are the whole cost here.
        operations = self.operations
        if operations and self.mode == "single":
            index = torch.randint(len(operations), (), generator=generator, device=device)
            operations = (operations[int(index)],)
        cutout_size = (int(H * self.cutout + 0.5), int(W * self.cutout + 0.5))
        for name in operations:
            if name == "color":
                low, width = self._color.to(device)
                values[_COLOR].uniform_(generator=generator).mul_(width).add_(low)
            elif name == "crop":
                for row, side in ((_ROWS["shift_h"], H), (_ROWS["shift_w"], W)):
                    reach = int(side * self.crop + 0.5)
                    values[row].random_(-reach, reach + 1, generator=generator)
            elif name == "cutout":
                for row, side, cut in (
                    (_ROWS["cutout_h"], H, cutout_size[0]),
                    (_ROWS["cutout_w"], W, cutout_size[1]),
                ):
                    values[row].random_(0, side - cut % 2 + 1, generator=generator)
            elif name == "flip":
                values[_ROWS["flip"]].uniform_(generator=generator).lt_(self.flip)
            elif name == "scale":
                least = 1 / self.scale
                for row in (_ROWS["scale_w"], _ROWS["scale_h"]):
                    values[row].uniform_(generator=generator).mul_(self.scale - least).add_(least)
            else:
                most = math.radians(self.rotate)
                values[_ROWS["angle"]].uniform_(generator=generator).mul_(2 * most).sub_(most)
        return AugmentParameters(operations, (H, W), cutout_size, values)

    @cached_property
    def _color(self) -> Tensor:
        """Lower ends and widths of the ranges of the color rows, [2, 3, 1]."""
        low = torch.tensor(
            [-self.brightness / 2, 0.0, 1 - self.contrast], dtype=torch.float64, device="cpu"
        )
        high = torch.tensor(
            [self.brightness / 2, self.saturation, 1 + self.contrast],
            dtype=torch.float64,
            device="cpu",
        )
        return torch.stack([low, high - low]).unsqueeze(2)


def augment(images: Tensor, parameters: AugmentParameters) -> Tensor:
    """Return augmented images [b, C, H, W], in the memory format of ``images``.

    Differentiable to any order in ``images``, in reverse and forward mode. The map is affine, and
    :func:`augment_adjoint` is the transpose of its linear part.

    Args:
        images: [b, C, H, W], float32 or float64.
        parameters: sampled for b images of this size; moved to the device of ``images`` if needed.

    Raises:
        ValueError, TypeError: the images do not fit the parameters.

    Example:
        >>> import torch
        >>> import pdd_fast
        >>> images = torch.rand(3, 1, 8, 8, requires_grad=True)
        >>> parameters = pdd_fast.DSA().sample(3, 8)
        >>> pdd_fast.augment(images, parameters).sum().backward()
        >>> images.grad.shape
        torch.Size([3, 1, 8, 8])
    """
    _check("augment", "images", images, parameters)
    if not parameters.operations:
        return images
    if _is_followed(images):
        return _Augment.apply(images, parameters, False)
    return _forward(images, parameters, linear=False)


def augment_adjoint(grad: Tensor, parameters: AugmentParameters) -> Tensor:
    """Return Aᵀ ``grad`` [b, C, H, W], with A the linear part of :func:`augment`.

    Args:
        grad: [b, C, H, W], the gradient with respect to the augmented images.
        parameters: those given to :func:`augment`.
    """
    _check("augment_adjoint", "grad", grad, parameters)
    if not parameters.operations:
        return grad
    if _is_followed(grad):
        return _Adjoint.apply(grad, parameters)
    return _adjoint(grad, parameters)


def _is_followed(images: Tensor) -> bool:
    """Return whether torch records operations on ``images``, for reverse mode or for a tangent."""
    return (torch.is_grad_enabled() and images.requires_grad) or forward_ad.unpack_dual(
        images
    ).tangent is not None


def _forward(images: Tensor, p: AugmentParameters, linear: bool) -> Tensor:
    return p.packed(images.device).apply(images, linear)


def _adjoint(grad: Tensor, p: AugmentParameters) -> Tensor:
    return p.packed(grad.device).adjoint(grad)


def _linear(tangent: Tensor, p: AugmentParameters) -> Tensor:
    return (
        _Augment.apply(tangent, p, True)
        if _is_followed(tangent)
        else _forward(tangent, p, linear=True)
    )


class _Augment(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, images: Tensor, parameters: AugmentParameters, linear: bool) -> Tensor:
        ctx.parameters = parameters
        return _forward(images, parameters, linear)

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor, None, None]:
        return augment_adjoint(grad, ctx.parameters), None, None  # type: ignore[attr-defined]

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: None) -> Tensor:
        return _linear(tangent, ctx.parameters)


class _Adjoint(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, grad: Tensor, parameters: AugmentParameters) -> Tensor:
        ctx.parameters = parameters
        return _adjoint(grad, parameters)

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor, None]:
        return _linear(grad, ctx.parameters), None  # type: ignore[attr-defined]

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: None) -> Tensor:
        return augment_adjoint(tangent, ctx.parameters)


def _check(function: str, argument: str, images: Tensor, parameters: AugmentParameters) -> None:
    shape, size = images.shape, parameters.image_size
    if images.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"{function}: {argument} must be float32 or float64, got {images.dtype}")
    if len(shape) != 4 or shape[0] != len(parameters) or shape[2:] != size:
        expected = f"[{len(parameters)}, C, {size[0]}, {size[1]}]"
        raise ValueError(f"{function}: {argument} must have shape {expected}, got {tuple(shape)}")
