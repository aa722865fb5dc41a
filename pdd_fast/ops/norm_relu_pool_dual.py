"""Instance norm, affine, ReLU and 2×2 average pool on dual numbers, forward and backward.

docs/mathematics.md, section 2, derives the formulas.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pdd_fast.ops import _native
from pdd_fast.ops._registry import operator
from pdd_fast.ops.norm_relu_pool import (
    EPS,
    _check_all,
    _check_images,
    _dense,
    _empty,
    _images,
    _new,
    _plane_mean,
    _statistics,
    _upsample,
)


def _check_dual(
    z: Tensor,
    z_tangent: Tensor,
    weight: Tensor,
    weight_tangent: Tensor,
    bias: Tensor,
    bias_tangent: Tensor,
    eps: float,
    tangent_only: bool,
) -> None:
    name = "norm_relu_pool_dual"
    images, _, vector = _check_images(name, z)
    _check_all(
        name,
        z,
        {
            "z_tangent": (z_tangent, images),
            "weight": (weight, vector),
            "weight_tangent": (weight_tangent, vector),
        }
        | {"bias": (bias, vector), "bias_tangent": (bias_tangent, vector)},
    )


def _allocate_dual(
    z: Tensor,
    z_tangent: Tensor,
    weight: Tensor,
    weight_tangent: Tensor,
    bias: Tensor,
    bias_tangent: Tensor,
    eps: float,
    tangent_only: bool,
) -> tuple[Tensor, Tensor]:
    B, C, H, W = z.shape
    return _empty(z, B if tangent_only else 2 * B, H // 2, W // 2), _new(z, 4, B, C)


def _kernel_dual(
    z: Tensor,
    z_tangent: Tensor,
    weight: Tensor,
    weight_tangent: Tensor,
    bias: Tensor,
    bias_tangent: Tensor,
    eps: float,
    tangent_only: bool,
) -> tuple[Tensor, Tensor]:
    z, z_tangent = _dense(z), _dense(z_tangent)
    vectors = tuple(t.contiguous() for t in (weight, weight_tangent, bias, bias_tangent))
    out, statistics = _allocate_dual(
        z, z_tangent, weight, weight_tangent, bias, bias_tangent, eps, tangent_only
    )
    _native.call(
        "norm_relu_pool_dual",
        z,
        *z.shape,
        eps,
        z,
        z_tangent,
        *vectors,
        None if tangent_only else out,
        out if tangent_only else out[len(z) :],
        *statistics,
    )
    return out, statistics


def norm_relu_pool_dual_reference(
    z: Tensor,
    z_tangent: Tensor,
    weight: Tensor,
    weight_tangent: Tensor,
    bias: Tensor,
    bias_tangent: Tensor,
    eps: float,
    tangent_only: bool,
) -> tuple[Tensor, Tensor]:
    """Return :func:`norm_relu_pool_dual` in plain torch."""
    mean, rstd = _statistics(z, eps)
    x_hat = (z - _images(mean)) * _images(rstd)
    mean_tangent, kappa = z_tangent.mean((2, 3)), (x_hat * z_tangent).mean((2, 3))
    x_hat_tangent = _images(rstd) * (z_tangent - _images(mean_tangent) - x_hat * _images(kappa))
    a = x_hat * _images(weight) + _images(bias)
    a_tangent = (
        x_hat * _images(weight_tangent) + x_hat_tangent * _images(weight) + _images(bias_tangent)
    )
    value = torch.nn.functional.avg_pool2d(a.relu(), 2)
    derivative = torch.nn.functional.avg_pool2d(a_tangent * (a > 0), 2)
    out = derivative if tangent_only else torch.cat([value, derivative])
    return _dense(out), torch.stack([mean, rstd, mean_tangent, kappa])


_norm_relu_pool_dual = operator(
    "norm_relu_pool_dual(Tensor z, Tensor z_tangent, Tensor weight, Tensor weight_tangent, "
    "Tensor bias, Tensor bias_tangent, float eps, bool tangent_only) -> (Tensor, Tensor)",
    check=_check_dual,
    allocate=_allocate_dual,
    kernel=_kernel_dual,
    reference=norm_relu_pool_dual_reference,
)


def norm_relu_pool_dual(
    z: Tensor,  # [B, C, H, W]
    z_tangent: Tensor,  # [B, C, H, W]
    weight: Tensor,  # [C]
    weight_tangent: Tensor,  # [C]
    bias: Tensor,  # [C]
    bias_tangent: Tensor,  # [C]
    eps: float = EPS,
    tangent_only: bool = False,
) -> tuple[Tensor, Tensor]:
    """Return :func:`norm_relu_pool` on dual numbers (docs/mathematics.md, section 2).

    Returns:
        out: [2B, C, H//2, W//2], the values and then the tangents, stacked so that the next
        convolution is one call. With ``tangent_only``: the tangents alone, [B, C, H//2, W//2].
        statistics: [4, B, C]: mean, rstd, tangent of mean, kappa = mean(x_hat * z_tangent), for the
        backward pass.
    """
    return _norm_relu_pool_dual(
        z, z_tangent, weight, weight_tangent, bias, bias_tangent, eps, tangent_only
    )


def _check_dual_backward(
    grad_out: Tensor,
    grad_out_tangent: Tensor,
    z: Tensor,
    z_tangent: Tensor,
    statistics: Tensor,
    weight: Tensor,
    weight_tangent: Tensor,
    bias: Tensor,
    tangent_only: bool,
) -> None:
    name = "norm_relu_pool_dual_backward"
    images, pooled, vector = _check_images(name, z)
    _check_all(
        name,
        z,
        {"grad_out": (grad_out, pooled), "grad_out_tangent": (grad_out_tangent, pooled)}
        | {"z_tangent": (z_tangent, images), "statistics": (statistics, (4, *images[:2]))}
        | {
            "weight": (weight, vector),
            "weight_tangent": (weight_tangent, vector),
            "bias": (bias, vector),
        },
    )


def _allocate_dual_backward(
    grad_out: Tensor,
    grad_out_tangent: Tensor,
    z: Tensor,
    z_tangent: Tensor,
    statistics: Tensor,
    weight: Tensor,
    weight_tangent: Tensor,
    bias: Tensor,
    tangent_only: bool,
) -> tuple[Tensor, Tensor]:
    B, C, H, W = z.shape
    return _empty(z, B if tangent_only else 2 * B, H, W), _new(z, 2, B, C)


def _kernel_dual_backward(
    grad_out: Tensor,
    grad_out_tangent: Tensor,
    z: Tensor,
    z_tangent: Tensor,
    statistics: Tensor,
    weight: Tensor,
    weight_tangent: Tensor,
    bias: Tensor,
    tangent_only: bool,
) -> tuple[Tensor, Tensor]:
    images = tuple(_dense(t) for t in (grad_out, grad_out_tangent, z, z_tangent))
    vectors = tuple(t.contiguous() for t in (weight, weight_tangent, bias))
    statistics = statistics.contiguous()
    grad_z, parts = _allocate_dual_backward(
        grad_out,
        grad_out_tangent,
        z,
        z_tangent,
        statistics,
        weight,
        weight_tangent,
        bias,
        tangent_only,
    )
    _native.call(
        "norm_relu_pool_dual_backward",
        z,
        *z.shape,
        *images,
        *statistics,
        *vectors,
        None if tangent_only else grad_z[len(z) :],
        grad_z,
        parts[0],
        parts[1],
    )
    return grad_z, parts


def norm_relu_pool_dual_backward_reference(
    grad_out: Tensor,
    grad_out_tangent: Tensor,
    z: Tensor,
    z_tangent: Tensor,
    statistics: Tensor,
    weight: Tensor,
    weight_tangent: Tensor,
    bias: Tensor,
    tangent_only: bool,
) -> tuple[Tensor, Tensor]:
    """Return :func:`norm_relu_pool_dual_backward` in plain torch."""
    mean, rstd, mean_tangent, kappa = map(_images, statistics)
    x_hat = (z - mean) * rstd
    x_hat_tangent = rstd * (z_tangent - mean_tangent - x_hat * kappa)
    mask = x_hat * _images(weight) + _images(bias) > 0
    grad, grad_tangent = _upsample(grad_out, z) * mask, _upsample(grad_out_tangent, z) * mask
    product, product_tangent = grad * x_hat, grad_tangent * x_hat + grad * x_hat_tangent
    centered = grad - _plane_mean(grad) - x_hat * _plane_mean(product)
    centered_tangent = (
        grad_tangent
        - _plane_mean(grad_tangent)
        - x_hat_tangent * _plane_mean(product)
        - x_hat * _plane_mean(product_tangent)
    )
    factor = rstd * _images(weight)
    factor_tangent = rstd * _images(weight_tangent) - rstd * rstd * kappa * _images(weight)
    derivative = factor_tangent * centered + factor * centered_tangent
    grad_z = derivative if tangent_only else torch.cat([derivative, factor * centered])
    return _dense(grad_z), torch.stack([product_tangent.sum((2, 3)), grad_tangent.sum((2, 3))])


_norm_relu_pool_dual_backward = operator(
    "norm_relu_pool_dual_backward(Tensor grad_out, Tensor grad_out_tangent, Tensor z, "
    "Tensor z_tangent, Tensor statistics, Tensor weight, Tensor weight_tangent, "
    "Tensor bias, bool tangent_only) -> (Tensor, Tensor)",
    check=_check_dual_backward,
    allocate=_allocate_dual_backward,
    kernel=_kernel_dual_backward,
    reference=norm_relu_pool_dual_backward_reference,
)


def norm_relu_pool_dual_backward(
    grad_out: Tensor,  # [B, C, H//2, W//2]
    grad_out_tangent: Tensor,  # [B, C, H//2, W//2]
    z: Tensor,  # [B, C, H, W]
    z_tangent: Tensor,  # [B, C, H, W]
    statistics: Tensor,  # [4, B, C] from norm_relu_pool_dual
    weight: Tensor,  # [C]
    weight_tangent: Tensor,  # [C]
    bias: Tensor,  # [C]
    tangent_only: bool = False,
) -> tuple[Tensor, Tensor]:
    """Return :func:`norm_relu_pool_backward` on dual numbers (docs/mathematics.md, section 2).

    Returns:
        grad_z: [2B, C, H, W], the tangents first and then the values, because the weight gradient
        of the convolution before pairs tangents of gradients with values of inputs. With
        ``tangent_only``: the tangents alone [B, C, H, W].
        parts: [2, B, C], the term of every image in the tangents of the gradients with respect to
        weight and bias.
    """
    return _norm_relu_pool_dual_backward(
        grad_out,
        grad_out_tangent,
        z,
        z_tangent,
        statistics,
        weight,
        weight_tangent,
        bias,
        tangent_only,
    )
