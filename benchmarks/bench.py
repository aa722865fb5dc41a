"""Run cases in order, with their implementations in turn.

The record on disk is complete after every measurement.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from pdd_fast.benchmarks import implementations, machine, processes, results, tables
from pdd_fast.benchmarks.cases import KINDS, SUITES, Case
from pdd_fast.benchmarks.implementations import ROOFLINE, TRUTH, Implementation
from pdd_fast.benchmarks.plot import draw
from pdd_fast.benchmarks.processes import Outcome
from pdd_fast.evaluation.figures import attempt
from pdd_fast.runtime.devices import resolve_device
from pdd_fast.runtime.errors import UsageError
from pdd_fast.runtime.files import write_json, write_text
from pdd_fast.runtime.progress import SILENT, Reporter


@dataclass(frozen=True)
class Settings:
    """Settings of a benchmark run."""

    suite: str = "quick"
    device: str = "auto"
    rounds: int = 0  # 0: the suite's default
    limit: float = 0.0  # seconds of one measurement; 0: the suite's default
    threads: int = 0  # 0: torch's default
    implementation: tuple[str, ...] = ()  # names or parts of names; (): all
    without: tuple[str, ...] = ()  # names or parts of names to leave out


class Bench:
    """Run a benchmark and keep its record.

    Args:
        cases: the cases to measure, in this order.
        settings: how they are measured.
        folder: receives bench.json, bench.md and, if meta-gradients were measured, bench.png.
        reporter: receives messages and progress.
        told: called with the name and the record of every finished case.

    Raises:
        UsageError: the folder holds a benchmark, the device cannot be used, or a text names no
            implementation.
    """

    def __init__(
        self,
        cases: Sequence[Case],
        settings: Settings,
        folder: Path,
        reporter: Reporter = SILENT,
        told: Callable[[str, dict[str, Any]], None] = lambda name, found: None,
    ) -> None:
        if (folder / "bench.json").exists():
            raise UsageError(f"{folder} holds a bench.json already; choose another --output")
        suite = SUITES[settings.suite]
        self.rounds, self.limit = settings.rounds or suite.rounds, settings.limit or suite.limit
        self.settings, self.folder, self.reporter, self.told = settings, folder, reporter, told
        self.device = resolve_device(settings.device)
        every = {case: implementations.implementations(case, self.device.type) for case in cases}
        implementations.check(list(every.values()), settings.implementation, settings.without)
        self.plan: dict[Case, list[Implementation]] = {}
        self.left_out: dict[Case, list[str]] = {}
        for case, there in every.items():
            chosen = implementations.select(
                there, settings.implementation, settings.without, suite.compiles
            )
            if chosen:
                self.plan[case] = chosen
                self.left_out[case] = [c.name for c in there if c not in chosen]
        if not self.plan:
            raise UsageError(
                "--implementation and --without must leave an implementation to measure, got none"
            )
        self.wrong: list[str] = []  # unexpected failures
        self.record: dict[str, Any] = {}

    def run(self) -> dict[str, Any]:
        """Run all cases and return the record.

        An interruption leaves the partial results in the folder.
        """
        settings = asdict(self.settings) | {
            "rounds": self.rounds,
            "limit": self.limit,
            "device": str(self.device),
        }
        self.record = {
            "benchmark": "pdd-fast bench",
            "finished": False,
            "began": time.strftime("%Y-%m-%d %H:%M:%S %z"),
            "machine": machine.ask(self.device.type == "cuda", self.settings.threads),
            "settings": settings,
            "cases": {},
        }
        self._write()
        try:
            for case in self.plan:
                self._case(case)
            self.record["finished"] = True
        finally:
            self._write()
            attempt(self.folder / "bench.png", partial(draw, self.record))
        return self.record

    def _write(self) -> None:
        write_json(self.folder / "bench.json", self.record)
        write_text(self.folder / "bench.md", tables.report(self.record))

    def _case(self, case: Case) -> None:
        """Measure one case; report partial results on interruption."""
        chosen = self.plan[case]
        names = [
            *([ROOFLINE] if implementations.has_roofline(case) else []),
            *(c.name for c in chosen),
        ]
        outcomes = {name: Outcome() for name in names}
        found: dict[str, Any] = {
            "case": asdict(case),
            "title": case.title,
            "left_out": self.left_out[case],
            "implementations": [asdict(c) for c in chosen],
        }

        def keep() -> None:
            found.update(results.summary(case, chosen, outcomes))
            self.record["cases"][case.name] = found
            self._write()

        said = set[str]()
        total = self.rounds * len(names) + bool(KINDS[case.kind].errors)
        with tempfile.TemporaryDirectory(prefix="pdd-fast-bench-") as scratch:
            measure = partial(self._measure, case, scratch)
            try:
                with self.reporter.task(case.name, total=total, unit="measurement") as task:
                    if KINDS[case.kind].errors:
                        found["truth"] = measure(TRUTH)
                        self._say(case, TRUTH, found["truth"])
                        keep()
                        task.advance(1, last=TRUTH)
                    for name in processes.in_turn(names, measure, self.rounds, outcomes):
                        keep()
                        task.advance(1, last=name)
                        failed = outcomes[name].failed
                        if failed and name not in said:
                            said.add(name)
                            self._say(case, name, failed)
            finally:
                if case.name in self.record["cases"]:
                    self.told(case.name, found)
        own = {ROOFLINE, *(c.name for c in chosen if c.ours)}
        self.wrong += [
            f"{case.name}: {name}" for name, o in outcomes.items() if name in own and o.is_wrong
        ]
        if found.get("truth", {}).get("failed") == "failed":
            self.wrong.append(f"{case.name}: {TRUTH}")

    def _say(self, case: Case, name: str, found: dict[str, Any]) -> None:
        """Report a missing result at once."""
        if "failed" in found:
            self.reporter.message(f"{case.name}: {name}: {found['failed']}: {found['why']}")

    def _measure(self, case: Case, scratch: str, name: str) -> dict[str, Any]:
        told = {
            "case": case.name,
            "implementation": name,
            "device": str(self.device),
            "threads": self.settings.threads,
            "scratch": scratch,
        }
        return processes.run(processes.command(told), self.limit)
