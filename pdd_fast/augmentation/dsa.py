"""Differentiable Siamese augmentation (DSA) with reusable augmentation parameters.

Sampling and applying are separate. The same parameters can be applied again, to other images, or
transposed, as the adjoint of an unrolled training run needs.

Source: Zhao and Bilen, ICML 2021, arXiv 2102.08259.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.function import FunctionCtx

from pdd_fast.ops.dsa import DRAWS, NOTHING, OPERATIONS, dsa, dsa_adjoint

MODES = ("single", "multiple")
_INTEGERS = ("shift_h", "shift_w", "cutout_h", "cutout_w")
_ROWS = {name: row for row, name in enumerate(DRAWS)}
# Saturation lies between the two, so that one call samples all three.
_COLOR = slice(_ROWS["brightness"], _ROWS["contrast"] + 1)
_NEUTRAL = torch.tensor(
    [[float(name in ("saturation", "contrast", "scale_h", "scale_w"))] for name in DRAWS],
    dtype=torch.float64,
    device="cpu",
)


def _neutral(batch_size: int, device: torch.device) -> Tensor:
    """Return float64 [11, batch_size]: parameters that change nothing."""
    # Three times as fast as repeat.
    return _NEUTRAL.to(device).expand(-1, batch_size).clone(memory_format=torch.contiguous_format)


def _draw(name: str) -> Any:
    """Return a property that gives one parameter of every image."""
    row = _ROWS[name]
    if name == "flip":
        return property(lambda p: p.values[row] != 0)
    return property(
        (lambda p: p.values[row].long()) if name in _INTEGERS else (lambda p: p.values[row])
    )


@dataclass(frozen=True, eq=False)  # comparing tensors gives no single truth value
class AugmentParameters:
    """Sampled augmentation parameters of a batch of b images.

    They hold the operations, their order, and the parameters of every image. The parameters of
    operations that are not applied have neutral values. :meth:`of` makes an instance from given
    values, :meth:`DSA.sample` from random ones.

    Example:
        >>> import torch
        >>> import pdd_fast
        >>> parameters = pdd_fast.AugmentParameters.of(
        ...     ("flip",), batch_size=2, image_size=2, flip=torch.tensor([True, False])
        ... )
        >>> images = torch.arange(8.0).view(2, 1, 2, 2)
        >>> pdd_fast.augment(images, parameters)[0]
        tensor([[[1., 0.],
                 [3., 2.]]])
    """

    operations: tuple[str, ...]  # from color, crop, cutout, flip, scale, rotate, in order
    image_size: tuple[int, int]  # (H, W) of the images
    cutout_size: tuple[int, int]  # height and width of the blanked rectangle
    values: Tensor  # float64 [11, b], rows as in pdd_fast.ops.dsa.DRAWS
    _packed: dict[torch.device, PackedAugmentParameters] = field(
        default_factory=dict, repr=False, compare=False
    )

    # Rows of ``values`` by name.
    brightness = _draw("brightness")  # [b] float64, added
    # [b] float64, factor of the distance from the mean over channels
    saturation = _draw("saturation")
    contrast = _draw("contrast")  # [b] float64, factor of the distance from the image's mean
    shift_h = _draw("shift_h")  # [b] int64, rows
    shift_w = _draw("shift_w")  # [b] int64, columns
    cutout_h = _draw("cutout_h")  # [b] int64, row of the center
    cutout_w = _draw("cutout_w")  # [b] int64, column of the center
    flip = _draw("flip")  # [b] bool
    scale_h = _draw("scale_h")  # [b] float64
    scale_w = _draw("scale_w")  # [b] float64
    angle = _draw("angle")  # [b] float64, radians

    @classmethod
    def of(
        cls,
        operations: tuple[str, ...],
        batch_size: int,
        image_size: int | tuple[int, int],
        cutout_size: tuple[int, int] | None = None,
        **draws: Tensor,
    ) -> AugmentParameters:
        """Return parameters with the given values.

        Args:
            operations: names of the operations, in the order applied.
            batch_size: number of images.
            image_size: H = W, or (H, W), pixels.
            cutout_size: height and width of the blanked rectangle. None: half of each side.
            **draws: parameters by name, each [batch_size], all on one device. Others are neutral.

        Raises:
            ValueError, TypeError: an operation or a parameter is unknown, or a parameter has
                another length.
        """
        size = _size("AugmentParameters", image_size)
        unknown = [name for name in operations if name not in OPERATIONS]
        if unknown:
            raise ValueError(
                f"AugmentParameters: operations must be of {', '.join(OPERATIONS)}, got "
                f"{unknown[0]!r}"
            )
        unknown = [name for name in draws if name not in DRAWS]
        if unknown:
            raise TypeError(
                f"AugmentParameters: there is no draw {unknown[0]!r}; the draws are "
                f"{', '.join(DRAWS)}"
            )
        device = next((value.device for value in draws.values()), torch.device("cpu"))
        values = _neutral(batch_size, device)
        for name, value in draws.items():
            if tuple(value.shape) != (batch_size,):
                raise ValueError(
                    f"AugmentParameters: {name} must have shape ({batch_size},), got "
                    f"{tuple(value.shape)}"
                )
            value = value.detach()
            values[_ROWS[name]] = (
                value.long() if name in _INTEGERS else value.bool() if name == "flip" else value
            )
        if cutout_size is None:
            cutout_size = (int(size[0] * 0.5 + 0.5), int(size[1] * 0.5 + 0.5))
        return cls(tuple(operations), size, cutout_size, values)

    def __len__(self) -> int:
        """Return the number of images."""
        return self.values.shape[1]

    def __getitem__(self, rows: Tensor | slice) -> AugmentParameters:
        """Return the parameters of some of the images."""
        if isinstance(rows, Tensor):
            rows = rows.to(self.values.device)
        return self._with(self.values[:, rows])

    def to(self, device: torch.device | str) -> AugmentParameters:
        """Return the parameters on another device."""
        return self._with(self.values.to(device))

    def _with(self, values: Tensor) -> AugmentParameters:
        return AugmentParameters(self.operations, self.image_size, self.cutout_size, values)

    def _numbers(self, count: int) -> list[int]:
        """Return the kernels' codes of the operations, padded to ``count`` with "nothing"."""
        return [OPERATIONS.index(name) for name in self.operations] + [NOTHING] * (
            count - len(self.operations)
        )

    def packed(self, device: torch.device) -> PackedAugmentParameters:
        """Return the parameters as the kernels take them, on ``device``; cached per device."""
        if device not in self._packed:
            self._packed[device] = PackedAugmentParameters.of([self]).to(device)
        return self._packed[device]


