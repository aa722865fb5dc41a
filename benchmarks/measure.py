"""Measure time, memory and errors in this process, for every kind of case."""

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
    """Conditions of a measurement."""

    device: torch.device
    scratch: Path  # folder that all measurements of a case share
    threads: int = 0  # CPU threads; 0: torch's default


# ---- seconds ----


def synchronize(device: torch.device) -> None:
    """Wait until a GPU is idle."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(call: Callable[[], T], device: torch.device) -> tuple[float, T]:
    """Return one call's wall-clock seconds, between idle states of the device, and its result."""
    synchronize(device)
    began = time.perf_counter()
    result = call()
    synchronize(device)
    return time.perf_counter() - began, result


def repeated(
    call: Callable[[], object], device: torch.device, budget: float = 0.5, most: int = 20
) -> list[float]:
    """Return the seconds of each call, for as many calls as fit into ``budget`` seconds.

    The number of calls lies between one and ``most``. On a GPU it is at least five, because the
    GPU's clock changes between calls.
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
    """Return the mean seconds of one call that is shorter than the clock's resolution.

    The calls together take at least ``at_least`` seconds.
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
    """Select IEEE arithmetic for "float32", and TF32 in convolutions and matrix products otherwise.

    The function sets the older flags. They set the newer ones too, and torch.compile of torch 2.11
    still reads the older ones.
    """
    tf32 = name != "float32"
    torch.backends.cuda.matmul.allow_tf32 = tf32
    torch.backends.cudnn.allow_tf32 = tf32
    # Shapes never change here, so every implementation gets its fastest algorithms.
    torch.backends.cudnn.benchmark = True


# ---- errors ----


def relative_error(found: Tensor, truth: Tensor) -> float | None:
    """Return ‖found − truth‖ / ‖truth‖; None if it is not finite.

    ``truth`` is in float64 on the CPU.
    """
    return _finite((found.detach().cpu().double() - truth).norm() / truth.norm())


def image_errors(found: Tensor, truth: Tensor) -> dict[str, float | None]:
    """Return relative error and cosine similarity of the images' gradient to the true one."""
    flat = found.detach().cpu().double().flatten()
    cosine = torch.nn.functional.cosine_similarity(flat, truth.flatten(), dim=0)
    return {"images": relative_error(found, truth), "cosine": _finite(cosine)}


def _finite(value: Tensor) -> float | None:
    return float(value) if value.isfinite() else None


# ---- bytes ----


def _status(name: str) -> int:
    """Return the value of a line of /proc/self/status in bytes."""
    lines = _STATUS.read_text(encoding="utf-8").splitlines()
    return int(next(line for line in lines if line.startswith(f"{name}:")).split()[1]) * 1024


def resident_peak() -> int:
    """Return this process's peak resident memory in bytes.

    The function prefers VmHWM to ru_maxrss, which starts from the parent's value.
    """
    return _status("VmHWM") if _STATUS.exists() else peak_memory(torch.device("cpu"))


def load_lazily_loaded() -> None:
    """Trigger the imports that torch defers to the first use of an optimizer or of forward mode.

    They take 1.5 seconds and 170 MB, which belong to torch and not to an implementation.
    Measure peak memory from here on, and the memory in use before: torch itself takes 0.4 GB.
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
        # Memory used by loading does not count. "5" resets the peak to the resident size.
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
        self._start = _status("VmRSS") if _STATUS.exists() else resident_peak()

    def forget(self) -> None:
        """Reset a GPU's peak, so that memory used while choosing algorithms does not count."""
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self._device)

    def found(self, holds_graph: bool = False) -> dict[str, int]:
        """Return the peak, and its increase since the start."""
        if self._device.type == "cuda":
            # A graph reserves its memory at capture, and that memory no longer counts as allocated.
            most = (
                torch.cuda.max_memory_reserved if holds_graph else torch.cuda.max_memory_allocated
            )
            peak = most(self._device)
        else:
            peak = resident_peak()
        return {"peak_bytes": peak, "above_start_bytes": max(0, peak - self._start)}


def refuse_too_much() -> None:
    """Make allocations fail that exceed the machine's free memory.

    Linux would grant them and later kill a process, not always the one that allocated.
    """
    free = host.free()
    if resource is None or not free or not _STATUS.exists():
        return
    # Thread stacks and memory reserved by libraries count as data without being resident.
    wanted = free + _status("VmData")
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    limit = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, hard))


def out_of_memory(error: BaseException) -> str | None:
    """Return a message with requested and used memory; None if ``error`` is not about memory."""
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
    """Return the result of a measurement: all times of every timed part, memory, and ``more``."""
    return {"seconds": {part: list(each) for part, each in seconds.items()}, **memory, **more}
