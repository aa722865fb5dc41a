"""The command ``pdd-fast distill``."""

from __future__ import annotations

import shlex
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import click

from pdd_fast.cli import output, progress
from pdd_fast.cli.options import configuration, continued, given_settings, is_free, run_options
from pdd_fast.runtime.errors import UsageError


@click.command(name="distill")
@run_options
@click.option(
    "--resume",
    is_flag=True,
    help="Continue the run in --run-dir. The result has the bits of an uninterrupted run.",
)
def command(resume: bool, **options: Any) -> None:
    """Distill a dataset in stages, evaluate the result and draw it.

    The experts are trained first if there are none. After Ctrl-C or a kill, --resume continues the
    run.
    """
    with begun("distill", resume, **options) as run:
        from pdd_fast.cli.show import draw_plots
        from pdd_fast.evaluation.evaluate import evaluate_run
        from pdd_fast.progressive.stages import distill

        reporter = progress.reporter()
        distill(run, reporter)
        evaluation = (
            run.read_evaluation() if run.evaluation_file.exists() else evaluate_run(run, reporter)
        )
        files = [run.distilled_file, run.evaluation_file, *draw_plots(run)]
    if options["as_json"]:
        output.print_json(
            {
                "run": str(run.path),
                "files": list(map(str, files)),
                "evaluation": evaluation.model_dump(),
            }
        )
        return
    output.print_evaluation(evaluation)
    output.print_files(files)


@contextmanager
def begun(command: str, resume: bool, **options: Any) -> Iterator[Any]:
    """Yield the run that the flags describe, new or continued.

    If the block fails or is interrupted, the error's ``continue_with`` holds the command that
    continues the run. If it fails before anything was written, a new run is removed instead, so
    that the corrected call can create it again.

    Args:
        command: Name of the command, for ``continue_with``.
        resume: Whether to continue a run.
        **options: Values of the flags.

    Raises:
        UsageError: The run cannot be created or continued.
    """
    run = _start(resume, **options)
    try:
        yield run
    except BaseException as error:
        if resume or isinstance(error, KeyboardInterrupt) or not _removed(run):
            again = ["pdd-fast", command, "--resume", "--run-dir", str(run.path)]
            if resume:  # a new run has them in its configuration
                for key, value in given_settings(options).items():
                    again += ["--set", f"{key}={value}"] if is_free(key, value) else []
            error.continue_with = shlex.join(again)  # type: ignore[attr-defined]
        raise


def _removed(run: Any) -> bool:
    """Remove a run without results, unless another process uses it; return whether it is gone."""
    from pdd_fast.runtime.locks import LOCK, OWNER

    with suppress(UsageError, OSError), run.lock():
        files = [entry for entry in run.path.rglob("*") if not entry.is_dir()]
        if all(
            entry.name in ("config.json", LOCK) or entry.name.startswith(OWNER) for entry in files
        ):
            # rmtree empties "." but cannot remove it, and does not follow a link to a folder.
            shutil.rmtree(run.path, ignore_errors=True)
    return not (run.path / "config.json").exists()


def _start(resume: bool, run_dir: Path | None, **options: Any) -> Any:
    """Return the run that the flags describe, new or continued."""
    from pdd_fast.storage.run import Run, default_run_dir

    if not resume:
        settings = configuration(options)
        return Run.create(run_dir or default_run_dir(settings), settings)
    path = run_dir or default_run_dir(configuration(options))
    if not path.exists():
        raise UsageError(
            f"{path} does not exist: there is nothing to resume; leave --resume out to begin"
        )
    run = Run.open(path)
    return Run(run.path, continued(run.settings, options))