class PackedAugmentParameters(NamedTuple):
    """Augmentation parameters of a batch of b images as the kernels take them.

    They are tensors only, so that a captured graph can be given others of the same shape.
    """

    values: Tensor  # float64 [11, b], rows as in pdd_fast.ops.dsa.DRAWS
    # int32 [k, b], indices into pdd_fast.ops.dsa.OPERATIONS, in the order applied
    operations: Tensor
    cutout_size: tuple[int, int]

    @classmethod
    def of(cls, parameters: Sequence[AugmentParameters]) -> PackedAugmentParameters:
        """Return the parameters of several batches of images of one size, concatenated."""
        first, most = parameters[0], max(len(p.operations) for p in parameters)
        blocks = [(p._numbers(most), len(p)) for p in parameters]
        if len(parameters) == 1:
            return cls(first.values, _columns(*blocks[0], first.values.device), first.cutout_size)
        values = torch.cat([p.values for p in parameters], 1)
        length = len(first)
        if all(len(p) == length for p in parameters):
            table = torch.tensor(
                [numbers for numbers, _ in blocks], dtype=torch.int32, device="cpu"
            ).view(-1, most)
            operations = table.t().unsqueeze(2).expand(-1, -1, length).reshape(most, -1)
        else:
            operations = torch.cat(
                [_columns(numbers, count, torch.device("cpu")) for numbers, count in blocks], 1
            )
        return cls(values, operations.to(values.device), first.cutout_size)

    def to(self, device: torch.device) -> PackedAugmentParameters:
        """Return the parameters on another device."""
        return PackedAugmentParameters(
            self.values.to(device), self.operations.to(device), self.cutout_size
        )

    def apply(self, images: Tensor, linear: bool = False) -> Tensor:
        """Return :func:`augment` of ``images`` without autograd, or its linear part."""
        return dsa(images, self.values, self.operations, self.cutout_size, linear)

    def adjoint(self, grad: Tensor) -> Tensor:
        """Return :func:`augment_adjoint` of ``grad`` without autograd."""
        return dsa_adjoint(grad, self.values, self.operations, self.cutout_size)


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


def _columns(numbers: list[int], count: int, device: torch.device) -> Tensor:
    """Return int32 [len(numbers), count]: the same operations for every image."""
    if len(numbers) == 1:
        return torch.full((1, count), numbers[0], dtype=torch.int32, device=device)
    column = torch.tensor(numbers, dtype=torch.int32, device=device)
    return column.view(-1, 1).expand(-1, count).contiguous()


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


def _size(operator: str, image_size: int | tuple[int, int]) -> tuple[int, int]:
    sides = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
    if len(sides) != 2:
        raise ValueError(f"{operator}: image_size must be one number or two, got {sides}")
    H, W = sides
    if H < 1 or W < 1:
        raise ValueError(f"{operator}: image_size must be at least 1 pixel, got {H}x{W}")
    return H, W
