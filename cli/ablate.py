"""The command ``pdd-fast ablate``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from pdd_fast.cli import output, progress
from pdd_fast.cli.options import PATH, ablation_options, given_settings
from pdd_fast.runtime.errors import UsageError
from pdd_fast.runtime.models import listed
from pdd_fast.settings import choices, resolve


@click.command(name="ablate")
@ablation_options
@click.option(
    "--stages", default="1,2,5,10", help="Numbers of stages, joined by commas. [default: 1,2,5,10]"
)
@click.option(
    "--conditioning", default="on,off", help="Conditioning: on, off, or both. [default: on,off]"
)
@click.option(
    "--filter",
    "filters",
    default="none",
    help="Filters, joined by commas: none, forgetting, learned. [default: none]",
)
@click.option(
    "--seeds",
    type=click.IntRange(1),
    default=3,
    help="Number of seeds, counted from 0. [default: 3]",
)
@click.option(
    "--output", "folder", type=PATH, default=None, help="Directory. [default: ablation/DATA-ipc...]"
)
def command(
    stages: str,
    conditioning: str,
    filters: str,
    seeds: int,
    folder: Path | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Compare numbers of stages, with and without conditioning and filters.

    Every variant is distilled and evaluated. All variants of a seed share their experts and take
    the same number of SGD steps. The same call continues an interrupted ablation.
    """
    # Each variant sets its own number of stages; 1 stands for it here.
    settings = resolve(options["recipe"], **({"stages": 1} | given_settings(options)))
    combined = _numbers(stages), _names("conditioning", conditioning), _names("filter", filters)

    from pdd_fast.evaluation.ablation import ablate, variants
    from pdd_fast.storage.run import default_name

    folder = folder or Path("ablation") / default_name(settings, stages=False)
    content = ablate(settings, variants(*combined), range(seeds), folder, progress.reporter())
    if as_json:
        output.print_json(content)
        return
    output.print_ablation(content)
    picture = folder / "ablation.png"
    output.print_files([folder / "ablation.json"] + [picture] * picture.exists())


def _numbers(text: str) -> tuple[int, ...]:
    """Return the numbers of stages in the value of --stages."""
    found = listed(text, int)
    if not found or min(found) < 1:
        raise UsageError(
            f"--stages must be whole numbers from 1 on, joined by commas, got {text!r}"
        )
    return found


def _names(setting: str, text: str) -> list[str]:
    """Return the values of ``setting`` in the value of its flag."""
    found = [part.strip() for part in text.split(",")]
    for name in found:
        if name not in choices(setting):
            raise UsageError(
                f"--{setting} must be {' or '.join(choices(setting))}, or several of them "
                f"joined by commas, got {name!r}"
            )
    return found
