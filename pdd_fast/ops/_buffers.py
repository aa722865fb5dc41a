"""Reusable CPU memory of the passes: memory that one call releases serves the next."""

from __future__ import annotations

import threading
from functools import cached_property

import torch
from torch import Tensor

from pdd_fast.ops import _native


class Buffer:
    """Memory for ``size`` elements of one type, which returns to its pool when released.

    Args:
        pool: pool that the memory comes from and returns to.
        size: number of elements.
        dtype: type of the elements.
    """

    def __init__(self, pool: BufferPool, size: int, dtype: torch.dtype) -> None:
        self._pool, self._dtype, self.elements = pool, dtype, size
        self._memory = pool._taken(size * dtype.itemsize)
        self.lock = threading.Lock()  # held by a pass that writes into the memory

    @cached_property
    def tensor(self) -> Tensor:
        """Elements [size], uninitialized at first."""
        return self._memory[: self.elements * self._dtype.itemsize].view(self._dtype)

    @property
    def address(self) -> int:
        """Address of the first element, without the view that :attr:`tensor` makes."""
        return _native.address(self._memory, self._memory.device)

    def __del__(self) -> None:
        memory = getattr(self, "_memory", None)  # missing if the allocation failed
        if memory is not None:
            self._pool._give_back(memory)


class BufferPool:
    """Pool of CPU memory, safe to use from any thread.

    Reuse pays because mapping memory is slow. A step on 50 images at width 128 saves 25 MB, and
    mapping them takes 25 ms, half of the step's time.
    """

    def __init__(self) -> None:
        # Reentrant, because a garbage collection while the lock is held may run Buffer.__del__,
        # which takes it again.
        self._lock = threading.RLock()
        self._idle: list[Tensor] = []

    def buffer(self, size: int, dtype: torch.dtype) -> Buffer:
        """Return a buffer of ``size`` elements of ``dtype``."""
        return Buffer(self, size, dtype)

    def idle_bytes(self) -> int:
        """Return the bytes of all pieces that are not in use."""
        with self._lock:
            return sum(memory.numel() for memory in self._idle)

    def unlock(self) -> None:
        """Replace the lock in a forked child, which lacks the thread that may hold it."""
        self._lock = threading.RLock()

    def free(self) -> None:
        """Return the idle pieces to the system."""
        with self._lock:
            self._idle.clear()

    def _taken(self, size: int) -> Tensor:
        """Return uint8 memory of at least ``size`` bytes.

        It is the smallest idle piece that is large enough, or a new one.
        """
        # Search and removal share one lock, so that two threads cannot take the same piece.
        with self._lock:
            best, least = -1, 0
            # Reversed, because the most recent piece of a size is still in the processor's cache.
            for place in reversed(range(len(self._idle))):
                found = self._idle[place].numel()
                if found >= size and (best < 0 or found < least):
                    best, least = place, found
            if best >= 0:
                return self._idle.pop(best)
            if self._idle:  # Replaced, so that pieces grow in size and not in number.
                self._idle.pop(
                    min(range(len(self._idle)), key=lambda place: self._idle[place].numel())
                )
        return _allocated(size)

    def _give_back(self, memory: Tensor) -> None:
        with self._lock:
            self._idle.append(memory)


def _allocated(size: int) -> Tensor:
    """Return ``size`` uninitialized bytes, in large pages if the system has them."""
    memory = torch.empty(size, dtype=torch.uint8, device="cpu")
    _native.loaded("cpu").advise_large_pages(_native.address(memory, memory.device), memory.nbytes)
    return memory
