"""The command ``pdd-fast experts``."""

from __future__ import annotations

from typing import Any

import click

from pdd_fast.cli import output, progress
from pdd_fast.cli.distill import begun
from pdd_fast.cli.options import run_options


@click.command(name="experts")
@run_options
@click.option("--resume", is_flag=True, help="Continue the run in --run-dir.")
def command(resume: bool, **options: Any) -> None:
    """Train and store expert trajectories, and nothing else.

    `pdd-fast distill --resume --run-dir DIR` continues the run.
    """
    with begun("experts", resume, **options) as run:
        from pdd_fast.progressive.experts import make_experts, stored_experts

        make_experts(run, progress.reporter())
        found = stored_experts(run)
    # Files in MTT's format do not hold it.
    reached = [
        t.metadata["selection_accuracy"] for t in found if "selection_accuracy" in t.metadata
    ]
    if options["as_json"]:
        output.print_json(
            {"run": str(run.path), "experts": len(found), "selection_accuracy": reached}
        )
        return
    span = f", selection accuracy {min(reached):.1f} to {max(reached):.1f} %" if reached else ""
    print(f"{len(found)} experts of {found[0].epochs} epochs{span}")
    output.print_files([found[0].path.parent])
