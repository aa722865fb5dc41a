"""Instance norm, affine, ReLU and 2×2 average pool as one operator, forward and backward.

It is one block of the ConvNet after its convolution. :mod:`pdd_fast.ops.norm_relu_pool_dual`
computes it on dual numbers. ``csrc/ops/norm_relu_pool/math.h`` has the formulas. Kernels read and
write channels-last memory. Other layouts are converted first, and results are channels-last.

Images [B, C, H, W] may be float32, float64, bfloat16 or float16. For the 16-bit types, all
arithmetic and everything that is not an image (statistics, per-channel vectors and their gradients)
is float32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pdd_fast.ops import _native
from pdd_fast.ops._registry import compute_dtype, operator, require_floating, require_like
from pdd_fast.runtime.errors import require

EPS = 1e-5  # torch.nn.GroupNorm's default


def _dense(tensor: Tensor) -> Tensor:
    return tensor.contiguous(memory_format=torch.channels_last)


def _empty(like: Tensor, batch: int, height: int, width: int) -> Tensor:
    """Return uninitialized [batch, C, height, width] in channels-last memory."""
    return like.new_empty((batch, height, width, like.shape[1])).permute(0, 3, 1, 2)


def _check_images(name: str, z: Tensor) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """Return the shapes of the images, the pooled images, and a vector over channels."""
    require_floating(name, "z", z, half=True)
    require(name, z.dim() == 4, "z", "have shape [B, C, H, W]", tuple(z.shape))
    require(name, min(z.shape[2:]) >= 2, "z", "be at least 2 pixels high and wide", tuple(z.shape))
    require(name, z.numel() > 0, "z", "not be empty", tuple(z.shape))
    B, C, H, W = z.shape
    require(
        name, C * H * W < 2**31, "z", "have fewer than 2**31 elements per image", tuple(z.shape)
    )
    return (B, C, H, W), (B, C, H // 2, W // 2), (C,)


def _check_all(name: str, z: Tensor, shapes: dict[str, tuple[Tensor, tuple[int, ...]]]) -> None:
    for argument, (tensor, shape) in shapes.items():
        is_images = len(shape) == 4
        require_like(
            name, argument, tensor, z, shape, z.dtype if is_images else compute_dtype(z.dtype)
        )


def _new(z: Tensor, *shape: int) -> Tensor:
    """Return uninitialized statistics or vectors for images ``z``."""
    return z.new_empty(shape, dtype=compute_dtype(z.dtype))


# ---- norm_relu_pool ----


def _check(z: Tensor, weight: Tensor, bias: Tensor, eps: float) -> None:
    _, _, vector = _check_images("norm_relu_pool", z)
    _check_all("norm_relu_pool", z, {"weight": (weight, vector), "bias": (bias, vector)})


def _allocate(z: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    B, C, H, W = z.shape
    return _empty(z, B, H // 2, W // 2), _new(z, B, C), _new(z, B, C)


def _kernel(z: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    z, weight, bias = _dense(z), weight.contiguous(), bias.contiguous()
    out, mean, rstd = _allocate(z, weight, bias, eps)
    _native.call("norm_relu_pool", z, *z.shape, eps, z, weight, bias, out, mean, rstd)
    return out, mean, rstd


def _statistics(z: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    variance, mean = torch.var_mean(z, dim=(2, 3), correction=0)
    return mean, (variance + eps).rsqrt()


def _images(vector: Tensor) -> Tensor:
    """Return [C] or [B, C] shaped to broadcast over [B, C, H, W]."""
    return vector[..., None, None]


def norm_relu_pool_reference(
    z: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return :func:`norm_relu_pool` in plain torch."""
    mean, rstd = _statistics(z, eps)
    a = (z - _images(mean)) * _images(rstd) * _images(weight) + _images(bias)
    return _dense(torch.nn.functional.avg_pool2d(a.relu(), 2)), mean, rstd


_norm_relu_pool = operator(
    "norm_relu_pool(Tensor z, Tensor weight, Tensor bias, float eps) -> (Tensor, Tensor, Tensor)",
    check=_check,
    allocate=_allocate,
    kernel=_kernel,
    reference=norm_relu_pool_reference,
)


