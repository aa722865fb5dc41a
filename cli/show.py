"""The command ``pdd-fast show``."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import click

from pdd_fast.cli import output
from pdd_fast.cli.options import PATH
from pdd_fast.runtime.errors import RunError, UsageError


@click.command(name="show")
@click.argument("run_dir", metavar="RUN", type=PATH)
@click.option(
    "--json", "as_json", is_flag=True, help="Print one JSON object on stdout instead of text."
)
def command(run_dir: Path, as_json: bool) -> None:
    """Draw the images and the accuracy of RUN, and print its table. RUN may be unfinished."""
    from pdd_fast.storage.run import Run

    run = Run.open(run_dir)
    wanted = _pictures(run)
    if not wanted:
        raise UsageError(
            f"{run.path} has no finished stage to show; continue it with pdd-fast distill --resume"
        )
    files = draw_plots(run)
    evaluation = run.read_evaluation() if run.evaluation_file.exists() else None
    if as_json:
        output.print_json(
            {
                "run": str(run.path),
                "files": list(map(str, files)),
                "evaluation": None if evaluation is None else evaluation.model_dump(),
            }
        )
    else:
        if evaluation is not None:
            output.print_evaluation(evaluation)
        else:
            print(f"{run.path} has not been evaluated yet")
        output.print_files(files)
    failed = [path.name for path in wanted if path not in files]
    if failed:
        raise RunError(f"{' and '.join(failed)} could not be drawn; the warnings say why")


def draw_plots(run: Any) -> list[Path]:
    """Write the plots that the run has data for; return the paths of those that succeeded."""
    from pdd_fast.evaluation.figures import attempt

    return [path for file, picture in _pictures(run).items() for path in attempt(file, picture)]


def _pictures(run: Any) -> dict[Path, Callable[[Path], object]]:
    """Return the plots that the run has data for, each path with the function that draws it."""
    from pdd_fast.evaluation.plots import accuracy_plot, image_grid
    from pdd_fast.storage.distilled import load_distilled

    pictures: dict[Path, Callable[[Path], object]] = {}
    finished = [
        run.stage_file(s) for s in range(1, run.settings.stages + 1) if run.stage_file(s).exists()
    ]
    if finished:
        pictures[run.images_file] = partial(image_grid, load_distilled(finished[-1]))
    if run.evaluation_file.exists():
        pictures[run.accuracy_file] = partial(accuracy_plot, run.read_evaluation())
    return pictures
