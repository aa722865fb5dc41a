"""Run each measurement in a separate process. Imports no torch.

Every round runs all implementations in turn, so that a slow minute of the machine affects all of
them. An implementation that failed is not tried again.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

MODULE = "pdd_fast.benchmarks.worker"
DETAILS = 4000  # last characters of a failed process's output that the record keeps
PATIENCE = 10.0  # seconds to wait after a signal


@dataclass
class Outcome:
    """Measurements of one implementation, one per round, or its failure."""

    samples: list[dict[str, Any]] = field(default_factory=list)
    failed: dict[str, Any] | None = None

    @property
    def is_wrong(self) -> bool:
        """Return whether it failed for another reason than its size."""
        return self.failed is not None and self.failed["failed"] in ("failed", "not available")


def command(told: dict[str, Any]) -> list[str]:
    """Return the command line of a worker process."""
    # -P: the installed package, not the one in the working directory, which may have no kernels.
    return [sys.executable, "-P", "-m", MODULE, json.dumps(told)]


def run(arguments: Sequence[str], limit: float) -> dict[str, Any]:
    """Return the answer of a process that runs for at most ``limit`` seconds."""
    process = subprocess.Popen(
        arguments,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        encoding="utf-8",
        errors="replace",
        start_new_session=True,
    )
    try:
        out, said = process.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        return {"failed": "too slow", "why": f"took more than {limit:g} s"}
    finally:
        if process.returncode is None:  # also if this process is interrupted
            end(process)
    if process.returncode == 0:
        try:
            found: dict[str, Any] = json.loads(out.splitlines()[-1])
            return found
        except (ValueError, IndexError):
            return {
                "failed": "failed",
                "why": "gave no numbers",
                "details": (out + said)[-DETAILS:],
            }
    return _why(process.returncode, said)


def _why(status: int, said: str) -> dict[str, str]:
    if status == -signal.SIGKILL:  # Linux kills a process when there is no memory left
        return {"failed": "out of memory", "why": "was killed"}
    if "bad_alloc" in said:
        return {"failed": "out of memory", "why": "did not say for how much it asked"}
    ended = (
        f"was ended by {signal.Signals(-status).name}"
        if status < 0
        else f"ended with status {status}"
    )
    lines = said.strip().splitlines() or [ended]
    why = next(
        (line for line in lines[::-1] if re.match(r"[\w.]*(Error|Exception)\b", line)), lines[-1]
    )
    return {"failed": "failed", "why": why, "details": said[-DETAILS:]}


def end(process: subprocess.Popen[Any]) -> None:
    """End a process and all its children.

    The process leads its own session, and compilers start child processes.
    """
    for sent in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, sent)
            process.wait(PATIENCE)
        except (ProcessLookupError, subprocess.TimeoutExpired):
            continue
    for stream in (process.stdout, process.stderr):
        if stream is not None:
            stream.close()


def in_turn(
    names: Sequence[str],
    measure: Callable[[str], dict[str, Any]],
    rounds: int,
    outcomes: dict[str, Outcome],
) -> Iterator[str]:
    """Measure every implementation ``rounds`` times, into ``outcomes``.

    Yields:
        The name after each measurement, so that the caller can save the results so far.
            Implementations that failed before are yielded too, but not measured again.
    """
    for _ in range(rounds):
        for name in names:
            outcome = outcomes[name]
            if not outcome.failed:
                found = measure(name)
                if "failed" in found:
                    outcome.failed = found
                else:
                    outcome.samples.append(found)
            yield name
