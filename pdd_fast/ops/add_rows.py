"""Add rows at indices, with the same bits every time.

The operator is the transpose of gathering a batch from a set of images.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from pdd_fast.ops import _native
from pdd_fast.ops._registry import Operator, require_floating, require_like
from pdd_fast.runtime.errors import require


class _AddRows(NamedTuple):
    target: Tensor  # [n, ...], float32 or float64
    # int64 [b] in [0, n); an index may occur more than once. The name hides tuple.index, which
    # nothing calls.
    index: Tensor  # type: ignore[assignment]
    rows: Tensor  # [b, ...], with the type of target

    def check(self, name: str) -> None:
        target, index, rows = self
        require_floating(name, "target", target)
        require(
            name,
            target.dim() >= 1 and target.numel() > 0,
            "target",
            "have rows and not be empty",
            tuple(target.shape),
        )
        require(name, index.dim() == 1, "index", "be a vector", tuple(index.shape))
        require_like(name, "index", index, target, tuple(index.shape), torch.int64)
        require_like(name, "rows", rows, target, (len(index), *target.shape[1:]))

    def allocate(self) -> Tensor:
        return torch.empty_like(self.target, memory_format=torch.contiguous_format)

    def kernel(self, name: str) -> Tensor:
        target, index, rows = self.target.contiguous(), self.index.contiguous(), self.rows
        sizes = len(target), len(index), target[0].numel()
        out = self.allocate()
        _native.call(name, target, *sizes, target, index, rows.contiguous(), out)
        return out

    def reference(self) -> Tensor:
        # On CUDA, the order of additions is undefined.
        return self.target.index_add(0, self.index, self.rows).contiguous()


add_rows = Operator("add_rows", _AddRows)
"""Return a new tensor: ``target`` with ``rows[r]`` added at ``index[r]``, in the order of r.

Raises:
    ValueError, TypeError: a shape, type or device does not fit, or an index is out of range. On
        CUDA, a row with such an index is ignored instead.
"""
