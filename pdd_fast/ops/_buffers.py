"""Memory that passes on the CPU take and give back, so that one call's serves the next."""

from __future__ import annotations

import threading
from functools import cached_property

import torch
from torch import Tensor

from pdd_fast.ops import _native


class Buffer:
    """Memory for ``size`` elements of one type. It goes back to its pool when nobody holds the
    buffer any more.
    """

    def __init__(self, pool: BufferPool, size: int, dtype: torch.dtype) -> None:
        self._pool, self._dtype, self.elements = pool, dtype, size
        self._memory = pool._taken(size * dtype.itemsize)
        self.lock = threading.Lock()  # of passes that write into it

    @cached_property
    def numbers(self) -> Tensor:
        """The elements, [size]; uninitialized at first."""
        return self._memory[: self.elements * self._dtype.itemsize].view(self._dtype)

    @property
    def address(self) -> int:
        """Of the first element; cheaper than by way of :attr:`numbers`."""
        return _native.address(self._memory, self._memory.device)

    def __del__(self) -> None:
        memory = getattr(self, "_memory", None)  # missing where the allocation failed
        if memory is not None:
            self._pool._give_back(memory)


class BufferPool:
    """Pieces of CPU memory that are handed out and come back, from and to any thread.

    Reuse pays because mapping memory anew is slow: of the 25 MB that a step of 50 images saves at
    width 128, mapping takes 25 ms, half of what the step takes.
    """

    def __init__(self) -> None:
        # Reentrant: a garbage collection inside the lock may run Buffer.__del__, which takes it
        # again.
        self._lock = threading.RLock()
        self._idle: list[Tensor] = []

    def buffer(self, size: int, dtype: torch.dtype) -> Buffer:
        """Return a buffer of ``size`` elements of ``dtype``."""
        return Buffer(self, size, dtype)

    def idle_bytes(self) -> int:
        """Return the bytes of all pieces that nobody uses at the moment."""
        with self._lock:
            return sum(memory.numel() for memory in self._idle)

    def unlock(self) -> None:
        """Make the lock anew in a child process, where the thread that may have held it does not
        exist.
        """
        self._lock = threading.RLock()

    def free(self) -> None:
        """Give the idle pieces back to the system."""
        with self._lock:
            self._idle.clear()

    def _taken(self, size: int) -> Tensor:
        """Return uint8 memory of ``size`` bytes or more: the smallest idle piece that is large
        enough, or a new one.
        """
        with (
            self._lock
        ):  # Search and removal are one step: otherwise two threads take the same piece.
            best, least = -1, 0
            for place in reversed(
                range(len(self._idle))
            ):  # The last one of a size is still in the processor's cache.
                found = self._idle[place].numel()
                if found >= size and (best < 0 or found < least):
                    best, least = place, found
            if best >= 0:
                return self._idle.pop(best)
            if self._idle:  # Pieces grow in size, not in number.
                self._idle.pop(
                    min(range(len(self._idle)), key=lambda place: self._idle[place].numel())
                )
        return _allocated(size)

    def _give_back(self, memory: Tensor) -> None:
        with self._lock:
            self._idle.append(memory)


def _allocated(size: int) -> Tensor:
    """Return ``size`` uninitialized bytes, in large pages where the system has them."""
    memory = torch.empty(size, dtype=torch.uint8, device="cpu")
    _native.loaded("cpu").advise_large_pages(_native.address(memory, memory.device), memory.nbytes)
    return memory
