"""Every operator with the inputs it is tried on. A new operator is tested by adding a row to
OPERATORS.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pdd_fast.augmentation.dsa import DSA
from pdd_fast.augmentation.parameters import PackedAugmentParameters
from pdd_fast.ops import _registry as ops
from pdd_fast.ops import add_rows as rows_ops
from pdd_fast.ops import cross_entropy as ce
from pdd_fast.ops import dsa as dsa_ops
from pdd_fast.ops import norm_relu_pool as nrp
from pdd_fast.ops import norm_relu_pool_dual as nrp_dual

# Rounding of float32 in sums over at most 65 x 33 pixels and over the batch; float64 differs by the
# order of additions.
TOLERANCE = {torch.float32: 2e-5, torch.float64: 1e-12}
# Half a unit in the last of the 8 and 11 bits that a result is stored in, and what float32 adds to
# it.
HALF_TOLERANCE = {torch.bfloat16: 2**-8, torch.float16: 2**-11}

# Batch, channels, height, width: odd sides, channels that fill no vector, one image, tiny planes. A
# 2 x 2 plane whose four pixels are all active (or none) has a gradient of exactly 0, hence 45 of
# them with five different biases.
IMAGES = [
    (9, 5, 2, 2),
    (2, 3, 5, 4),
    (3, 8, 8, 8),
    (2, 17, 7, 9),
    (1, 33, 3, 2),
    (4, 32, 16, 16),
    (2, 128, 4, 4),
    (1, 1, 33, 17),
    # Channels in whole packs of 16 bytes with idle lanes beside them; planes of more than 64 and
    # more than 256 windows, which the CUDA kernels keep in part and read again.
    (2, 24, 6, 5),
    (1, 8, 17, 31),
    (1, 16, 34, 33),
]


@dataclass(frozen=True)
class Operator:
    """An operator as the dispatcher knows it, its reference, and sample arguments (tensors on the
    CPU).
    """

    own: ops.Operator[..., Any]
    arguments: Callable[[torch.dtype], Iterator[tuple[Any, ...]]]
    takes_half: bool = False  # images may be bfloat16 or float16

    @property
    def name(self) -> str:
        return self.own.name

    @property
    def function(self) -> Callable[..., Any]:
        return getattr(torch.ops.pdd_fast, self.name).default

    @property
    def reference(self) -> Callable[..., Any]:
        return self.own.reference


def stored_in(dtype: torch.dtype, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """``arguments`` with their images, the tensors of four dimensions, stored as ``dtype``."""
    return tuple(a.to(dtype) if isinstance(a, Tensor) and a.dim() == 4 else a for a in arguments)


def relative_error(found: Tensor, expected: Tensor) -> float:
    """‖found − expected‖ / ‖expected‖, in float64; the plain norm where the expected one is 0."""
    found, expected = found.detach().double().cpu(), expected.detach().double().cpu()
    scale = float(expected.norm())
    return float((found - expected).norm()) / (scale if scale > 0 else 1.0)


def layouts(tensor: Tensor) -> Iterator[Tensor]:
    """The same images in planar and channels-last memory, and as a slice of something larger."""
    yield tensor.contiguous()
    yield tensor.contiguous(memory_format=torch.channels_last)
    larger = torch.randn(
        len(tensor) + 1, tensor.shape[1] + 2, *tensor.shape[2:], dtype=tensor.dtype
    )
    larger[1:, 1:-1] = tensor
    yield larger[1:, 1:-1]


def _vectors(channels: int, dtype: torch.dtype, count: int) -> tuple[Tensor, ...]:
    return tuple(torch.randn(channels, dtype=dtype) for _ in range(count))


def _norm_relu_pool(dtype: torch.dtype) -> Iterator[tuple[Any, ...]]:
    for shape in IMAGES:
        for z in layouts(torch.randn(shape, dtype=dtype) * 2 + 1):
            yield (z, *_vectors(shape[1], dtype, 2), 1e-5)


def _norm_relu_pool_backward(dtype: torch.dtype) -> Iterator[tuple[Any, ...]]:
    for z, weight, bias, eps in _norm_relu_pool(dtype):
        out, mean, rstd = nrp.norm_relu_pool.reference(z, weight, bias, eps)
        for grad in layouts(torch.randn_like(out)):
            yield grad, z, mean, rstd, weight, bias


def _norm_relu_pool_dual(dtype: torch.dtype) -> Iterator[tuple[Any, ...]]:
    for shape in IMAGES:
        for z in layouts(torch.randn(shape, dtype=dtype) * 2 + 1):
            weight, weight_tangent, bias, bias_tangent = _vectors(shape[1], dtype, 4)
            for tangent_only in (False, True):
                z_tangent = torch.randn(shape, dtype=dtype)
                yield z, z_tangent, weight, weight_tangent, bias, bias_tangent, 1e-5, tangent_only


def _norm_relu_pool_dual_backward(dtype: torch.dtype) -> Iterator[tuple[Any, ...]]:
    for arguments in _norm_relu_pool_dual(dtype):
        z, z_tangent, weight, weight_tangent, bias = arguments[:5]
        out, statistics = nrp_dual.norm_relu_pool_dual.reference(*arguments[:-1], True)
        grad, grad_tangent = torch.randn_like(out), torch.randn_like(out)
        yield (
            grad,
            grad_tangent,
            z,
            z_tangent,
            statistics,
            weight,
            weight_tangent,
            bias,
            arguments[-1],
        )


def _labels(batch: int, classes: int, dtype: torch.dtype) -> Iterator[Tensor]:
    yield torch.randint(classes, (batch,))
    yield torch.rand(batch, classes, dtype=dtype).softmax(1)
    yield torch.randn(batch, classes, dtype=dtype)  # weights of any sign and sum


def _cross_entropy(dtype: torch.dtype) -> Iterator[tuple[Any, ...]]:
    # Two classes get eight samples: p - 1 of one that is nearly certain is all rounding in float32.
    for batch, classes in ((1, 1), (8, 2), (20, 10), (7, 200), (300, 33)):
        for labels in _labels(batch, classes, dtype):
            yield torch.randn(batch, classes, dtype=dtype) * 5, labels


def _cross_entropy_dual(dtype: torch.dtype) -> Iterator[tuple[Any, ...]]:
    for logits, labels in _cross_entropy(dtype):
        yield logits, torch.randn_like(logits), labels


def _dsa(dtype: torch.dtype) -> Iterator[tuple[Any, ...]]:
    strategies = [*dsa_ops.OPERATIONS, "color_crop_cutout_flip_scale_rotate"]
    shapes = [
        (3, 1, 8, 8),
        (2, 3, 7, 5),
        (1, 3, 33, 17),
        (4, 2, 1, 6),
        (2, 3, 32, 32),
        (2, 4, 5, 12),
        (1, 5, 6, 4),
    ]
    for shape in shapes:
        for strategy in strategies:
            draw = DSA(strategy, mode="multiple").sample(shape[0], (shape[2], shape[3]))
            for images in layouts(torch.randn(shape, dtype=dtype)):
                packed = draw.packed(torch.device("cpu"))
                yield images, packed.values, packed.operations, list(packed.cutout_size), False
    # Images that go through different operations, as many as there are or fewer.
    several = [
        DSA(name, mode="multiple").sample(2, (9, 6))
        for name in ("crop_color_flip", "rotate", "none", "scale")
    ]
    packed = PackedAugmentParameters.of(several)
    for images in layouts(torch.randn(8, 3, 9, 6, dtype=dtype)):
        yield images, packed.values, packed.operations, list(packed.cutout_size), False


def _dsa_adjoint(dtype: torch.dtype) -> Iterator[tuple[Any, ...]]:
    for arguments in _dsa(dtype):
        yield arguments[:-1]


def _add_rows(dtype: torch.dtype) -> Iterator[tuple[Any, ...]]:
    for shape, added in (
        ((5, 3, 4, 4), 9),
        ((1, 7), 1),
        ((40, 2, 5, 3), 64),
        ((3, 1), 0),
        ((130, 33), 70),
    ):
        target, rows = torch.randn(shape, dtype=dtype), torch.randn(added, *shape[1:], dtype=dtype)
        yield target, torch.randint(shape[0], (added,)), rows


OPERATORS = [
    Operator(nrp.norm_relu_pool, _norm_relu_pool, True),
    Operator(nrp.norm_relu_pool_backward, _norm_relu_pool_backward, True),
    Operator(nrp_dual.norm_relu_pool_dual, _norm_relu_pool_dual, True),
    Operator(nrp_dual.norm_relu_pool_dual_backward, _norm_relu_pool_dual_backward, True),
    Operator(ce.cross_entropy, _cross_entropy),
    Operator(ce.cross_entropy_dual, _cross_entropy_dual),
    Operator(dsa_ops.dsa, _dsa, True),
    Operator(dsa_ops.dsa_adjoint, _dsa_adjoint, True),
    Operator(rows_ops.add_rows, _add_rows),
]


class Harmful:
    """Object that is pickled as a call of code that makes the file ``mark``."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return Path.touch, (self.mark,)
