"""The random parameters of an augmentation, as values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pdd_fast.ops.dsa import AUG_PARAMS, NOTHING, OPERATIONS, dsa, dsa_adjoint


def _columns(numbers: list[int], count: int, device: torch.device) -> Tensor:
    """Return int32 [len(numbers), count]: the same operations for every image."""
    if len(numbers) == 1:
        return torch.full((1, count), numbers[0], dtype=torch.int32, device=device)
    column = torch.tensor(numbers, dtype=torch.int32, device=device)
    return column.view(-1, 1).expand(-1, count).contiguous()


_INTEGERS = ("shift_h", "shift_w", "cutout_h", "cutout_w")


_ROWS = {name: row for row, name in enumerate(AUG_PARAMS)}


# Saturation lies between the two, so that one call samples all three.
_COLOR = slice(_ROWS["brightness"], _ROWS["contrast"] + 1)


_NEUTRAL = torch.tensor(
    [[float(name in ("saturation", "contrast", "scale_h", "scale_w"))] for name in AUG_PARAMS],
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
    values: Tensor  # float64 [11, b], rows as in pdd_fast.ops.dsa.AUG_PARAMS
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
                f"AugmentParameters: operations must be from {', '.join(OPERATIONS)}, got "
                f"{unknown[0]!r}"
            )
        unknown = [name for name in draws if name not in AUG_PARAMS]
        if unknown:
            raise TypeError(
                f"AugmentParameters: draws must be from {', '.join(AUG_PARAMS)}, got {unknown[0]!r}"
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

    values: Tensor  # float64 [11, b], rows as in pdd_fast.ops.dsa.AUG_PARAMS
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


def _size(operator: str, image_size: int | tuple[int, int]) -> tuple[int, int]:
    sides = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
    if len(sides) != 2:
        raise ValueError(f"{operator}: image_size must be one number or two, got {sides}")
    H, W = sides
    if H < 1 or W < 1:
        raise ValueError(f"{operator}: image_size must be at least 1 pixel, got {H}x{W}")
    return H, W
