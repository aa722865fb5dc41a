"""The command ``pdd-fast evaluate``."""

from __future__ import annotations

from pathlib import Path

import click

from pdd_fast.cli import output, progress
from pdd_fast.cli.options import PATH, continued


@click.command(name="evaluate")
@click.argument("run_dir", metavar="RUN", type=PATH)
@click.option(
    "--repeats", type=int, default=None, help="Number of fresh networks. [default: the run's]"
)
@click.option(
    "--against",
    type=PATH,
    default=None,
    help="Another run on the same data to compare with, e.g. one stage with the same --ipc.",
)
@click.option(
    "--networks",
    default="convnet",
    help="Networks, joined by commas: convnet, resnet18, resnet18-batchnorm, vgg11, alexnet, mlp. "
    "[default: convnet]",
)
@click.option("--subsets", is_flag=True, help="Also train on each stage's images alone.")
@click.option(
    "--device", default=None, help="Device: auto, cpu, cuda or cuda:N. [default: the run's]"
)
@click.option(
    "--dataset",
    default=None,
    help="imagefolder:DIR, if the run's dataset has moved to DIR. [default: the run's]",
)
@click.option(
    "--data-dir", default=None, help="Folder of torchvision's datasets. [default: the run's]"
)
@click.option(
    "--json", "as_json", is_flag=True, help="Print one JSON object on stdout instead of text."
)
def command(
    run_dir: Path,
    repeats: int | None,
    against: Path | None,
    networks: str,
    subsets: bool,
    as_json: bool,
    **where: str | None,
) -> None:
    """Train fresh networks through the unions of RUN and report their test accuracy stage by stage.

    The command compares them with random real images and with the last union alone, trained for the
    same number of SGD steps.
    """
    from pdd_fast.cli.show import draw_plots
    from pdd_fast.evaluation.evaluate import evaluate_run
    from pdd_fast.storage.run import Run

    run = Run.open(run_dir)
    run = Run(run.path, continued(run.settings, where))
    names = [name.strip() for name in networks.split(",")]
    evaluation = evaluate_run(run, progress.reporter(), repeats, against, names, subsets)
    files = [run.evaluation_file, *draw_plots(run)]
    if as_json:
        output.print_json(evaluation.model_dump())
        return
    output.print_evaluation(evaluation)
    output.print_files(files)
