"""pdd-fast show"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from pdd_fast.cli import output
from pdd_fast.errors import UsageError


@click.command(name="show")
@click.argument("run_dir", metavar="RUN", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout, for machines.")
def command(run_dir: Path, as_json: bool) -> None:
    """Draw the images and the accuracy of RUN, and print its table. RUN may be unfinished."""
    from pdd_fast.runs import Run

    run = Run.open(run_dir)
    files = draw(run)
    if not files:
        raise UsageError(f"{run.path} has no finished stage to show; continue it with pdd-fast distill --resume")
    evaluation = run.read_evaluation() if run.evaluation_file.exists() else None
    if as_json:
        output.print_json({"run": str(run.path), "files": list(map(str, files)), "evaluation": evaluation})
        return
    if evaluation is not None:
        output.print_evaluation(evaluation)
    else:
        print(f"{run.path} has not been evaluated yet")
    output.print_files(files)


def draw(run: Any) -> list[Path]:
    """Writes the pictures that there is something to draw for; their paths."""
    from pdd_fast.distilled import load_distilled
    from pdd_fast.pictures import accuracy_plot, image_grid

    files = []
    finished = [run.stage_file(s) for s in range(1, run.config.stages + 1) if run.stage_file(s).exists()]
    if finished:
        image_grid(load_distilled(finished[-1]), run.images_file)
        files.append(run.images_file)
    if run.evaluation_file.exists():
        accuracy_plot(run.read_evaluation(), run.accuracy_file)
        files.append(run.accuracy_file)
    return files
