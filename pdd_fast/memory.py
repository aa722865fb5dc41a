"""What an iteration and a training step take in bytes, from shapes alone; what a device has; and sentences where it is
too little.

What a pass takes is known by its engine (:meth:`pdd_fast.engines.Engine.working_bytes`); here is what lies around it. P
is the number of parameters, x = b · channels · H · W that of b images. tests/test_memory.py holds the sums to what a
process takes, within a quarter.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from pdd_fast import host
from pdd_fast.devices import peak_memory
from pdd_fast.engines import Engine, PassShape
from pdd_fast.errors import RunError, UsageError
from pdd_fast.networks.parameters import parameter_count
from pdd_fast.ops import convnet


def matching_bytes(engine: Engine, shape: PassShape, *, steps: int, kept: int, learned: int, frozen: int = 0) -> int:
    """Peak of one iteration of trajectory matching (:class:`pdd_fast.matching.step.MatchingStep`).

    What the kept steps keep and what a dual pass works in, with a batch before it; (N + 1)P for the path and 6P beside
    it; the union's images, two gradients, and six times the learned images for the state. On a GPU frozen images have
    a gradient too.

    Args:
        shape: of a batch of an inner step.
        steps: N.
        kept: how many of them keep their activations.
        learned, frozen: images of the union.
    """
    # Where some steps are kept and some are not, the last kept one or the first that is made again is the peak.
    passes = kept * engine.kept_bytes(shape) + engine.working_bytes(shape, dual=True, kept=True) if kept else 0
    if kept < steps:
        passes = max(passes, engine.working_bytes(shape, dual=True))
    moved = frozen + learned if shape.device.type == "cuda" else learned
    images = shape.batch + frozen + learned + 2 * moved + 6 * learned
    numbers = (steps + 7) * parameter_count(engine.net) + images * math.prod(shape.image)
    return passes + shape.dtype.itemsize * numbers


def training_bytes(engine: Engine, shape: PassShape, networks: int = 1) -> int:
    """Peak of one training step of ``networks`` networks, each on a batch of its own.

    The gradient's pass, and for each network its batch and 5P: parameters, momentum, gradient and two beside them. The
    data set is not counted.
    """
    each = shape.batch * math.prod(shape.image) + 5 * parameter_count(engine.net)
    return engine.working_bytes(shape, networks=networks) + networks * shape.dtype.itemsize * each


def available(device: torch.device) -> int | None:
    """Bytes that can still be allocated on a GPU; None on the CPU, where the system decides."""
    if device.type != "cuda":
        return None
    free, _ = torch.cuda.mem_get_info(device)
    # What torch has taken from the driver and not given out is ours too.
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def free(device: torch.device) -> int:
    """Bytes that nobody uses at the moment, on the CPU too; 0 where the system does not say."""
    there = available(device)
    return host.free() + convnet.idle_bytes() if there is None else there


def total(device: torch.device) -> int:
    """Bytes that ``device`` has in all, used or not: the same at every call; 0 where the system does not say."""
    return torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else host.total()


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
        raise UsageError(f"{what} would take about {in_words(size)} and {device} has {in_words(there)}; lower {lower}")


def largest_group(bytes_each: int, device: torch.device, most: int) -> int:
    """How many networks of ``bytes_each`` fit side by side, in [1, ``most``]; 1 on the CPU.

    They get half of the device's whole memory, not of what is free at the moment: the same machine gives the same
    number, and so the same bits, whatever else runs on it.
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
            f"{what}: {device} is out of memory, at {in_words(peak_memory(device))} taken at the most{_whole(device)}; "
            f"lower {lower}"
        ) from error


def _whole(device: torch.device) -> str:
    if device.type != "cuda":
        return ""
    return f" of {in_words(total(device))}"


def is_out_of_memory(error: BaseException) -> bool:
    """Whether ``error`` says that memory could not be had, on whatever device."""
    # Of torch's allocators only that of a GPU has a class for it, and CUDA's libraries have texts of their own.
    texts = "out of memory", "can't allocate memory", "DefaultCPUAllocator", "ALLOC_FAILED"
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(text in str(error) for text in texts)


def in_words(size: int) -> str:
    """Bytes as "91 GB", "3.2 GB" or "150 MB", in powers of 1000."""
    if size >= 1e9:
        return f"{size / 1e9:.0f} GB" if size >= 1e10 else f"{size / 1e9:.1f} GB"
    return f"{max(1, round(size / 1e6))} MB"
