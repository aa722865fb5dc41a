"""Differentiable Siamese augmentation as two operators: an affine map and its transpose.

The map of an image, or its linear part, depends on operations and parameters given as arrays.
:mod:`pdd_fast.augmentation.dsa` gives them names, ``csrc/ops/dsa/math.h`` has the formulas.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, ParamSpec

import torch
from torch import Tensor
from torch.nn import functional as F

from pdd_fast.ops import _native
from pdd_fast.ops._registry import HALF, Operator, compute_dtype, require_floating
from pdd_fast.ops._threads import threads
from pdd_fast.runtime.choices import AUGMENTATIONS
from pdd_fast.runtime.errors import require
from pdd_fast.runtime.torch_internals import plain_on_cpu

# The same order as in csrc/ops/dsa/params.h.
OPERATIONS = AUGMENTATIONS
NOTHING = -1  # code of an operation that leaves its image unchanged


class _AugParams(NamedTuple):
    """Rows of a packed [11, B] tensor, shaped to broadcast over [B, C, H, W].

    The order is that of csrc/ops/dsa/params.h.
    """

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


AUG_PARAMS = _AugParams._fields
_TYPES = (torch.float32, torch.float64, *HALF)


def _empty(images: Tensor) -> Tensor:
    """Return uninitialized memory in the format of ``images``, channels-last or planar."""
    if images.is_contiguous():
        return torch.empty_like(images, memory_format=torch.contiguous_format)
    last = images.is_contiguous(memory_format=torch.channels_last)
    return torch.empty_like(
        images, memory_format=torch.channels_last if last else torch.contiguous_format
    )


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


def _cut(images: Tensor, center_h: Tensor, center_w: Tensor, size: Sequence[int]) -> Tensor:
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


def _apply(code: int, images: Tensor, p: _AugParams, cutout: Sequence[int], linear: bool) -> Tensor:
    """Return ``images`` after one operation."""
    if code == NOTHING:
        return images
    if not 0 <= code < len(OPERATIONS):
        raise ValueError(
            f"dsa: operations must be numbers in [{NOTHING}, {len(OPERATIONS)}), got {code}"
        )
    operation = OPERATIONS[code]
    if operation == "color":
        if not linear:
            images = images + p.brightness.to(images.dtype)
        mean = images.mean(1, keepdim=True)
        images = (images - mean) * p.saturation.to(images.dtype) + mean
        mean = images.mean((1, 2, 3), keepdim=True)
        return (images - mean) * p.contrast.to(images.dtype) + mean
    if operation == "crop":
        return _shift(images, p.shift_h, p.shift_w)
    if operation == "cutout":
        return _cut(images, p.cutout_h, p.cutout_w, cutout)
    if operation == "flip":
        return torch.where(p.flip != 0, images.flip(3), images)
    if operation == "scale":
        zero = torch.zeros_like(p.scale_w)
        return _sample(images, p.scale_w, zero, zero, p.scale_h)
    cosine, sine = p.angle.cos(), p.angle.sin()
    return _sample(images, cosine, -sine, sine, cosine)


# ---- operators ----

_Arguments = ParamSpec("_Arguments")
_DTYPE_CODES = {dtype: _native.TYPES.index(dtype) for dtype in (torch.float32, torch.float64)}


class _Direct(Operator[_Arguments, Tensor]):
    """Operator that calls its kernel directly in a plain training step on the CPU.

    It goes without the dispatcher and without :func:`pdd_fast.ops._native.call`. A call on 20
    flipped images of 3×8×8 then takes 12 µs instead of 29, of which the kernel takes 3. An unroll
    of 20 steps on such images makes 60 calls and takes 27.6 ms instead of 28.9 (width 32, one
    thread, the least of 468 in turns).
    """

    def __call__(self, *arguments: _Arguments.args, **named: _Arguments.kwargs) -> Tensor:
        call: Any = self._record(*arguments, **named)
        output = self._direct(call.full())
        return self._dispatched(*call) if output is None else output

    def _direct(self, call: _Dsa) -> Tensor | None:
        """Return the kernel's result; None in every unusual case, which the dispatcher handles."""
        images, aug_params, operations, cutout, linear = call
        library, code = _native.load("cpu"), _DTYPE_CODES.get(images.dtype)
        if library is None or code is None or not plain_on_cpu(images):
            return None
        call.check(self.name)
        if not (aug_params.is_contiguous() and operations.is_contiguous()) or aug_params.is_neg():
            return None
        output = call.allocate()
        status = getattr(library, self.name)(
            code,
            0,
            threads(),
            images.shape,
            *cutout,
            operations.shape[0],
            operations.data_ptr(),
            linear,
            aug_params.data_ptr(),
            images.data_ptr(),
            images.stride(),
            output.data_ptr(),
            output.stride(),
            0,
            0,
        )
        return output if status == 0 else None


