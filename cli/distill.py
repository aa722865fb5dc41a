"""pdd-fast distill"""

from __future__ import annotations

import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
from pdd_fast.cli import output
from pdd_fast.cli.options import configuration, given_settings, require_same, run_options

from pdd_fast.errors import UsageError


@click.command(name="distill")
@run_options
@click.option("--resume", is_flag=True, help="Go on with the run in --run-dir, with the same bits as uninterrupted.")
def command(resume: bool, **options: Any) -> None:
    """Distil a data set in stages, judge it, draw it.

    Trains the experts first if there are none. Ctrl-C (or a kill) leaves a run that --resume continues.
    """
    run = start(resume, **options)
    from pdd_fast.evaluate import evaluate_run
    from pdd_fast.progressive import distill

    reporter = output.reporter()
    try:
        distill(run, reporter)
        evaluation = run.read_evaluation() if run.evaluation_file.exists() else evaluate_run(run, reporter)
    except KeyboardInterrupt as error:
        error.continue_with = f"pdd-fast distill --resume --run-dir {shlex.quote(str(run.path))}"  # type: ignore[attr-defined]
        raise
    from pdd_fast.cli.show import draw

    files = [run.distilled_file, run.evaluation_file, *draw(run)]
    if options["as_json"]:
        output.print_json({"run": str(run.path), "files": list(map(str, files)), "evaluation": evaluation})
        return
    output.print_evaluation(evaluation)
    output.print_files(files)


def start(resume: bool, run_dir: Path | None, **options: Any) -> Any:
    """The run that the flags ask for, new or continued."""
    from pdd_fast.runs import Run, default_run_dir

    if not resume:
        config = configuration(options)
        return Run.create(run_dir or default_run_dir(config), config)
    path = run_dir or default_run_dir(configuration(options))
    if not path.exists():
        raise UsageError(f"{path} does not exist: there is nothing to resume; leave --resume out to begin")
    run = Run.open(path)
    require_same(run.config, options)
    device = given_settings(options).get("device")
    return run if device is None else Run(run.path, replace(run.config, device=device))
