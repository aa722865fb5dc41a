"""The command ``pdd-fast bench``."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import click

from pdd_fast.benchmarks.cases import SUITES, select
from pdd_fast.cli import output, progress
from pdd_fast.cli.options import PathOption
from pdd_fast.runtime.errors import RunError


@click.command(name="bench")
@click.option(
    "--suite",
    type=click.Choice(list(SUITES)),
    default="quick",
    show_default=True,
    help="Cases to measure.",
)
@click.option(
    "--only",
    multiple=True,
    metavar="PATTERN",
    help="Cases of the suite whose names match; may be repeated.",
)
@click.option(
    "--skip", multiple=True, metavar="PATTERN", help="Cases to leave out; may be repeated."
)
@click.option(
    "--case",
    "named",
    multiple=True,
    metavar="NAME",
    help="A case to measure instead of the suite; may be repeated.",
)
@click.option(
    "--implementation",
    multiple=True,
    metavar="TEXT",
    help="Implementations whose names contain TEXT; may be repeated.",
)
@click.option(
    "--without",
    multiple=True,
    metavar="TEXT",
    help="Implementations to leave out; may be repeated.",
)
@click.option(
    "--rounds",
    type=click.IntRange(1),
    default=None,
    help="Measurements of each implementation. [default: the suite's]",
)
@click.option(
    "--threads", type=click.IntRange(1), default=None, help="CPU threads. [default: torch's]"
)
@click.option(
    "--device", default="auto", show_default=True, help="Device: auto, cpu, cuda or cuda:N."
)
@click.option(
    "--limit",
    type=click.FloatRange(0, min_open=True),
    default=None,
    help="Time limit of one measurement, seconds. [default: the suite's]",
)
@click.option(
    "--output",
    "folder",
    type=PathOption(file_okay=False),
    default=None,
    metavar="DIR",
    help="Folder for bench.json, bench.md and bench.png. [default: bench/TIME]",
)
@click.option("--list", "listing", is_flag=True, help="List the cases and exit.")
@click.option(
    "--json", "as_json", is_flag=True, help="Print one JSON object on stdout instead of text."
)
def command(
    suite: str,
    only: tuple[str, ...],
    skip: tuple[str, ...],
    named: tuple[str, ...],
    listing: bool,
    folder: Path | None,
    as_json: bool,
    rounds: int | None,
    threads: int | None,
    limit: float | None,
    **chosen: Any,
) -> None:
    """Measure speed, memory and gradient error against plain PyTorch.

    Every implementation runs in processes of its own, in turn. Results are written after every
    measurement, so Ctrl-C loses none. The quick suite takes about ten minutes on two cores.
    """
    if listing:
        _list()
        return
    cases = select(suite, only, skip, named)

    from pdd_fast.benchmarks.bench import Bench, Settings
    from pdd_fast.benchmarks.tables import case_text

    def told(name: str, found: dict[str, Any]) -> None:
        if not as_json:
            print(case_text(name, found), end="\n\n", flush=True)

    settings = Settings(
        suite=suite, rounds=rounds or 0, threads=threads or 0, limit=limit or 0.0, **chosen
    )
    place = folder or Path("bench") / time.strftime("%Y-%m-%d-%H%M%S")
    bench = Bench(cases, settings, place, progress.reporter(), told)
    try:
        bench.run()
    finally:
        if as_json and bench.record:
            output.print_json(bench.record)
        elif not as_json:
            output.print_files(_files(place))
    if bench.wrong:
        failed = "; ".join(bench.wrong)
        raise RunError(f"unexpected failures: {failed}; {place / 'bench.json'} has the details")


def _list() -> None:
    """Print the suites, then every case once with the suites that contain it."""
    for name, suite in SUITES.items():
        print(f"{name}: {len(suite.cases)} cases, {suite.rounds} rounds; {suite.what}")
    print()
    titles = {case.name: case.title for suite in SUITES.values() for case in suite.cases}
    width = max(map(len, titles))
    for case, title in titles.items():
        suites = [name for name, suite in SUITES.items() if case in {c.name for c in suite.cases}]
        print(f"{case.ljust(width)}  {title} ({', '.join(suites)})")


def _files(folder: Path) -> list[Path]:
    """Return the files that the benchmark wrote."""
    return [
        path for name in ("bench.json", "bench.md", "bench.png") if (path := folder / name).exists()
    ]
