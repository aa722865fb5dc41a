"""The ConvNet's 3×3 convolution and its two adjoints."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from pdd_fast.ops._registry import HALF, computed_in_32_bits


def operand(w: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a weight [C_out, C_in, 3, 3] as the convolutions of a pass take it.

    For channels-last images, cuDNN needs channels-last weights. torch would convert them at every
    call, and a dual pass makes five calls per layer. oneDNN uses an order of its own.

    Args:
        w: the weight.
        dtype: type that images are stored in.
    """
    if w.device.type == "cuda":
        return w.to(dtype, memory_format=torch.channels_last)
    return w.to(dtype)


def _run(function: Callable[..., Tensor], images: Tensor, *others: Tensor) -> Tensor:
    # The same arithmetic as cuDNN's: products of 16-bit operands are summed in float32 and rounded
    # once at the end. oneDNN's own bfloat16 convolutions took 10 to 30 times as long on a processor
    # without bfloat16 instructions.
    if images.dtype in HALF and images.device.type == "cpu":
        return computed_in_32_bits(function, images, *others)
    return function(images, *others)


def _forward(x: Tensor, w: Tensor) -> Tensor:
    return F.conv2d(x, w, padding=1)


def _backward(grad: Tensor, x: Tensor, w: Tensor, wanted: int) -> Tensor:
    mask = [wanted == 0, wanted == 1, False]
    return torch.ops.aten.convolution_backward(
        grad, x, w, None, [1, 1], [1, 1], [1, 1], False, [0, 0], 1, mask
    )[wanted]


def _input_grad(grad: Tensor, x: Tensor, w: Tensor) -> Tensor:
    return _backward(grad, x, w, 0)


def _weight_grad(grad: Tensor, x: Tensor, w: Tensor) -> Tensor:
    return _backward(grad, x, w, 1)


def conv(x: Tensor, w: Tensor) -> Tensor:
    """Return the convolution [B, C_out, H, W] of x by w.

    Args:
        x: [B, C_in, H, W].
        w: [C_out, C_in, 3, 3].
    """
    return _run(_forward, x, w)


def conv_input_grad(grad: Tensor, w: Tensor, like: Tensor) -> Tensor:
    """Return the adjoint of :func:`conv` in its input.

    Args:
        grad: [B, C_out, H, W].
        w: [C_out, C_in, 3, 3].
        like: [B, C_in, H, W], gives the result's shape and layout.
    """
    return _run(_input_grad, grad, like, w)


def conv_weight_grad(grad: Tensor, x: Tensor, w: Tensor) -> Tensor:
    """Return the adjoint of :func:`conv` in its weight.

    Args:
        grad: [B, C_out, H, W].
        x: [B, C_in, H, W].
        w: gives the result's shape.
    """
    return _run(_weight_grad, grad, x, w)
