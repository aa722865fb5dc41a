"""What the benchmarks share: one process per measurement, contenders in turn, medians.

A benchmark calls itself with ``--child NAME`` once per contender and round. The child prints one JSON object: numbers,
or what kept it from giving any. Rounds go through all contenders in turn, so that a slow minute of the machine hits all
of them, and a contender that failed is not tried again.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from present import gigabytes

from pdd_fast.graphs import CaptureWarning
from pdd_fast.memory import is_out_of_memory
from pdd_fast.ops._native import MissingKernelsWarning

T = TypeVar("T")
SLOWER = (MissingKernelsWarning, CaptureWarning)


# ---- in the child -------------------------------------------------------------------------------------------------


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


def seconds_per_call(call: Callable[[], object], device: torch.device, at_least: float = 0.05) -> float:
    """Seconds of one call among as many as take ``at_least`` seconds: for calls that a clock is too coarse for."""

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

    The older flags: setting them sets the newer ones too, and the torch.compile of torch 2.11 still reads the older.
    """
    tf32 = name != "float32"
    torch.backends.cuda.matmul.allow_tf32 = tf32
    torch.backends.cudnn.allow_tf32 = tf32
    torch.backends.cudnn.benchmark = True  # shapes never change here, so every contender gets its fastest algorithms


def resident_peak() -> int:
    """Most bytes that this process has had in memory. Not ru_maxrss, which begins with what the parent had."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM:")).split()[1]) * 1024


def out_of_memory(error: BaseException) -> str | None:
    """What was asked for, where ``error`` is about memory; None where it is not."""
    if not is_out_of_memory(error):
        return None
    found = re.search(r"tried to allocate ([\d.]+ \w+)", str(error), re.IGNORECASE)
    asked = f"asked for {found[1]}" if found else "did not say for how much it asked"
    held = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
    return f"{asked}, having had {gigabytes(held)}" if held else asked


def child(work: Callable[[], dict[str, Any]]) -> None:
    """Prints what ``work`` measures, or why it cannot; other errors end the process with their traceback.

    Where the package would warn that it does something slower instead, that is not what was to be measured.
    """
    for warning in SLOWER:
        warnings.simplefilter("error", warning)
    try:
        found = work()
    except SLOWER as error:
        found = {"failed": "not available", "why": str(error)}
    except Exception as error:
        why = out_of_memory(error)
        if why is None:
            raise
        found = {"failed": "out of memory", "why": why}
    print(json.dumps(found))


def is_child(args: argparse.Namespace, one: Callable[[argparse.Namespace], dict[str, Any]]) -> bool:
    """Sets the number of threads; in a process that was started to measure, measures and says so."""
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.child:
        child(partial(one, args))
    return bool(args.child)


# ---- in the parent ------------------------------------------------------------------------------------------------


@dataclass
class Outcome:
    """A contender's measurements, one a round, or why there are none."""

    samples: list[dict[str, Any]] = field(default_factory=list)
    failed: dict[str, str] | None = None

    def values(self, key: str) -> list[float]:
        return [sample[key] for sample in self.samples]

    def median(self, key: str) -> float:
        return statistics.median(self.values(key))

    def result(self, other: Outcome | None, key: str = "seconds") -> dict[str, Any]:
        """What a record keeps of it, compared with ``other``."""
        if self.failed:
            return self.failed
        if not self.samples:
            return {"failed": "not run", "why": "the benchmark ended before"}
        # Where a process has timed several, all of them: the spread is then of iterations, not of their medians.
        each = [sample.get(f"{key}_each", [sample[key]]) for sample in self.samples]
        found: dict[str, Any] = {"seconds": self.median(key), "seconds_all": [value for some in each for value in some]}
        found["times_ours"] = self.times(other, key)
        if "peak_bytes" in self.samples[0]:
            found["peak_bytes"] = max(self.values("peak_bytes"))
        return found | {name: self.samples[0][name] for name in ("error",) if name in self.samples[0]}

    def times(self, other: Outcome | None, key: str) -> float | None:
        """Median of this one's numbers over the other's, round by round, so that the machine's drift cancels."""
        if other is None or other.failed or self.failed or not (self.samples and other.samples):
            return None
        return statistics.median(a / b for a, b in zip(self.values(key), other.values(key), strict=False))


def run_child(script: Path, name: str, arguments: Sequence[str], limit: float) -> dict[str, Any]:
    """One measurement in a process of its own."""
    command = [sys.executable, str(script), *arguments, "--child", name]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=limit, check=False)
    except subprocess.TimeoutExpired:
        return {"failed": "too slow", "why": f"took more than {limit:g} s"}
    if result.returncode == -9:  # how Linux ends a process where there is no memory left
        return {"failed": "out of memory", "why": "was killed"}
    if result.returncode:
        lines = result.stderr.strip().splitlines() or [f"ended with status {result.returncode}"]
        print(result.stderr, file=sys.stderr)
        return {
            "failed": "failed",
            "why": next((line for line in lines[::-1] if re.match(r"\S*Error", line)), lines[-1]),
        }
    return json.loads(result.stdout.splitlines()[-1])


def in_turn(
    script: Path,
    names: Sequence[str],
    arguments: Sequence[str],
    rounds: int,
    limit: float,
    keep: Callable[[dict[str, Outcome]], None] = lambda _: None,
) -> dict[str, Outcome]:
    """``rounds`` measurements of every contender. ``keep`` gets what there is after each, so that nothing is lost."""
    outcomes = {name: Outcome() for name in names}
    for number in range(rounds):
        for name in names:
            outcome = outcomes[name]
            if outcome.failed:
                continue
            print(f"round {number + 1}/{rounds}: {name}", file=sys.stderr, flush=True)
            found = run_child(script, name, arguments, limit)
            if "failed" in found:
                outcome.failed = found
            else:
                outcome.samples.append(found)
            keep(outcomes)
    return outcomes
