"""A stand-in for CUDA graphs on the CPU: operators are recorded with their tensors and run again on
the same memory.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# Calls that make the host wait for a GPU or read the host's memory; none can be captured.
UNCAPTURABLE = (
    "_local_scalar_dense",
    "nonzero",
    "masked_select",
    "unique",
    "equal.default",
    "is_nonzero",
    "lift_fresh",
)


class _Record(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...], dict[str, Any], Any]] = []

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        name = str(function)
        if any(part in name for part in UNCAPTURABLE):
            raise RuntimeError(f"{name} cannot be captured\nand some advice")
        out = function(*args, **(kwargs or {}))
        self.calls.append((function, args, kwargs or {}, out))
        return out


class Recording:
    """Recorded calls. Temporaries are kept, as the memory of a graph is."""

    def __init__(self, calls: list[Any]) -> None:
        self._calls = calls

    @torch.no_grad()
    def replay(self) -> None:
        for function, args, kwargs, out in self._calls:
            returns = function._schema.returns
            if (
                all(r.alias_info is not None and not r.alias_info.is_write for r in returns)
                and returns
            ):
                continue  # a view: of the same memory as before
            again = function(*args, **kwargs)
            if any(r.alias_info is not None for r in returns):
                continue  # written where it was told to
            for old, new in zip(tree_leaves(out), tree_leaves(again), strict=True):
                if isinstance(old, torch.Tensor):
                    assert old.shape == new.shape, function
                    old.copy_(new)


class Recorder:
    """A backend for :class:`pdd_fast.training.cuda_graphs.Replay` that counts what it is asked for.

    A capture runs the function as well, which is without effect for functions whose outputs are not
    among their inputs.
    """

    def __init__(self) -> None:
        self.asked: list[str] = []

    def warm_up(self, function: Callable[[], None]) -> None:
        self.asked.append("warm up")
        function()

    def capture(self, function: Callable[[], None]) -> Recording:
        self.asked.append("capture")
        with _Record() as record:
            function()
        return Recording(record.calls)
