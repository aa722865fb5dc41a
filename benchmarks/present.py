"""How the benchmarks are called and what they give: arguments, numbers for people, tables, records."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch

from pdd_fast.devices import resolve_device
from pdd_fast.errors import UsageError


def gigabytes(count: float) -> str:
    return f"{count / 1e9:.2f} GB"


def duration(value: float) -> str:
    """Seconds in the unit that leaves one to three digits before the point."""
    unit, factor = ("s", 1.0) if value >= 1 else ("ms", 1e3) if value >= 1e-3 else ("µs", 1e6)
    return f"{value * factor:.3g} {unit}"


def spread(values: Sequence[float]) -> str:
    return f"{duration(min(values))}–{duration(max(values))}"


def number(value: float | None, form: str = ".2f") -> str:
    return "" if value is None else format(value, form)


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table whose columns line up in a terminal too."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    lines = [" | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in [header, *rows]]
    return "\n".join(f"| {line} |" for line in [lines[0], " | ".join("-" * width for width in widths), *lines[1:]])


def write_record(path: Path | None, record: dict[str, Any]) -> None:
    """Writes ``record`` as JSON, whole or not at all."""
    if path is None:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".part")
    partial.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    os.replace(partial, path)


class Parser(argparse.ArgumentParser):
    """Prints the docstring of its benchmark as it is, and says in one sentence what is wrong with a call."""

    def __init__(self, description: str | None) -> None:
        super().__init__(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n")

    def add_numbers(self, *options: tuple[str, int, str]) -> None:
        for name, default, text in options:
            self.add_argument(f"--{name}", type=int, default=default, help=f"{text} (default {default})")

    def add_shared(self, rounds: int) -> None:
        """What every benchmark takes, and the hidden arguments with which it calls itself."""
        self.add_argument("--device", type=device, default="auto", help="auto, cpu, cuda or cuda:N (default auto)")
        self.add_numbers(("rounds", rounds, "measurements of every contender"), ("threads", 0, "0: torch's own number"))
        self.add_argument("--output", type=Path, help="where the JSON goes")
        self.add_argument(
            "--only", action="append", default=[], metavar="TEXT", help="contenders whose name contains it"
        )
        self.add_argument(
            "--skip", action="append", default=[], metavar="TEXT", help="contenders to leave out, likewise"
        )
        self.add_argument("--limit", type=float, default=600, help="seconds for one measurement (default 600)")
        self.add_argument("--child", help=argparse.SUPPRESS)
        self.add_argument("--truth", type=Path, help=argparse.SUPPRESS)


def device(name: str) -> torch.device:
    """For argparse."""
    try:
        return resolve_device(name)
    except UsageError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def selected(names: Sequence[str], only: Sequence[str], skip: Sequence[str], parser: Parser) -> list[str]:
    """The contenders that a text of ``only`` means, if there is any, and that none of ``skip`` means.

    A text means the contender of that name, or where there is none all whose names contain it.
    """

    def meant(texts: Sequence[str]) -> set[str]:
        found: set[str] = set()
        for text in texts:
            some = {text} & set(names) or {name for name in names if text in name}
            if not some:
                parser.error(f"no contender's name contains {text!r}; they are: {'; '.join(names)}")
            found |= some
        return found

    chosen = (meant(only) if only else set(names)) - meant(skip)
    if not chosen:
        parser.error("--only and --skip leave no contender")
    return [name for name in names if name in chosen]
