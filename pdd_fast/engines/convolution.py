"""The ConvNet's 3×3 convolution and its two adjoints, for one network or for several side by side
(``groups``).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from pdd_fast.ops._registry import HALF, computed_in_32_bits


def operand(w: Tensor, dtype: torch.dtype) -> Tensor:
    """A weight [C_out, C_in, 3, 3] as the convolutions of a pass take it, ``dtype`` being what
    images are stored in.

    With channels-last images cuDNN wants its weights channels-last too; torch would convert them at
    every call, of which a dual pass makes five for one layer. oneDNN brings its own order.
    """
    if w.device.type == "cuda":
        return w.to(dtype, memory_format=torch.channels_last)
    return w.to(dtype)


def _run(function: Callable[..., Tensor], images: Tensor, *others: Tensor, groups: int) -> Tensor:
    # What cuDNN does: products of 16-bit operands summed in float32, one rounding at the end.
    # oneDNN's own bfloat16 convolutions took ten to thirty times as long where the processor has no
    # instructions for them.
    if images.dtype in HALF and images.device.type == "cpu":
        return computed_in_32_bits(function, images, *others, groups)
    return function(images, *others, groups)


def _forward(x: Tensor, w: Tensor, groups: int) -> Tensor:
    return F.conv2d(x, w, padding=1, groups=groups)


def _backward(grad: Tensor, x: Tensor, w: Tensor, groups: int, wanted: int) -> Tensor:
    mask = [wanted == 0, wanted == 1, False]
    return torch.ops.aten.convolution_backward(
        grad, x, w, None, [1, 1], [1, 1], [1, 1], False, [0, 0], groups, mask
    )[wanted]


def _input_grad(grad: Tensor, x: Tensor, w: Tensor, groups: int) -> Tensor:
    return _backward(grad, x, w, groups, 0)


def _weight_grad(grad: Tensor, x: Tensor, w: Tensor, groups: int) -> Tensor:
    return _backward(grad, x, w, groups, 1)


def conv(x: Tensor, w: Tensor, groups: int = 1) -> Tensor:
    """[B, groups·C_in, H, W] by w [groups·C_out, C_in, 3, 3]: [B, groups·C_out, H, W]."""
    return _run(_forward, x, w, groups=groups)


def conv_input_grad(grad: Tensor, w: Tensor, like: Tensor, groups: int = 1) -> Tensor:
    """Adjoint of :func:`conv` in its input; ``like`` [B, groups·C_in, H, W] gives the result's
    shape and layout.
    """
    return _run(_input_grad, grad, like, w, groups=groups)


def conv_weight_grad(grad: Tensor, x: Tensor, w: Tensor, groups: int = 1) -> Tensor:
    """Adjoint of :func:`conv` in its weight; ``w`` gives the result's shape."""
    return _run(_weight_grad, grad, x, w, groups=groups)
