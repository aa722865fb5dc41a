"""Read how much memory a device has, and turn an out-of-memory error into a sentence."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from pdd_fast.runtime import host_memory
from pdd_fast.runtime.devices import peak_memory
from pdd_fast.runtime.errors import RunError, UsageError


def available(device: torch.device) -> int | None:
    """Bytes that can still be allocated on a GPU; None on the CPU, where the system decides."""
    if device.type != "cuda":
        return None
    free, _ = torch.cuda.mem_get_info(device)
    # What torch has taken from the driver and not given out is ours too.
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def free(device: torch.device, reclaimable: int = 0) -> int:
    """Return the bytes that nobody uses at the moment, on the CPU too; 0 where the system does not
    say.

    Args:
        reclaimable: bytes of host memory that this process holds and can use again.
    """
    there = available(device)
    return host_memory.free() + reclaimable if there is None else there


def total(device: torch.device) -> int:
    """Bytes that ``device`` has in all, used or not: the same at every call; 0 where the system
    does not say.
    """
    return (
        torch.cuda.get_device_properties(device).total_memory
        if device.type == "cuda"
        else host_memory.total()
    )


def require(device: torch.device, size: int, what: str, lower: str) -> None:
    """Makes sure that ``device`` has ``size`` bytes left; without effect on the CPU.

    Args:
        what: what takes them: "stage 3: an iteration".
        lower: what to change: "inner_batch (now 512) or width (now 128)".

    Raises:
        UsageError: it has not.
    """
    there = available(device)
    if there is not None and size > there:
        raise UsageError(
            f"{what} would take about {format_bytes(size)} and {device} has "
            f"{format_bytes(there)}; lower {lower}"
        )


def largest_group(bytes_each: int, device: torch.device, most: int) -> int:
    """How many networks of ``bytes_each`` fit side by side, in [1, ``most``]; 1 on the CPU.

    They get half of the device's whole memory, not of what is free at the moment: the same machine
    gives the same number, and so the same bits, whatever else runs on it.
    """
    if device.type != "cuda":
        return 1
    return max(1, min(most, total(device) // 2 // max(1, bytes_each)))


@contextmanager
def explained(device: torch.device, what: str, lower: str) -> Iterator[None]:
    """Around work that may run out of memory.

    Args:
        what: what is being done: "stage 3, iteration 12".
        lower: as for :func:`require`.

    Raises:
        RunError: it did, in one sentence.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise RunError(
            f"{what}: {device} is out of memory, at {format_bytes(peak_memory(device))} taken at "
            f"the most"
            f"{_whole(device)}; lower {lower}"
        ) from error


def _whole(device: torch.device) -> str:
    if device.type != "cuda":
        return ""
    return f" of {format_bytes(total(device))}"


def is_out_of_memory(error: BaseException) -> bool:
    """Whether ``error`` says that memory could not be had, on whatever device."""
    # Of torch's allocators only that of a GPU has a class for it, and CUDA's libraries have texts
    # of their own.
    texts = "out of memory", "can't allocate memory", "DefaultCPUAllocator", "ALLOC_FAILED"
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(
        text in str(error) for text in texts
    )


def format_bytes(size: int) -> str:
    """Bytes as "91 GB", "3.2 GB" or "150 MB", in powers of 1000."""
    if size >= 1e9:
        return f"{size / 1e9:.0f} GB" if size >= 1e10 else f"{size / 1e9:.1f} GB"
    return f"{max(1, round(size / 1e6))} MB"