def norm_relu_pool(
    z: Tensor, weight: Tensor, bias: Tensor, eps: float = EPS
) -> tuple[Tensor, Tensor, Tensor]:
    """Return avg_pool2d(relu(instance_norm(z) * weight + bias), 2) and the norm's statistics.

    Args:
        z: [B, C, H, W] with H, W >= 2. An odd last row or column counts in the norm but is not
            pooled.
        weight: [C].
        bias: [C].
        eps: added to the variance.

    Returns:
        out [B, C, H//2, W//2], mean [B, C], rstd [B, C] = 1/sqrt(variance + eps).
    """
    return _norm_relu_pool(z, weight, bias, eps)


# ---- norm_relu_pool_backward ----


def _check_backward(
    grad_out: Tensor, z: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor, bias: Tensor
) -> None:
    name = "norm_relu_pool_backward"
    (B, C, _, _), pooled, vector = _check_images(name, z)
    _check_all(
        name,
        z,
        {"grad_out": (grad_out, pooled), "mean": (mean, (B, C)), "rstd": (rstd, (B, C))}
        | {"weight": (weight, vector), "bias": (bias, vector)},
    )


def _allocate_backward(
    grad_out: Tensor, z: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor, bias: Tensor
) -> tuple[Tensor, Tensor]:
    B, C, H, W = z.shape
    return _empty(z, B, H, W), _new(z, 2, B, C)


def _kernel_backward(
    grad_out: Tensor, z: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor, bias: Tensor
) -> tuple[Tensor, Tensor]:
    grad_out, z = _dense(grad_out), _dense(z)
    mean, rstd, weight, bias = (t.contiguous() for t in (mean, rstd, weight, bias))
    grad_z, parts = _allocate_backward(grad_out, z, mean, rstd, weight, bias)
    _native.call(
        "norm_relu_pool_backward",
        z,
        *z.shape,
        grad_out,
        z,
        mean,
        rstd,
        weight,
        bias,
        grad_z,
        parts[0],
        parts[1],
    )
    return grad_z, parts


def _upsample(pooled: Tensor, like: Tensor) -> Tensor:
    """Return the adjoint of the 2×2 average pool, zero in an odd last row or column."""
    grad = torch.zeros_like(like)
    height, width = pooled.shape[2] * 2, pooled.shape[3] * 2
    grad[:, :, :height, :width] = pooled.repeat_interleave(2, 2).repeat_interleave(2, 3) / 4
    return grad


def _plane_mean(images: Tensor) -> Tensor:
    return images.mean((2, 3), keepdim=True)


def norm_relu_pool_backward_reference(
    grad_out: Tensor, z: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor, bias: Tensor
) -> tuple[Tensor, Tensor]:
    """Return :func:`norm_relu_pool_backward` in plain torch."""
    x_hat = (z - _images(mean)) * _images(rstd)
    grad = _upsample(grad_out, z) * (x_hat * _images(weight) + _images(bias) > 0)
    centered = grad - _plane_mean(grad) - x_hat * _plane_mean(grad * x_hat)
    parts = torch.stack([(grad * x_hat).sum((2, 3)), grad.sum((2, 3))])
    return _dense(_images(rstd) * _images(weight) * centered), parts


_norm_relu_pool_backward = operator(
    "norm_relu_pool_backward(Tensor grad_out, Tensor z, Tensor mean, Tensor rstd, Tensor "
    "weight, Tensor bias) -> (Tensor, Tensor)",
    check=_check_backward,
    allocate=_allocate_backward,
    kernel=_kernel_backward,
    reference=norm_relu_pool_backward_reference,
)


def norm_relu_pool_backward(
    grad_out: Tensor,  # [B, C, H//2, W//2]
    z: Tensor,  # [B, C, H, W]
    mean: Tensor,  # [B, C]
    rstd: Tensor,  # [B, C]
    weight: Tensor,  # [C]
    bias: Tensor,  # [C]
) -> tuple[Tensor, Tensor]:
    """Return the gradients of :func:`norm_relu_pool`.

    Returns:
        grad_z: gradient with respect to z [B, C, H, W].
        parts: [2, B, C], the term of every image in the gradients with respect to weight and bias.
        The caller sums over B, straight into a flat vector in which the two are neighbors.
    """
    return _norm_relu_pool_backward(grad_out, z, mean, rstd, weight, bias)


# ---- norm_relu_pool_dual ----


# ---- norm_relu_pool_dual_backward ----