class _Dsa(NamedTuple):
    images: Tensor  # [B, C, H, W], float32, float64, bfloat16 or float16, any strides
    aug_params: Tensor  # float64 [11, B], rows as in AUG_PARAMS
    # int32 [k, B], indices into OPERATIONS in order, or NOTHING. On CUDA only the kernel reads
    # them: an image with another value becomes NaN.
    operations: Tensor
    cutout: Sequence[int]  # height and width of the rectangle that cutout blanks, pixels
    linear: bool = False  # leave out the constant that brightness adds

    def full(self) -> _Dsa:
        return self

    def check(self, name: str) -> None:
        # Conditions come first, and messages are built only if one fails: 2 µs per call instead of
        # 10.
        images, aug_params, operations, cutout, _ = self
        shape, device = images.shape, images.device
        if images.dtype not in _TYPES:
            require_floating(name, "images", images, half=True)
        if len(shape) != 4 or images.numel() == 0:
            require(name, False, "images", "have shape [B, C, H, W] and not be empty", tuple(shape))
        if shape[1] * shape[2] * shape[3] >= 2**31:
            require(name, False, "images", "have fewer than 2**31 elements each", tuple(shape))
        if aug_params.dtype != torch.float64:
            raise TypeError(f"{name}: aug_params must be torch.float64, got {aug_params.dtype}")
        if aug_params.device != device:
            require(name, False, "aug_params", f"be on {device}", aug_params.device)
        expected = len(AUG_PARAMS), shape[0]
        if aug_params.shape != expected:
            found = tuple(aug_params.shape)
            require(name, False, "aug_params", f"have shape {expected}", found)
        if operations.dtype != torch.int32:
            raise TypeError(f"{name}: operations must be torch.int32, got {operations.dtype}")
        if operations.device != device:
            require(name, False, "operations", f"be on {device}", operations.device)
        if operations.dim() != 2 or operations.shape[1] != shape[0]:
            found = tuple(operations.shape)
            require(name, False, "operations", f"have shape (k, {shape[0]})", found)
        if len(cutout) != 2 or min(cutout) < 0:
            require(name, False, "cutout", "be a height and a width", tuple(cutout))

    def allocate(self) -> Tensor:
        return _empty(self.images)

    def kernel(self, name: str) -> Tensor:
        images, aug_params, operations, cutout, linear = self
        output, dtype = self.allocate(), compute_dtype(images.dtype)
        count = _native.scratch_images(images, dtype.itemsize)
        scratch = images.new_empty((count, 2, images[0].numel()), dtype=dtype) if count else None
        _native.call(
            name,
            images,
            images.shape,
            *cutout,
            len(operations),
            operations.contiguous(),
            linear,
            aug_params.contiguous(),
            images,
            images.stride(),
            output,
            output.stride(),
            scratch,
            count,
        )
        return output

    def reference(self) -> Tensor:
        images, aug_params, operations, cutout, linear = self
        parts = []
        # Images with the same operations are processed together.
        for codes in operations.unique(dim=1).t().tolist():
            rows = (operations == operations.new_tensor(codes)[:, None]).all(0).nonzero().flatten()
            part = images.index_select(0, rows)
            p = _AugParams(*(row.view(-1, 1, 1, 1) for row in aug_params.index_select(1, rows)))
            for code in codes:
                part = _apply(code, part, p, cutout, linear)
            parts.append((rows, part))
        order = torch.cat([rows for rows, _ in parts]).argsort()
        result = torch.cat([part for _, part in parts]).index_select(0, order)
        return _empty(images).copy_(result) if not result.requires_grad else result


dsa = _Direct("dsa", _Dsa)
"""Return the images after their operations, each image with its own parameters.

The reference is differentiable in the images. The result has the memory format of the images.
"""


class _DsaAdjoint(NamedTuple):
    grad: Tensor  # as images of dsa
    aug_params: Tensor  # as for dsa
    operations: Tensor  # as for dsa
    cutout: Sequence[int]  # as for dsa

    def full(self) -> _Dsa:
        return _Dsa(*self, linear=True)

    def check(self, name: str) -> None:
        self.full().check(name)

    def allocate(self) -> Tensor:
        return _empty(self.grad)

    def kernel(self, name: str) -> Tensor:
        return self.full().kernel(name)

    def reference(self) -> Tensor:
        # By autograd through the reference of dsa.
        with torch.enable_grad():
            images = torch.zeros_like(self.grad, requires_grad=True)
            out = _Dsa(images, *self[1:], linear=True).reference()
            (result,) = torch.autograd.grad(out, images, self.grad)
        return _empty(self.grad).copy_(result)


dsa_adjoint = _Direct("dsa_adjoint", _DsaAdjoint)
"""Return Aᵀ grad, with A the linear part of :data:`dsa`, in the memory format of grad."""
