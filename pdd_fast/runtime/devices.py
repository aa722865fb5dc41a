"""Choice of a device by name, number of threads, and peak memory."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from pdd_fast.runtime.errors import UsageError

try:
    import resource
except ImportError:  # not a POSIX system
    resource = None  # type: ignore[assignment]


def resolve_device(name: str) -> torch.device:
    """Return the device called ``name``.

    Args:
        name: "auto" (a GPU if torch finds one), "cpu", "cuda" or "cuda:N".

    Raises:
        UsageError: the name is not a device, or torch cannot use it here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda") or (device.type == "cpu" and device.index):
        raise UsageError(f"device must be auto, cpu, cuda or cuda:N, got {name!r}")
    if device.type == "cpu":
        return torch.device("cpu")  # without the index of "cpu:0", as tensors report it
    if not torch.cuda.is_available():
        raise UsageError(
            f"device {name!r} cannot be used: torch finds no GPU; `pdd-fast env` shows details"
        )
    count = torch.cuda.device_count()
    if (device.index or 0) >= count:
        raise UsageError(f"device must be below cuda:{count}, got {name!r}")
    return device


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Let torch and the kernels use ``count`` threads in the block; 0: no change."""
    before = torch.get_num_threads()
    if count:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        if count:
            torch.set_num_threads(before)


def peak_memory(device: torch.device) -> int:
    """Return the peak number of bytes so far; 0 if unknown.

    It counts allocations on the device for CUDA, and resident memory of this process otherwise.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if resource is None:
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
