"""Output of commands: results go to stdout, progress and messages to stderr."""

from __future__ import annotations

import json
import os
import sys
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from pdd_fast.cli.progress import _is_terminal

if TYPE_CHECKING:
    from pdd_fast.storage.evaluation import Evaluation, Result

_PLAIN_WIDTH = 100  # columns of a table outside a terminal, unless COLUMNS is set
_LEAST_TABLE_WIDTH = 60  # columns; a narrower terminal shows lines instead of a table


def print_json(content: Any) -> None:
    """Print one JSON object on stdout."""
    print(json.dumps(content), flush=True)


def _console(plain_width: int = _PLAIN_WIDTH) -> Console:
    """Return the console for results.

    Outside a terminal it is COLUMNS wide, or ``plain_width`` if that is not set.
    """
    if _is_terminal(sys.stdout):
        return Console(force_jupyter=False)
    columns = os.environ.get("COLUMNS", "")
    width = int(columns) if columns.isdecimal() and int(columns) else plain_width
    return Console(
        width=width, no_color=True, highlight=False, force_jupyter=False, force_terminal=False
    )


def _print_line(text: str, indent: str = "") -> None:
    """Print a line; a terminal that is too narrow gets several, broken between words."""
    width = _console(plain_width=10**6).width
    for line in textwrap.wrap(text, width, initial_indent=indent, subsequent_indent=indent + "  "):
        print(line)


def _print_table(columns: list[str], rows: list[list[str]], left: int) -> None:
    """Print a table, or a few lines per row if the table does not fit.

    Args:
        columns: Names of the columns.
        rows: Cells of each row.
        left: Number of columns that name a row and head its lines. A single one is aligned as text.
    """
    table = Table()
    for k, name in enumerate(columns):
        table.add_column(name, justify="left" if left == 1 and k == 0 else "right", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    sys.stdout.flush()
    console = _console()
    needed = console.measure(table, options=console.options.update(max_width=10**6)).maximum
    if console.width >= max(_LEAST_TABLE_WIDTH, needed):
        console.print(table)
        return
    names = max(map(len, columns[left:]), default=0)
    for row in rows:
        head = zip(columns[:left], row[:left], strict=True)
        _print_line(row[0] if left == 1 else ", ".join(f"{name} {value}" for name, value in head))
        for name, value in zip(columns[left:], row[left:], strict=True):
            if value:
                _print_line(f"{name.ljust(names)}  {value}", "  ")


def print_evaluation(evaluation: Evaluation) -> None:
    """Print a table for each kind of network and labels: a row per stage, a column per result."""
    for title, results in evaluation.comparable():
        _print_results(evaluation, results, f" ({title})" if title else "")
        shown = [(result.network, result.name) for result in results]
        for pair in evaluation.paired:
            if (pair.network, pair.to) in shown and pair.ci95 is not None:
                difference = f"{pair.difference:+.1f} ± {pair.ci95:.1f} (95 %)"
                _print_line(f"{pair.of} − {pair.to} in the end: {difference}")


def _print_results(evaluation: Evaluation, results: list[Result], kind: str) -> None:
    """Print the table of one group of results, whose title ends with ``kind``."""
    from pdd_fast.evaluation.comparisons import ALONE

    protocol = evaluation.protocol
    repeats = len(results[0].seeds)
    networks = "1 fresh network" if repeats == 1 else f"{repeats} fresh networks"
    _print_line(f"Test accuracy on {protocol.data}, percent, mean ± std over {networks}{kind}")
    # Stages are rows, because their number is not limited and the table must fit 80 columns.
    table = []
    rows = zip(protocol.images_per_class, evaluation.steps, strict=True)
    for stage, (images, steps) in enumerate(rows):
        last = stage + 1 == len(evaluation.steps)
        cells = [
            f"{result.mean[stage]:.1f} ± {result.std[stage]:.1f}"
            if last or result.name not in ALONE
            else ""
            for result in results
        ]
        table.append([str(stage + 1), str(images), str(steps), *cells])
    _print_table(["stage", "ipc", "steps", *(result.name for result in results)], table, left=3)


def print_ablation(content: dict[str, Any]) -> None:
    """Print a table of an ablation with a row for each variant."""
    seeds = len(content["seeds"])
    of = "1 seed" if seeds == 1 else f"mean and 95 % interval over {seeds} seeds"
    _print_line(f"Test accuracy on {content['data']} after {content['steps']} steps, percent, {of}")
    table = []
    for result in content["results"]:
        interval = "" if result["ci95"] is None else f" ± {result['ci95']:.1f}"
        cells = [f"{accuracy:.1f}" for accuracy in result["accuracy"]]
        table.append([result["name"], f"{result['mean']:.1f}{interval}", *cells])
    _print_table(
        ["variant", "accuracy", *(f"seed {seed}" for seed in content["seeds"])], table, left=1
    )


def print_files(paths: list[Path]) -> None:
    """Print the files that a command wrote, one per line."""
    for path in paths:
        print(path)


def print_facts(facts: dict[str, dict[str, str]]) -> None:
    """Print sections of names and values."""
    for section, entries in facts.items():
        print(section)
        width = max(map(len, entries), default=0)
        for name, value in entries.items():
            print(f"  {name.ljust(width)}  {value}")
