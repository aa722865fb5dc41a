"""The command ``pdd-fast export``."""

from __future__ import annotations

from pathlib import Path

import click

from pdd_fast.cli import output
from pdd_fast.cli.options import PATH


@click.command(name="export")
@click.argument("run_dir", metavar="RUN", type=PATH)
@click.option("--output", "folder", type=PATH, required=True, help="Where the files go.")
@click.option(
    "--raw", is_flag=True, help="Images that hold several as they are stored, not what they hold."
)
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout, for machines.")
def command(run_dir: Path, folder: Path, raw: bool, as_json: bool) -> None:
    """Write the images of RUN (or of a distilled set's file) as MTT's scripts store theirs.

    For every stage a folder with images_best.pt and labels_best.pt; rates, normalization and
    augmentation in settings.json.
    """
    from pdd_fast.storage.distilled import load_distilled
    from pdd_fast.storage.mtt_images import write_mtt

    files = write_mtt(load_distilled(run_dir), folder, raw)
    if as_json:
        output.print_json({"files": list(map(str, files))})
        return
    output.print_files(files)
