"""Differentiable Siamese augmentation (DSA; Zhao and Bilen, ICML 2021, arXiv 2102.08259) with draws
that can be kept.

Drawing and applying are apart: the same draws can be applied again, to other images, or transposed,
which is what the adjoint of an unrolled training run needs.
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
_COLOR = slice(
    _ROWS["brightness"], _ROWS["contrast"] + 1
)  # with saturation between them: one call draws all three
_NEUTRAL = torch.tensor(
    [[float(name in ("saturation", "contrast", "scale_h", "scale_w"))] for name in DRAWS],
    dtype=torch.float64,
    device="cpu",
)


def _neutral(batch_size: int, device: torch.device) -> Tensor:
    """float64 [11, batch_size]: draws that change nothing."""
    # Three times as fast as repeat.
    return _NEUTRAL.to(device).expand(-1, batch_size).clone(memory_format=torch.contiguous_format)


def _draw(name: str) -> Any:
    """One draw of every image as an attribute."""
    row = _ROWS[name]
    if name == "flip":
        return property(lambda p: p.values[row] != 0)
    return property(
        (lambda p: p.values[row].long()) if name in _INTEGERS else (lambda p: p.values[row])
    )


@dataclass(frozen=True, eq=False)  # an == of tensors has no truth value
class AugmentParameters:
    """What was drawn for a batch of b images: which operations, in which order, and every image's
    numbers.

    Draws of operations that are not applied hold the values that change nothing. Make one by hand
    with :meth:`of`.
    """

    operations: tuple[str, ...]  # of color, crop, cutout, flip, scale, rotate, in the order applied
    image_size: tuple[int, int]  # (H, W) that was drawn for
    cutout_size: tuple[int, int]  # height and width of what cutout blanks
    values: Tensor  # float64 [11, b], rows as in pdd_fast.ops.dsa.DRAWS; below each row by its name
    _packed: dict[torch.device, PackedAugmentParameters] = field(
        default_factory=dict, repr=False, compare=False
    )

    brightness = _draw("brightness")  # [b] float64, added
    saturation = _draw(
        "saturation"
    )  # [b] float64, factor of the distance from the mean over channels
    contrast = _draw("contrast")  # [b] float64, factor of the distance from the mean of the image
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
        """Parameters with the given draws, each [batch_size], on one device; the others hold what
        changes nothing.

        Raises:
            ValueError, TypeError: an operation or a draw is unknown, or a draw has another length.
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
        return self.values.shape[1]

    def __getitem__(self, rows: Tensor | slice) -> AugmentParameters:
        """The parameters of some of the images."""
        if isinstance(rows, Tensor):
            rows = rows.to(self.values.device)
        return self._with(self.values[:, rows])

    def to(self, device: torch.device | str) -> AugmentParameters:
        """The parameters on another device."""
        return self._with(self.values.to(device))

    def _with(self, values: Tensor) -> AugmentParameters:
        return AugmentParameters(self.operations, self.image_size, self.cutout_size, values)

    def _numbers(self, count: int) -> list[int]:
        """The operations as the kernels count them, and then nothing, ``count`` in all."""
        return [OPERATIONS.index(name) for name in self.operations] + [NOTHING] * (
            count - len(self.operations)
        )

    def packed(self, device: torch.device) -> PackedAugmentParameters:
        """What the kernels take, on ``device``; made once per device."""
        if device not in self._packed:
            self._packed[device] = PackedAugmentParameters.of([self]).to(device)
        return self._packed[device]


class PackedAugmentParameters(NamedTuple):
    """The draws of a batch of b images as the kernels take them: tensors alone, so that a captured
    graph can be given others of the same shape.
    """

    values: Tensor  # float64 [11, b], rows as in pdd_fast.ops.dsa.DRAWS
    operations: (
        Tensor  # int32 [k, b], indices into pdd_fast.ops.dsa.OPERATIONS, in the order applied
    )
    cutout_size: tuple[int, int]

    @classmethod
    def of(cls, parameters: Sequence[AugmentParameters]) -> PackedAugmentParameters:
        """The draws of several batches of images of one size, one after another."""
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
        return PackedAugmentParameters(
            self.values.to(device), self.operations.to(device), self.cutout_size
        )

    def apply(self, images: Tensor, linear: bool = False) -> Tensor:
        """:func:`augment` without autograd, or its linear part."""
        return dsa(images, self.values, self.operations, self.cutout_size, linear)

    def adjoint(self, grad: Tensor) -> Tensor:
        """:func:`augment_adjoint` without autograd."""
        return dsa_adjoint(grad, self.values, self.operations, self.cutout_size)


