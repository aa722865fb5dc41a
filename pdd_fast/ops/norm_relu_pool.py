"""Instance norm, affine, ReLU and 2×2 average pool as one operator, forward and backward.

It is one block of the ConvNet after its convolution. :mod:`pdd_fast.ops.norm_relu_pool_dual`
computes it on dual numbers. ``csrc/ops/norm_relu_pool/math.h`` has the formulas. Kernels read and
write channels-last memory. Other layouts are converted first, and results are channels-last.

Images [B, C, H, W] may be float32, float64, bfloat16 or float16. For the 16-bit types, all
arithmetic and everything that is not an image (statistics, per-channel vectors and their gradients)
is float32.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from pdd_fast.ops import _native
from pdd_fast.ops._registry import Operator, compute_dtype, require_floating, require_like
from pdd_fast.runtime.errors import require

EPS = 1e-5  # torch.nn.GroupNorm's default


def _dense(tensor: Tensor) -> Tensor:
    return tensor.contiguous(memory_format=torch.channels_last)


def _empty(like: Tensor, batch: int, height: int, width: int) -> Tensor:
    """Return uninitialized [batch, C, height, width] in channels-last memory."""
    return like.new_empty((batch, height, width, like.shape[1])).permute(0, 3, 1, 2)


def _new(z: Tensor, *shape: int) -> Tensor:
    """Return uninitialized statistics or vectors for images ``z``."""
    return z.new_empty(shape, dtype=compute_dtype(z.dtype))


# Shapes of the arguments of all four operators: [B, C, H, W], [B, C, H//2, W//2], [B, C],
# [4, B, C], [C].
_SHAPES = {
    **dict.fromkeys(("z", "z_tangent"), 0),
    **dict.fromkeys(("grad_out", "grad_out_tangent"), 1),
    **dict.fromkeys(("mean", "rstd"), 2),
    "statistics": 3,
    **dict.fromkeys(("weight", "weight_tangent", "bias", "bias_tangent"), 4),
}


def _check(name: str, call: Any) -> None:
    """Raise unless the tensors of ``call`` fit its ``z``.

    Args:
        name: name of the operator, for the message.
        call: arguments of one of the four operators.
    """
    z: Tensor = call.z
    require_floating(name, "z", z, half=True)
    require(name, z.dim() == 4, "z", "have shape [B, C, H, W]", tuple(z.shape))
    B, C, H, W = shape = tuple(z.shape)
    require(name, min(H, W) >= 2, "z", "be at least 2 pixels high and wide", shape)
    require(name, z.numel() > 0, "z", "not be empty", shape)
    require(name, C * H * W < 2**31, "z", "have fewer than 2**31 elements per image", shape)
    shapes = (B, C, H, W), (B, C, H // 2, W // 2), (B, C), (4, B, C), (C,)
    computed = compute_dtype(z.dtype)
    for argument, tensor in zip(call._fields, call, strict=True):
        if argument in _SHAPES:
            expected = shapes[_SHAPES[argument]]
            dtype = z.dtype if len(expected) == 4 else computed
            require_like(name, argument, tensor, z, expected, dtype)


def _read(call: Any) -> list[Tensor]:
    """Return the tensors of ``call`` as kernels read them."""
    return [
        _dense(argument) if argument.dim() == 4 else argument.contiguous()
        for argument in call
        if isinstance(argument, Tensor)
    ]


def _statistics(z: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    variance, mean = torch.var_mean(z, dim=(2, 3), correction=0)
    return mean, (variance + eps).rsqrt()


def _images(vector: Tensor) -> Tensor:
    """Return [C] or [B, C] shaped to broadcast over [B, C, H, W]."""
    return vector[..., None, None]


def _upsample(pooled: Tensor, like: Tensor) -> Tensor:
    """Return the adjoint of the 2×2 average pool, zero in an odd last row or column."""
    grad = torch.zeros_like(like)
    height, width = pooled.shape[2] * 2, pooled.shape[3] * 2
    grad[:, :, :height, :width] = pooled.repeat_interleave(2, 2).repeat_interleave(2, 3) / 4
    return grad


def _plane_mean(images: Tensor) -> Tensor:
    return images.mean((2, 3), keepdim=True)


# ---- norm_relu_pool ----


class _NormReluPool(NamedTuple):
    # [B, C, H, W] with H, W >= 2; an odd last row or column counts in the norm but is not pooled
    z: Tensor
    weight: Tensor  # [C]
    bias: Tensor  # [C]
    eps: float = EPS  # added to the variance

    def check(self, name: str) -> None:
        _check(name, self)

    def allocate(self) -> tuple[Tensor, Tensor, Tensor]:
        z = self.z
        B, C, H, W = z.shape
        return _empty(z, B, H // 2, W // 2), _new(z, B, C), _new(z, B, C)

    def kernel(self, name: str) -> tuple[Tensor, Tensor, Tensor]:
        results = self.allocate()
        _native.call(name, self.z, *self.z.shape, self.eps, *_read(self), *results)
        return results

    def reference(self) -> tuple[Tensor, Tensor, Tensor]:
        z = self.z
        mean, rstd = _statistics(z, self.eps)
        a = (z - _images(mean)) * _images(rstd) * _images(self.weight) + _images(self.bias)
        return _dense(torch.nn.functional.avg_pool2d(a.relu(), 2)), mean, rstd


norm_relu_pool = Operator("norm_relu_pool", _NormReluPool)
"""Return avg_pool2d(relu(instance_norm(z) * weight + bias), 2) and the norm's statistics.

Returns:
    out [B, C, H//2, W//2], mean [B, C], rstd [B, C] = 1/sqrt(variance + eps).
"""


# ---- norm_relu_pool_backward ----


class _NormReluPoolBackward(NamedTuple):
    grad_out: Tensor  # [B, C, H//2, W//2]
    z: Tensor  # [B, C, H, W]
    mean: Tensor  # [B, C]
    rstd: Tensor  # [B, C]
    weight: Tensor  # [C]
    bias: Tensor  # [C]

    def check(self, name: str) -> None:
        _check(name, self)

    def allocate(self) -> tuple[Tensor, Tensor]:
        z = self.z
        B, C, H, W = z.shape
        return _empty(z, B, H, W), _new(z, 2, B, C)

    def kernel(self, name: str) -> tuple[Tensor, Tensor]:
        grad_z, parts = self.allocate()
        _native.call(name, self.z, *self.z.shape, *_read(self), grad_z, *parts)
        return grad_z, parts

    def reference(self) -> tuple[Tensor, Tensor]:
        z, rstd, weight = self.z, _images(self.rstd), _images(self.weight)
        x_hat = (z - _images(self.mean)) * rstd
        grad = _upsample(self.grad_out, z) * (x_hat * weight + _images(self.bias) > 0)
        centered = grad - _plane_mean(grad) - x_hat * _plane_mean(grad * x_hat)
        parts = torch.stack([(grad * x_hat).sum((2, 3)), grad.sum((2, 3))])
        return _dense(rstd * weight * centered), parts


norm_relu_pool_backward = Operator("norm_relu_pool_backward", _NormReluPoolBackward)
"""Return the gradients of :data:`norm_relu_pool`.

Returns:
    grad_z: gradient with respect to z [B, C, H, W].
    parts: [2, B, C], the term of every image in the gradients with respect to weight and bias. The
        caller sums over B, straight into a flat vector in which the two are neighbors.
"""
