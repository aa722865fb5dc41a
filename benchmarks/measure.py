"""Seconds and bytes of this process: what the modules that measure a kind of case share."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from pdd_fast.benchmarks.formatting import size
from pdd_fast.runtime import host_memory as host
from pdd_fast.runtime.device_memory import is_out_of_memory
from pdd_fast.runtime.devices import peak_memory

try:
    import resource
except ImportError:  # not a POSIX system
    resource = None  # type: ignore[assignment]

T = TypeVar("T")
_STATUS = Path("/proc/self/status")


@dataclass(frozen=True)
class Job:
    """Where a measurement happens."""

    device: torch.device
    scratch: Path  # a folder that all measurements of a case share
    threads: int = 0  # of the CPU; 0: as many as torch takes


# ---- seconds ----


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(call: Callable[[], T], device: torch.device) -> tuple[float, T]:
    """Wall-clock seconds of one call, from an idle device to an idle device, and what it gave."""
    synchronize(device)
    began = time.perf_counter()
    result = call()
    synchronize(device)
    return time.perf_counter() - began, result


def repeated(
    call: Callable[[], object], device: torch.device, budget: float = 0.5, most: int = 20
) -> list[float]:
    """Seconds of each of as many calls as ``budget`` seconds hold, between one and ``most``; five
    on a GPU at least, whose clock changes from one to the next.
    """
    taken: list[float] = []
    while len(taken) < (5 if device.type == "cuda" else 1) or (
        sum(taken) < budget and len(taken) < most
    ):
        taken.append(timed(call, device)[0])
    return taken


def seconds_per_call(
    call: Callable[[], object], device: torch.device, at_least: float = 0.05
) -> float:
    """Seconds of one call among as many as take ``at_least`` seconds: for calls that a clock is too
    coarse for.
    """

    def several(calls: int) -> None:
        for _ in range(calls):
            call()

    calls = 1
    while True:
        took, _ = timed(partial(several, calls), device)
        if took >= at_least:
            return took / calls
        calls = 2 * calls if took < at_least / 4 else int(calls * at_least / took) + 1


def set_precision(name: str) -> None:
    """IEEE arithmetic for "float32", and TF32 in convolutions and matrix products otherwise.

    The older flags: setting them sets the newer ones too, and the torch.compile of torch 2.11 still
        reads the older.
    """
    tf32 = name != "float32"
    torch.backends.cuda.matmul.allow_tf32 = tf32
    torch.backends.cudnn.allow_tf32 = tf32
    torch.backends.cudnn.benchmark = (
        True  # shapes never change here, so every implementation gets its fastest algorithms
    )


# ---- errors ----


def relative_error(found: Tensor, truth: Tensor) -> float | None:
    """‖found − truth‖ / ‖truth‖ with ``truth`` in float64 on the CPU; None where it is not
    finite."""
    return _finite((found.detach().cpu().double() - truth).norm() / truth.norm())


def image_errors(found: Tensor, truth: Tensor) -> dict[str, float | None]:
    """Relative error of the images' gradient, and the cosine of its angle to the true one."""
    flat = found.detach().cpu().double().flatten()
    cosine = torch.nn.functional.cosine_similarity(flat, truth.flatten(), dim=0)
    return {"images": relative_error(found, truth), "cosine": _finite(cosine)}


def _finite(value: Tensor) -> float | None:
    return float(value) if value.isfinite() else None


# ---- bytes ----


def _status(name: str) -> int:
    """A line of /proc/self/status, in bytes."""
    lines = _STATUS.read_text(encoding="utf-8").splitlines()
    return int(next(line for line in lines if line.startswith(f"{name}:")).split()[1]) * 1024


def resident_peak() -> int:
    """Most bytes that this process has had in memory. Where there is a choice not ru_maxrss, which
    begins with what the parent had.
    """
    return _status("VmHWM") if _STATUS.exists() else peak_memory(torch.device("cpu"))


def load_lazily_loaded() -> None:
    """What torch loads at the first use of an optimizer or of forward mode: 1.5 seconds and 170 MB
    that are torch's and no implementation's.
    """
    number = torch.zeros(1, requires_grad=True)
    number.square().sum().backward()
    torch.optim.SGD([number], 0.1).step()
    torch.func.jvp(torch.func.grad(torch.sin), (torch.zeros(()),), (torch.ones(()),))


class Memory:
    """The peak from here on, and what was there before: torch itself takes 0.4 GB."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        if device.type == "cuda":
            self._start = torch.cuda.memory_allocated(device)
            return
        # What loading took is no part of it. "5" sets the peak back to what is resident now.
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
        self._start = _status("VmRSS") if _STATUS.exists() else resident_peak()

    def forget(self) -> None:
        """Sets a GPU's peak back: what choosing algorithms took is no part of it."""
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self._device)

    def found(self, holds_graph: bool = False) -> dict[str, int]:
        """The peak, and how much of it came since the start."""
        if self._device.type == "cuda":
            # What a graph works in was set aside when it was captured and no longer counts as
            # allocated.
            most = (
                torch.cuda.max_memory_reserved if holds_graph else torch.cuda.max_memory_allocated
            )
            peak = most(self._device)
        else:
            peak = resident_peak()
        return {"peak_bytes": peak, "above_start_bytes": max(0, peak - self._start)}


def refuse_too_much() -> None:
    """Makes allocations fail that the machine has no memory for. Linux would give it out, and then
    end a process, not always the one that asked.
    """
    free = host.free()
    if resource is None or not free or not _STATUS.exists():
        return
    # Stacks of threads and what libraries have set aside count as data without being in memory.
    wanted = free + _status("VmData")
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    limit = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, hard))


def out_of_memory(error: BaseException) -> str | None:
    """What was asked for and what was taken by then, where ``error`` is about memory; None where it
    is not.
    """
    if not is_out_of_memory(error) and "bad_alloc" not in str(error):
        return None
    found = re.search(r"tried to allocate ([\d.]+) (\w+)", str(error), re.IGNORECASE)
    asked = "did not say for how much it asked"
    if found:
        amount = size(float(found[1])) if found[2] == "bytes" else f"{found[1]} {found[2]}"
        asked = f"asked for {amount} more"
    on_gpu = torch.cuda.is_available() and torch.cuda.max_memory_allocated() > 0
    held = torch.cuda.max_memory_allocated() if on_gpu else resident_peak()
    return f"{asked} with {size(held)} taken"


def sample(
    seconds: Mapping[str, Sequence[float]], memory: dict[str, int], **more: Any
) -> dict[str, Any]:
    """What a measurement gives: for every part that was timed all times, bytes, and what else there
    is.
    """
    return {"seconds": {part: list(each) for part, each in seconds.items()}, **memory, **more}
