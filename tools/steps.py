"""Run a list of steps, each a process with a time limit, and keep a report of their outcomes.

The report is written before and after every step, so that a lost machine costs only the step in
progress.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

# For processes.py, which works before the package is installed.
sys.path.append(str(Path(__file__).resolve().parents[1] / "benchmarks"))
import processes

SHOWN = 20  # last lines of a step's log that the report shows if it is not green


@dataclass(frozen=True)
class Step:
    """A command and its conditions for success."""

    name: str
    command: Sequence[str]
    limit: float  # seconds
    says: str = ""  # regular expressions, one per line, that the output must match
    any_status: bool = False  # only the output decides: for a program that must fail
    missing: str = ""  # why the step cannot run; it counts as not green
    environment: dict[str, str] = field(default_factory=dict)
    tables: bool = False  # copy the Markdown tables of the output into the report
    expected: float = 0  # seconds it should take, for a plan; 0: not known
    beside: bool = False  # run at the same time as the step before


@dataclass
class Result:
    """Outcome of a step."""

    name: str
    outcome: str = "not run"  # ok, failed, timed out, not found, interrupted, running
    seconds: float = 0.0
    limit: float = 0.0
    status: int | None = None
    log: str = ""
    note: str = ""

    @property
    def green(self) -> bool:
        """Return whether the step passed."""
        return self.outcome == "ok"


@dataclass
class Report:
    """Contents of the report; ``facts`` describe the machine and the sources."""

    title: str
    facts: dict[str, Any]
    results: list[Result]
    folder: Path
    tables: dict[str, str] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock, repr=False, compare=False)

    @property
    def green(self) -> bool:
        """Return whether every step passed."""
        return bool(self.results) and all(result.green for result in self.results)

    def write(self) -> None:
        """Write report.json and report.md, each atomically."""
        record = {"title": self.title, "green": self.green, "facts": self.facts}
        with self.lock:  # steps side by side write at the same time
            record |= {"steps": [asdict(result) for result in self.results]}
            _replace(self.folder / "report.json", json.dumps(record, indent=1) + "\n")
            _replace(self.folder / "report.md", self.markdown())

    def markdown(self) -> str:
        """Return the report in Markdown."""
        lines = [f"# {self.title}: {'green' if self.green else 'NOT green'}", ""]
        lines += [
            "| | |",
            "|---|---|",
            *(f"| {name} | {value} |" for name, value in self.facts.items()),
            "",
        ]
        lines += ["| step | outcome | seconds | limit | log | |", "|---|---|---|---|---|---|"]
        for r in self.results:
            log = f"[{r.log}]({r.log})" if r.log else ""
            lines.append(
                f"| {r.name} | {r.outcome} | {r.seconds:.0f} | {r.limit:.0f} | {log} | {r.note} |"
            )
        for r in self.results:
            if r.log and r.outcome not in ("ok", "running"):
                tail = _text(self.folder / r.log).splitlines()[-SHOWN:]
                lines += [
                    "",
                    f"## {r.name}: the end of {r.log}",
                    "",
                    *(f"    {line}" for line in tail),
                ]
        for name, tables in self.tables.items():
            lines += ["", f"## {name}", "", tables]
        return "\n".join(lines) + "\n"


def _replace(path: Path, text: str) -> None:
    partial = path.with_name(path.name + ".part")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace")


def tables_in(log: str) -> str:
    """Return the Markdown tables of a log, with captions and conclusions.

    A caption looks like "step-b20-w32-s32: one training step: ...".
    """
    shown = re.compile(
        r"\||## |[a-z][a-z0-9-]*: (one|DSA)\b|Best exact alternative|.*; the faster is "
    )
    lines = [line for line in log.splitlines() if shown.match(line)]
    text = ""
    for before, line in zip(["", *lines], lines, strict=False):
        starts = (
            not before.startswith("|")
            or not line.startswith("|")
            or before.count("|") != line.count("|")
        )
        text += ("\n" if starts and before else "") + line + "\n"
    return text


def run(
    step: Step, result: Result, log: Path, limit: float, stop: threading.Event | None = None
) -> None:
    """Run one step for at most ``limit`` seconds and fill in its result, even if interrupted.

    Args:
        step: The step.
        result: Its result.
        log: File of its output.
        limit: Seconds.
        stop: Event by which another thread ends the step. None: the step runs in the main thread,
            which an exception interrupts.
    """
    began = time.monotonic()
    with log.open("wb") as output:
        process = subprocess.Popen(
            step.command,
            stdout=output,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env=os.environ | step.environment,
            start_new_session=True,
        )
        try:
            result.status = _wait(process, limit, stop)
            if result.status is not None:
                passed = result.status == 0 or step.any_status
                result.outcome = "ok" if passed else "failed"
        except subprocess.TimeoutExpired:
            result.outcome = "timed out"
        finally:
            if process.returncode is None:
                processes.end(process)
                result.outcome = "timed out" if result.outcome == "timed out" else "interrupted"
            result.seconds = time.monotonic() - began
    if result.outcome == "ok":
        unsaid = [said for said in step.says.splitlines() if not re.search(said, _text(log))]
        if unsaid:
            result.outcome, result.note = "failed", f"its output does not say {unsaid[0]!r}"


def _wait(
    process: subprocess.Popen[bytes], limit: float, stop: threading.Event | None
) -> int | None:
    """Return the status of a process; None if ``stop`` was set before it ended.

    Raises:
        subprocess.TimeoutExpired: The process takes longer than ``limit`` seconds.
    """
    if stop is None:
        return process.wait(limit)
    end = time.monotonic() + limit
    while not stop.is_set():
        try:
            return process.wait(max(0.0, min(0.1, end - time.monotonic())))
        except subprocess.TimeoutExpired:
            if time.monotonic() >= end:
                raise
    return None


def groups(steps: Sequence[Step]) -> list[list[Step]]:
    """Return the steps in groups that run at the same time: a step and those beside it."""
    found: list[list[Step]] = []
    for step in steps:
        if step.beside and found:
            found[-1].append(step)
        else:
            found.append([step])
    return found


def run_all(
    steps: Sequence[Step],
    report: Report,
    budget: float,
    tell: Callable[[str], None] = lambda _: None,
) -> None:
    """Run the steps in order for at most ``budget`` seconds.

    A failed step does not prevent the next ones.
    """
    end = time.monotonic() + budget
    report.results[:] = [Result(step.name, limit=step.limit) for step in steps]
    report.write()
    results = iter(report.results)
    stop = threading.Event()
    # A step beside the one before it runs in a thread. The main thread, which alone gets
    # interrupts, runs the other.
    threads: list[threading.Thread] = []
    try:
        for step, *others in groups(steps):
            result = next(results)
            for other in others:
                arguments = (other, next(results), report, end, budget, tell, stop)
                threads.append(threading.Thread(target=_one, args=arguments))
                threads[-1].start()
            _one(step, result, report, end, budget, tell)
            for thread in threads:
                thread.join()
            threads.clear()
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    report.write()


def _one(
    step: Step,
    result: Result,
    report: Report,
    end: float,
    budget: float,
    tell: Callable[[str], None],
    stop: threading.Event | None = None,
) -> None:
    """Run one step until ``end`` at the latest and report its outcome."""
    left = end - time.monotonic()
    if step.missing:
        result.outcome, result.note = "not found", step.missing
    elif left <= 0:
        result.note = f"the {budget:g} seconds were over"
    else:
        name = re.sub(r"[^a-z0-9]+", "-", step.name.lower()).strip("-")
        result.log, result.outcome = f"{name}.log", "running"
        report.write()
        tell(f"{step.name} (at most {min(step.limit, left):.0f} s)")
        try:
            run(step, result, report.folder / result.log, min(step.limit, left), stop)
        except OSError as error:
            result.outcome, result.note = "failed", str(error)
        finally:
            if result.outcome == "running":  # interrupted before its process started
                result.outcome = "interrupted"
            if result.outcome == "timed out" and left < step.limit:
                result.note = f"the {budget:g} seconds were over"
            if step.tables:
                report.tables[step.name] = tables_in(_text(report.folder / result.log))
            report.write()
    tell(f"{step.name}: {result.outcome}{f', {result.note}' if result.note else ''}")