@dataclass(frozen=True)
class DSA:
    """A strategy: which operations are drawn, and from which ranges (docs/mathematics.md, section
    5).

    Args:
        strategy: names of operations joined by "_", of color, crop, cutout, flip, scale, rotate;
            "none" for no augmentation. The order is the order in which mode "multiple" applies
            them.
        mode: "single" draws one of the operations per call, for the whole batch, with numbers per
            image; "multiple" applies all.
        brightness: width of the range of what is added, centered on 0.
        saturation: upper end of the range of the factor, from 0.
        contrast: half the width of the range of the factor, centered on 1.
        crop: largest shift as a fraction of the side.
        cutout: side of the blanked square as a fraction of the side.
        flip: probability.
        scale: largest factor; the smallest is its inverse.
        rotate: largest angle in degrees.

    Raises:
        ValueError: an unknown operation, one named twice, an unknown mode, or a number out of
            range.
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
        """The strategy's operations, in order."""
        return () if self.strategy.lower() in ("", "none") else tuple(self.strategy.split("_"))

    def sample(
        self,
        batch_size: int,
        image_size: int | tuple[int, int],
        generator: torch.Generator | None = None,
    ) -> AugmentParameters:
        """Draws for a batch.

        Args:
            batch_size: images, at least 1.
            image_size: H = W, or (H, W), pixels.
            generator: where the randomness comes from and on which device the draws are made; None:
                torch's global CPU generator. CPU draws give the same augmentation on every device.
        """
        if batch_size < 1:
            raise ValueError(f"DSA: batch_size must be at least 1, got {batch_size}")
        H, W = _size("DSA", image_size)
        device = generator.device if generator is not None else torch.device("cpu")
        values = _neutral(batch_size, device)
        # A call of torch on so few numbers takes a microsecond or two, and that is all that this
        # function takes.
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
        """Lower ends and widths of the ranges of the rows of color, [2, 3, 1]."""
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
    """int32 [len(numbers), count]: the same operations for every image."""
    if len(numbers) == 1:
        return torch.full((1, count), numbers[0], dtype=torch.int32, device=device)
    column = torch.tensor(numbers, dtype=torch.int32, device=device)
    return column.view(-1, 1).expand(-1, count).contiguous()


def augment(images: Tensor, parameters: AugmentParameters) -> Tensor:
    """Augmented images [b, C, H, W], in the memory format of ``images``.

    Differentiable to any order in ``images``, in reverse and forward mode: the map is affine, and
    the transpose of its linear part is :func:`augment_adjoint`.

    Args:
        images: [b, C, H, W], float32 or float64.
        parameters: drawn for b images of this size; moved to the device of ``images`` where needed.

    Raises:
        ValueError, TypeError: the images do not fit the parameters.
    """
    _check("augment", "images", images, parameters)
    if not parameters.operations:
        return images
    if _is_followed(images):
        return _Augment.apply(images, parameters, False)
    return _forward(images, parameters, linear=False)


def augment_adjoint(grad: Tensor, parameters: AugmentParameters) -> Tensor:
    """Aᵀ ``grad`` [b, C, H, W], with A the linear part of :func:`augment` for the same
    parameters."""
    _check("augment_adjoint", "grad", grad, parameters)
    if not parameters.operations:
        return grad
    if _is_followed(grad):
        return _Adjoint.apply(grad, parameters)
    return _adjoint(grad, parameters)


def _is_followed(images: Tensor) -> bool:
    """Whether torch records what is done with ``images``: for reverse mode, or for a tangent they
    carry along.
    """
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
