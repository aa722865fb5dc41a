"""Differentiable Siamese augmentation as two operators: an affine map and its transpose.

The map of an image, or its linear part, depends on operations and parameters given as arrays.
:mod:`pdd_fast.augmentation.dsa` gives them names, ``csrc/ops/dsa/math.h`` has the formulas.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from pdd_fast.ops import _native
from pdd_fast.ops._registry import HALF, compute_dtype, operator, require_floating
from pdd_fast.ops._threads import threads
from pdd_fast.runtime.choices import AUGMENTATIONS
from pdd_fast.runtime.errors import require

# The same order as in csrc/ops/dsa/params.h.
OPERATIONS = AUGMENTATIONS
DRAWS = (
    "brightness",
    "saturation",
    "contrast",
    "shift_h",
    "shift_w",
    "cutout_h",
    "cutout_w",
    "flip",
    "scale_h",
    "scale_w",
    "angle",
)
NOTHING = -1  # code of an operation that leaves its image unchanged


class Draws(NamedTuple):
    """Rows of a packed [11, B] tensor, shaped to broadcast over [B, C, H, W]."""

    brightness: Tensor
    saturation: Tensor
    contrast: Tensor
    shift_h: Tensor
    shift_w: Tensor
    cutout_h: Tensor
    cutout_w: Tensor
    flip: Tensor
    scale_h: Tensor
    scale_w: Tensor
    angle: Tensor


_TYPES = (torch.float32, torch.float64, *HALF)


def _check(name: str, images: Tensor, draws: Tensor, operations: Tensor, cutout: list[int]) -> None:
    # Conditions come first, and messages are built only if one fails: 2 µs per call instead of 10.
    shape, device = images.shape, images.device
    if images.dtype not in _TYPES:
        require_floating(name, "images", images, half=True)
    if len(shape) != 4 or images.numel() == 0:
        require(name, False, "images", "have shape [B, C, H, W] and not be empty", tuple(shape))
    if shape[1] * shape[2] * shape[3] >= 2**31:
        require(name, False, "images", "have fewer than 2**31 elements each", tuple(shape))
    if draws.dtype != torch.float64:
        raise TypeError(f"{name}: draws must be torch.float64, got {draws.dtype}")
    if draws.device != device:
        require(name, False, "draws", f"be on {device}", draws.device)
    if draws.shape != (len(DRAWS), shape[0]):
        require(name, False, "draws", f"have shape {(len(DRAWS), shape[0])}", tuple(draws.shape))
    if operations.dtype != torch.int32:
        raise TypeError(f"{name}: operations must be torch.int32, got {operations.dtype}")
    if operations.device != device:
        require(name, False, "operations", f"be on {device}", operations.device)
    if operations.dim() != 2 or operations.shape[1] != shape[0]:
        require(name, False, "operations", f"have shape (k, {shape[0]})", tuple(operations.shape))
    if len(cutout) != 2 or min(cutout) < 0:
        require(name, False, "cutout", "be a height and a width", cutout)


def _empty(images: Tensor) -> Tensor:
    """Return uninitialized memory in the format of ``images``, channels-last or planar."""
    if images.is_contiguous():
        return torch.empty_like(images, memory_format=torch.contiguous_format)
    last = images.is_contiguous(memory_format=torch.channels_last)
    return torch.empty_like(
        images, memory_format=torch.channels_last if last else torch.contiguous_format
    )


def _launch(
    name: str, images: Tensor, draws: Tensor, operations: Tensor, cutout: list[int], linear: bool
) -> Tensor:
    draws, operations, output = draws.contiguous(), operations.contiguous(), _empty(images)
    number = compute_dtype(images.dtype)
    count = _native.scratch_images(images, number.itemsize)
    scratch = images.new_empty((count, 2, images[0].numel()), dtype=number) if count else None
    _native.call(
        name,
        images,
        images.shape,
        *cutout,
        len(operations),
        operations,
        linear,
        draws,
        images,
        images.stride(),
        output,
        output.stride(),
        scratch,
        count,
    )
    return output


# ---- reference ----


def _shift(images: Tensor, u: Tensor, v: Tensor) -> Tensor:
    """Return out[b, :, i, j] = images[b, :, i + u_b, j + v_b], zero outside."""
    B, _, H, W = images.shape
    rows = torch.arange(H, device=images.device) + u.view(B, 1).long()
    columns = torch.arange(W, device=images.device) + v.view(B, 1).long()
    inside = ((rows >= 0) & (rows < H))[:, :, None] & ((columns >= 0) & (columns < W))[:, None, :]
    batch = torch.arange(B, device=images.device)[:, None, None]
    picked = images.permute(0, 2, 3, 1)[
        batch, rows.clamp(0, H - 1)[:, :, None], columns.clamp(0, W - 1)[:, None, :]
    ]
    return picked.permute(0, 3, 1, 2) * inside[:, None]


def _cut(images: Tensor, center_h: Tensor, center_w: Tensor, size: list[int]) -> Tensor:
    _, _, H, W = images.shape
    rows = torch.arange(H, device=images.device)[:, None] - (center_h - size[0] // 2)
    columns = torch.arange(W, device=images.device)[None, :] - (center_w - size[1] // 2)
    blank = (rows >= 0) & (rows < size[0]) & (columns >= 0) & (columns < size[1])
    return images.masked_fill(blank, 0)


def _sample(images: Tensor, xx: Tensor, xy: Tensor, yx: Tensor, yy: Tensor) -> Tensor:
    zero = torch.zeros_like(xx)
    matrix = torch.stack(
        [torch.stack([xx, xy, zero], -1), torch.stack([yx, yy, zero], -1)], -2
    ).reshape(-1, 2, 3)
    grid = F.affine_grid(matrix, list(images.shape), align_corners=True)
    sampled = F.grid_sample(
        images.double(), grid, mode="bilinear", padding_mode="zeros", align_corners=True
    )
    return sampled.to(images.dtype)


def _apply(number: int, images: Tensor, d: Draws, cutout: list[int], linear: bool) -> Tensor:
    """Return ``images`` after one operation."""
    if number == NOTHING:
        return images
    if not 0 <= number < len(OPERATIONS):
        raise ValueError(
            f"dsa: operations must be numbers in [{NOTHING}, {len(OPERATIONS)}), got {number}"
        )
    operation = OPERATIONS[number]
    if operation == "color":
        if not linear:
            images = images + d.brightness.to(images.dtype)
        mean = images.mean(1, keepdim=True)
        images = (images - mean) * d.saturation.to(images.dtype) + mean
        mean = images.mean((1, 2, 3), keepdim=True)
        return (images - mean) * d.contrast.to(images.dtype) + mean
    if operation == "crop":
        return _shift(images, d.shift_h, d.shift_w)
    if operation == "cutout":
        return _cut(images, d.cutout_h, d.cutout_w, cutout)
    if operation == "flip":
        return torch.where(d.flip != 0, images.flip(3), images)
    if operation == "scale":
        zero = torch.zeros_like(d.scale_w)
        return _sample(images, d.scale_w, zero, zero, d.scale_h)
    cosine, sine = d.angle.cos(), d.angle.sin()
    return _sample(images, cosine, -sine, sine, cosine)


def dsa_reference(
    images: Tensor, draws: Tensor, operations: Tensor, cutout: list[int], linear: bool
) -> Tensor:
    """Return :func:`dsa` in plain torch, differentiable in ``images``."""
    like, parts = images, []
    # Images with the same operations are processed together.
    for numbers in operations.unique(dim=1).t().tolist():
        rows = (operations == operations.new_tensor(numbers)[:, None]).all(0).nonzero().flatten()
        part = images.index_select(0, rows)
        d = Draws(*(row.view(-1, 1, 1, 1) for row in draws.index_select(1, rows)))
        for number in numbers:
            part = _apply(number, part, d, cutout, linear)
        parts.append((rows, part))
    order = torch.cat([rows for rows, _ in parts]).argsort()
    images = torch.cat([part for _, part in parts]).index_select(0, order)
    return _empty(like).copy_(images) if not images.requires_grad else images


def dsa_adjoint_reference(
    grad: Tensor, draws: Tensor, operations: Tensor, cutout: list[int]
) -> Tensor:
    """Return :func:`dsa_adjoint` in plain torch, by autograd through :func:`dsa_reference`."""
    with torch.enable_grad():
        images = torch.zeros_like(grad, requires_grad=True)
        out = dsa_reference(images, draws, operations, cutout, True)
        (result,) = torch.autograd.grad(out, images, grad)
    return _empty(grad).copy_(result)


# ---- operators ----

_dsa = operator(
    "dsa(Tensor images, Tensor draws, Tensor operations, int[] cutout, bool linear) -> Tensor",
    check=lambda images, draws, operations, cutout, linear: _check(
        "dsa", images, draws, operations, cutout
    ),
    allocate=lambda images, draws, operations, cutout, linear: _empty(images),
    kernel=lambda images, draws, operations, cutout, linear: _launch(
        "dsa", images, draws, operations, cutout, linear
    ),
    reference=dsa_reference,
)

_dsa_adjoint = operator(
    "dsa_adjoint(Tensor grad, Tensor draws, Tensor operations, int[] cutout) -> Tensor",
    check=lambda grad, draws, operations, cutout: _check(
        "dsa_adjoint", grad, draws, operations, cutout
    ),
    allocate=lambda grad, draws, operations, cutout: _empty(grad),
    kernel=lambda grad, draws, operations, cutout: _launch(
        "dsa_adjoint", grad, draws, operations, cutout, True
    ),
    reference=dsa_adjoint_reference,
)


def _keys(*names: str) -> int:
    keys = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, names[0]))
    for name in names[1:]:
        keys = keys | torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, name))
    return keys.raw_repr()


# Dispatch keys of a plain CPU tensor.
_PLAIN = _keys("CPU", "ADInplaceOrView", "AutogradCPU", "AutocastCPU")
_NUMBERS = {dtype: _native.TYPES.index(dtype) for dtype in (torch.float32, torch.float64)}


def _straight(
    name: str,
    images: Tensor,
    draws: Tensor,
    operations: Tensor,
    cutout: Sequence[int],
    linear: bool,
) -> Tensor | None:
    """Return the kernel's result without the dispatcher, for a plain training step on the CPU.

    A call takes 8 µs instead of 20, and both two to three times as long if other code runs between
    calls. The kernel takes 5 µs for 20 flipped images of 3×32×32.

    Returns:
        The result; None in every unusual case (a mode, a transform, a trace, a gradient, a wrong
        argument), which the dispatched operator handles.
    """
    if torch.compiler.is_compiling():
        return None
    library, number = _native.load("cpu"), _NUMBERS.get(images.dtype)
    shape, count = images.shape, operations.shape
    if (
        library is None
        or number is None
        or torch._C._dispatch_keys(images).raw_repr() != _PLAIN
        or torch._C._len_torch_dispatch_stack()
        or torch._C._functorch.get_dynamic_layer_stack_depth()
        or (images.requires_grad and torch.is_grad_enabled())
        or len(shape) != 4
        or not 0 < images.numel() < 2**31
        or draws.shape != (len(DRAWS), shape[0])
        or len(count) != 2
        or count[1] != shape[0]
        or draws.dtype != torch.float64
        or operations.dtype != torch.int32
        or not (draws.is_cpu and draws.is_contiguous() and not draws.is_neg())
        or not (operations.is_cpu and operations.is_contiguous())
        or len(cutout) != 2
        or min(cutout) < 0
    ):
        return None
    output = torch.empty_like(images) if images.is_contiguous() else _empty(images)
    status = getattr(library, name)(
        number,
        0,
        threads(),
        shape,
        *cutout,
        count[0],
        operations.data_ptr(),
        linear,
        draws.data_ptr(),
        images.data_ptr(),
        images.stride(),
        output.data_ptr(),
        output.stride(),
        0,
        0,
    )
    return output if status == 0 else None


def dsa(
    images: Tensor, draws: Tensor, operations: Tensor, cutout: Sequence[int], linear: bool = False
) -> Tensor:
    """Return ``images`` after ``operations``, each image with its own parameters.

    Args:
        images: [B, C, H, W], float32, float64, bfloat16 or float16, any strides.
        draws: float64 [11, B], rows as in :data:`DRAWS`.
        operations: int32 [k, B], indices into :data:`OPERATIONS` in order, or :data:`NOTHING`. On
            CUDA only the kernel reads them: an image with another value becomes NaN.
        cutout: height and width of the rectangle that cutout blanks, pixels.
        linear: leave out the constant that brightness adds.

    Returns:
        [B, C, H, W] in the memory format of ``images``.
    """
    output = _straight("dsa", images, draws, operations, cutout, linear)
    return _dsa(images, draws, operations, list(cutout), linear) if output is None else output


def dsa_adjoint(grad: Tensor, draws: Tensor, operations: Tensor, cutout: Sequence[int]) -> Tensor:
    """Return Aᵀ ``grad``, with A the linear part of :func:`dsa`.

    Args:
        grad: [B, C, H, W], as ``images`` of :func:`dsa`.
        draws: as for :func:`dsa`.
        operations: as for :func:`dsa`.
        cutout: as for :func:`dsa`.

    Returns:
        [B, C, H, W] in the memory format of ``grad``.
    """
    output = _straight("dsa_adjoint", grad, draws, operations, cutout, True)
    return _dsa_adjoint(grad, draws, operations, list(cutout)) if output is None else output
