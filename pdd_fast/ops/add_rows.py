"""Add rows at indices, with the same bits every time.

The operator is the transpose of gathering a batch from a set of images.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pdd_fast.ops import _native
from pdd_fast.ops._registry import operator, require_floating, require_like
from pdd_fast.runtime.errors import require


def _check(target: Tensor, index: Tensor, rows: Tensor) -> None:
    name = "add_rows"
    require_floating(name, "target", target)
    require(
        name,
        target.dim() >= 1 and target.numel() > 0,
        "target",
        "have rows and not be empty",
        tuple(target.shape),
    )
    if index.dtype != torch.int64:
        raise TypeError(f"{name}: index must be torch.int64, got {index.dtype}")
    require(name, index.dim() == 1, "index", "be a vector", tuple(index.shape))
    require(name, index.device == target.device, "index", f"be on {target.device}", index.device)
    require_like(name, "rows", rows, target, (len(index), *target.shape[1:]))


def _kernel(target: Tensor, index: Tensor, rows: Tensor) -> Tensor:
    target, index, rows = target.contiguous(), index.contiguous(), rows.contiguous()
    out = torch.empty_like(target)
    _native.call(
        "add_rows", target, len(target), len(index), target[0].numel(), target, index, rows, out
    )
    return out


def add_rows_reference(target: Tensor, index: Tensor, rows: Tensor) -> Tensor:
    """Return :func:`add_rows` in plain torch; on CUDA, the order of additions is undefined."""
    return target.index_add(0, index, rows).contiguous()


_add_rows = operator(
    "add_rows(Tensor target, Tensor index, Tensor rows) -> Tensor",
    check=_check,
    allocate=lambda target, index, rows: torch.empty_like(
        target, memory_format=torch.contiguous_format
    ),
    kernel=_kernel,
    reference=add_rows_reference,
)


def add_rows(target: Tensor, index: Tensor, rows: Tensor) -> Tensor:
    """Return a new tensor: ``target`` with ``rows[r]`` added at ``index[r]``, in the order of r.

    Args:
        target: [n, ...], float32 or float64.
        index: int64 [b] in [0, n); an index may occur more than once.
        rows: [b, ...], with the type of ``target``.

    Raises:
        ValueError, TypeError: a shape, type or device does not fit, or an index is out of range. On
            CUDA, a row with such an index is ignored instead.
    """
    return _add_rows(target, index, rows)
