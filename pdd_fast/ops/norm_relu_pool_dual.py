"""Instance norm, affine, ReLU and 2×2 average pool on dual numbers, forward and backward.

docs/mathematics.md, section 2, derives the formulas.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from pdd_fast.ops import _native
from pdd_fast.ops._registry import Operator
from pdd_fast.ops.norm_relu_pool import (
    EPS,
    _check,
    _dense,
    _empty,
    _images,
    _new,
    _plane_mean,
    _read,
    _statistics,
    _upsample,
)

# ---- norm_relu_pool_dual ----


class _NormReluPoolDual(NamedTuple):
    z: Tensor  # [B, C, H, W]
    z_tangent: Tensor  # [B, C, H, W]
    weight: Tensor  # [C]
    weight_tangent: Tensor  # [C]
    bias: Tensor  # [C]
    bias_tangent: Tensor  # [C]
    eps: float = EPS
    tangent_only: bool = False

    def check(self, name: str) -> None:
        _check(name, self)

    def allocate(self) -> tuple[Tensor, Tensor]:
        z = self.z
        B, C, H, W = z.shape
        return _empty(z, B if self.tangent_only else 2 * B, H // 2, W // 2), _new(z, 4, B, C)

    def kernel(self, name: str) -> tuple[Tensor, Tensor]:
        z = self.z
        out, statistics = self.allocate()
        value, tangent = (None, out) if self.tangent_only else (out, out[len(z) :])
        _native.call(name, z, *z.shape, self.eps, *_read(self), value, tangent, *statistics)
        return out, statistics

    def reference(self) -> tuple[Tensor, Tensor]:
        z, z_tangent, weight = self.z, self.z_tangent, _images(self.weight)
        mean, rstd = _statistics(z, self.eps)
        x_hat = (z - _images(mean)) * _images(rstd)
        mean_tangent, kappa = z_tangent.mean((2, 3)), (x_hat * z_tangent).mean((2, 3))
        x_hat_tangent = _images(rstd) * (z_tangent - _images(mean_tangent) - x_hat * _images(kappa))
        a = x_hat * weight + _images(self.bias)
        a_tangent = (
            x_hat * _images(self.weight_tangent)
            + x_hat_tangent * weight
            + _images(self.bias_tangent)
        )
        value = torch.nn.functional.avg_pool2d(a.relu(), 2)
        derivative = torch.nn.functional.avg_pool2d(a_tangent * (a > 0), 2)
        out = derivative if self.tangent_only else torch.cat([value, derivative])
        return _dense(out), torch.stack([mean, rstd, mean_tangent, kappa])


norm_relu_pool_dual = Operator("norm_relu_pool_dual", _NormReluPoolDual)
"""Return :data:`norm_relu_pool` on dual numbers (docs/mathematics.md, section 2).

Returns:
    out: [2B, C, H//2, W//2], the values and then the tangents, stacked so that the next convolution
        is one call. With ``tangent_only``: the tangents alone, [B, C, H//2, W//2].
    statistics: [4, B, C]: mean, rstd, tangent of mean, kappa = mean(x_hat * z_tangent), for the
        backward pass.
"""


# ---- norm_relu_pool_dual_backward ----


class _NormReluPoolDualBackward(NamedTuple):
    grad_out: Tensor  # [B, C, H//2, W//2]
    grad_out_tangent: Tensor  # [B, C, H//2, W//2]
    z: Tensor  # [B, C, H, W]
    z_tangent: Tensor  # [B, C, H, W]
    statistics: Tensor  # [4, B, C] from norm_relu_pool_dual
    weight: Tensor  # [C]
    weight_tangent: Tensor  # [C]
    bias: Tensor  # [C]
    tangent_only: bool = False

    def check(self, name: str) -> None:
        _check(name, self)

    def allocate(self) -> tuple[Tensor, Tensor]:
        z = self.z
        B, C, H, W = z.shape
        return _empty(z, B if self.tangent_only else 2 * B, H, W), _new(z, 2, B, C)

    def kernel(self, name: str) -> tuple[Tensor, Tensor]:
        z = self.z
        grad_z, parts = self.allocate()
        *images, statistics, weight, weight_tangent, bias = _read(self)
        vectors = weight, weight_tangent, bias
        value = None if self.tangent_only else grad_z[len(z) :]
        _native.call(name, z, *z.shape, *images, *statistics, *vectors, value, grad_z, *parts)
        return grad_z, parts

    def reference(self) -> tuple[Tensor, Tensor]:
        z, weight = self.z, _images(self.weight)
        mean, rstd, mean_tangent, kappa = map(_images, self.statistics)
        x_hat = (z - mean) * rstd
        x_hat_tangent = rstd * (self.z_tangent - mean_tangent - x_hat * kappa)
        mask = x_hat * weight + _images(self.bias) > 0
        grad = _upsample(self.grad_out, z) * mask
        grad_tangent = _upsample(self.grad_out_tangent, z) * mask
        product, product_tangent = grad * x_hat, grad_tangent * x_hat + grad * x_hat_tangent
        centered = grad - _plane_mean(grad) - x_hat * _plane_mean(product)
        centered_tangent = (
            grad_tangent
            - _plane_mean(grad_tangent)
            - x_hat_tangent * _plane_mean(product)
            - x_hat * _plane_mean(product_tangent)
        )
        factor = rstd * weight
        factor_tangent = rstd * _images(self.weight_tangent) - rstd * rstd * kappa * weight
        derivative = factor_tangent * centered + factor * centered_tangent
        grad_z = derivative if self.tangent_only else torch.cat([derivative, factor * centered])
        return _dense(grad_z), torch.stack([product_tangent.sum((2, 3)), grad_tangent.sum((2, 3))])


norm_relu_pool_dual_backward = Operator("norm_relu_pool_dual_backward", _NormReluPoolDualBackward)
"""Return :data:`norm_relu_pool_backward` on dual numbers (docs/mathematics.md, section 2).

Returns:
    grad_z: [2B, C, H, W], the tangents first and then the values, because the weight gradient of
        the convolution before pairs tangents of gradients with values of inputs. With
        ``tangent_only``: the tangents alone [B, C, H, W].
    parts: [2, B, C], the term of every image in the tangents of the gradients with respect to
        weight and bias.
"""
