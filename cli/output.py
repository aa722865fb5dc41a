"""The one place that writes: progress and remarks to stderr, results to stdout."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.progress import Task as RichTask
from rich.table import Table
from rich.text import Text

from pdd_fast.reporting import Reporter, Task

_PLAIN_WIDTH = 100  # columns of a table that does not go to a terminal
_SPEED_SECONDS = 600.0  # a bar's speed is that of so long; an iteration may take minutes
_PLAIN_SECONDS = 10.0  # between two lines of one task where there is no terminal


def reporter() -> Reporter:
    """Bars on a terminal, a line now and then elsewhere."""
    return BarReporter() if sys.stderr.isatty() else LineReporter()


def _values(values: dict[str, Any]) -> str:
    return "  ".join(
        f"{name.replace('_', ' ')} {value:.4g}" if isinstance(value, float) else f"{name} {value}"
        for name, value in values.items()
    )


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02} min"
    return f"{minutes} min {seconds:02} s" if minutes else f"{seconds} s"


class _SecondsColumn(TextColumn):
    """Seconds per unit of work."""

    def __init__(self) -> None:
        super().__init__("")

    def render(self, task: RichTask) -> Text:
        if not task.speed:
            return Text("")
        return Text(f"{1 / task.speed:.3g} s/{task.fields['unit']}", style="dim")


class BarReporter(Reporter):
    """Progress bars by rich."""

    def __init__(self) -> None:
        self._console = Console(stderr=True)

    @contextmanager
    def task(self, name: str, total: int, unit: str, done: int = 0) -> Iterator[Task]:
        columns = (
            TextColumn("{task.description}"), BarColumn(bar_width=24), MofNCompleteColumn(), _SecondsColumn(),
            TimeRemainingColumn(compact=True), TextColumn("{task.fields[shown]}"),
        )  # fmt: skip
        with Progress(*columns, console=self._console, speed_estimate_period=_SPEED_SECONDS) as progress:
            number = progress.add_task(name, total=total, completed=done, unit=unit, shown="")
            shown: dict[str, Any] = {}

            class Bar(Task):
                def advance(self, count: int = 1, **values: Any) -> None:
                    shown.update(values)
                    progress.update(number, advance=count, shown=_values(shown))

            yield Bar()

    def message(self, text: str) -> None:
        self._console.print(text, highlight=False, markup=False)


class LineReporter(Reporter):
    """Plain lines, without control characters, for files and pipes."""

    @contextmanager
    def task(self, name: str, total: int, unit: str, done: int = 0) -> Iterator[Task]:
        began = last = time.monotonic()
        state: dict[str, Any] = {"done": done}
        shown: dict[str, Any] = {}

        def line() -> None:
            seconds = time.monotonic() - began
            now = state["done"]
            parts = [f"{name}: {now}/{total} {unit}s"]
            if now > done:
                each = seconds / (now - done)
                parts.append(f"{each:.3g} s/{unit}")
                parts.append(_duration(seconds) + (f", {_duration(each * (total - now))} left" if now < total else ""))
            self.message("  ".join(parts + ([_values(shown)] if shown else [])))

        class Lines(Task):
            def advance(self, count: int = 1, **values: Any) -> None:
                nonlocal last
                state["done"] += count
                shown.update(values)
                if time.monotonic() - last > _PLAIN_SECONDS:
                    last = time.monotonic()
                    line()

        yield Lines()
        line()

    def message(self, text: str) -> None:
        print(text, file=sys.stderr, flush=True)


def print_json(content: Any) -> None:
    """One JSON object on stdout."""
    print(json.dumps(content), flush=True)


def _console() -> Console:
    return Console() if sys.stdout.isatty() else Console(width=_PLAIN_WIDTH, no_color=True, highlight=False)


def print_evaluation(evaluation: dict[str, Any]) -> None:
    """The tables of an evaluation, one for each kind of network and of labels: a row per stage, a column per result."""
    from pdd_fast.evaluate import tables

    for words, results in tables(evaluation):
        _print_results(evaluation, results, f" ({words})" if words else "")
        # Evaluations of before have none.
        shown = [(result["network"], result["name"]) for result in results]
        for pair in (pair for pair in evaluation.get("paired", ()) if (pair["network"], pair["to"]) in shown):
            if pair["ci95"] is not None:
                print(f"{pair['of']} − {pair['to']} in the end: {pair['difference']:+.1f} ± {pair['ci95']:.1f} (95 %)")


def _print_results(evaluation: dict[str, Any], results: list[dict[str, Any]], kind: str) -> None:
    from pdd_fast.evaluate import ALONE

    protocol = evaluation["protocol"]
    repeats = len(results[0]["seeds"])
    networks = "1 fresh network" if repeats == 1 else f"{repeats} fresh networks"
    print(f"Test accuracy on {protocol['data']}, percent, mean ± std over {networks}{kind}")
    # Stages run downwards: there may be any number of them, and the table has to fit into 80 columns.
    table = Table()
    for name in ("stage", "ipc", "steps", *(result["name"] for result in results)):
        table.add_column(name, justify="right")
    rows = zip(protocol["images_per_class"], evaluation["steps"], strict=True)
    for stage, (images, steps) in enumerate(rows):
        last = stage + 1 == len(evaluation["steps"])
        cells = [
            f"{result['mean'][stage]:.1f} ± {result['std'][stage]:.1f}" if last or result["name"] not in ALONE else ""
            for result in results
        ]
        table.add_row(str(stage + 1), str(images), str(steps), *cells)
    sys.stdout.flush()
    _console().print(table)


def print_ablation(content: dict[str, Any]) -> None:
    """A row for each variant."""
    seeds = len(content["seeds"])
    of = "1 seed" if seeds == 1 else f"mean and 95 % interval over {seeds} seeds"
    print(f"Test accuracy on {content['data']} after {content['steps']} steps, percent, {of}")
    table = Table()
    table.add_column("variant")
    for name in ("accuracy", *(f"seed {seed}" for seed in content["seeds"])):
        table.add_column(name, justify="right")
    for result in content["results"]:
        interval = "" if result["ci95"] is None else f" ± {result['ci95']:.1f}"
        cells = [f"{accuracy:.1f}" for accuracy in result["accuracy"]]
        table.add_row(result["name"], f"{result['mean']:.1f}{interval}", *cells)
    sys.stdout.flush()
    _console().print(table)


def print_files(paths: list[Path]) -> None:
    """The files that a command made, one a line."""
    for path in paths:
        print(path)


def print_facts(facts: dict[str, dict[str, str]]) -> None:
    """Sections of name and value."""
    for section, entries in facts.items():
        print(section)
        width = max(map(len, entries), default=0)
        for name, value in entries.items():
            print(f"  {name.ljust(width)}  {value}")
