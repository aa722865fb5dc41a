"""Memory of a device, and out-of-memory errors as one sentence."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from pdd_fast.runtime import host_memory
from pdd_fast.runtime.devices import peak_memory
from pdd_fast.runtime.errors import RunError, UsageError


def available(device: torch.device) -> int | None:
    """Return the bytes that can still be allocated on a GPU; None on the CPU.

    On the CPU, the system decides.
    """
    if device.type != "cuda":
        return None
    free, _ = torch.cuda.mem_get_info(device)
    # Memory that torch has reserved from the driver and not given out is available too, except
    # that of captured graphs: their launches use it although no tensor holds it.
    reserved, allocated = torch.cuda.memory_reserved(device), torch.cuda.memory_allocated(device)
    return free + reserved - allocated - _idle_in_graphs(device)


def _idle_in_graphs(device: torch.device) -> int:
    """Return the bytes of graphs' private memory pools that no tensor holds."""
    index = torch.cuda.current_device() if device.index is None else device.index
    try:
        segments = torch.cuda.memory_snapshot()
    except RuntimeError:  # CUDA's own allocator, if the user chose it, has no snapshot
        return 0
    return sum(
        segment["total_size"] - segment["allocated_size"]
        for segment in segments
        if segment["device"] == index and tuple(segment["segment_pool_id"]) != (0, 0)
    )


def free(device: torch.device, reclaimable: int = 0) -> int:
    """Return the bytes that are not in use at the moment; 0 if the system does not say.

    Args:
        device: the device, a CPU too.
        reclaimable: bytes of host memory that this process holds and can reuse.
    """
    there = available(device)
    return host_memory.free() + reclaimable if there is None else there


def total(device: torch.device) -> int:
    """Return all bytes of ``device``, used or not; 0 if the system does not say.

    The result is the same at every call.
    """
    return (
        torch.cuda.get_device_properties(device).total_memory
        if device.type == "cuda"
        else host_memory.total()
    )


def require(device: torch.device, size: int, what: str, lower: str) -> None:
    """Raise UsageError unless ``device`` has ``size`` bytes left; the CPU always passes.

    Args:
        device: the device.
        size: bytes needed.
        what: task that needs them, such as "stage 3: an iteration".
        lower: settings to lower, such as "inner_batch (now 512) or width (now 128)".

    Raises:
        UsageError: the device has fewer bytes left.
    """
    there = available(device)
    if there is not None and size > there:
        raise UsageError(
            f"{what} would take about {format_bytes(size)} and {device} has "
            f"{format_bytes(there)}; lower {lower}"
        )


def largest_group(bytes_each: int, device: torch.device, most: int, shared: int = 0) -> int:
    """Return how many networks of ``bytes_each`` to train in parallel; 1 on the CPU.

    They get half of the device's total memory, not of its free memory. The same machine therefore
    gives the same number, whatever else runs on it.

    Args:
        bytes_each: bytes that one network needs.
        device: the device.
        most: upper bound of the result.
        shared: bytes that the networks use in turn.
    """
    if device.type != "cuda":
        return 1
    return max(1, min(most, (total(device) // 2 - shared) // max(1, bytes_each)))


@contextmanager
def explained(device: torch.device, what: str, lower: str) -> Iterator[None]:
    """Turn an out-of-memory error inside the block into one sentence.

    Args:
        device: the device that may run out of memory.
        what: task at hand, such as "stage 3, iteration 12".
        lower: as for :func:`require`.

    Raises:
        RunError: the device ran out of memory.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise RunError(
            f"{what}: {device} is out of memory, with a peak of "
            f"{format_bytes(peak_memory(device))}{_whole(device)}; lower {lower}"
        ) from error


def _whole(device: torch.device) -> str:
    if device.type != "cuda":
        return ""
    return f" of {format_bytes(total(device))}"


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether ``error`` reports that memory was not available, on any device."""
    # Only torch's GPU allocator has a class for it, and CUDA's libraries have texts of their own.
    # cuDNN finds no engine for a convolution if none of their workspaces can be allocated.
    texts = (
        "out of memory",
        "can't allocate memory",
        "DefaultCPUAllocator",
        "ALLOC_FAILED",
        "unable to find an engine",
    )
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(
        text in str(error) for text in texts
    )


def format_bytes(size: int) -> str:
    """Return a size as "91 GB", "3.2 GB" or "150 MB", in powers of 1000."""
    if size >= 1e9:
        return f"{size / 1e9:.0f} GB" if size >= 1e10 else f"{size / 1e9:.1f} GB"
    return f"{max(1, round(size / 1e6))} MB"
