"""The command ``pdd-fast export``."""

from __future__ import annotations

from pathlib import Path

import click

from pdd_fast.cli import output
from pdd_fast.cli.options import PATH


@click.command(name="export")
@click.argument("run_dir", metavar="RUN", type=PATH)
@click.option("--output", "folder", type=PATH, required=True, help="Folder for the files.")
@click.option(
    "--raw", is_flag=True, help="Write multi-formation images as stored, without decoding them."
)
@click.option(
    "--json", "as_json", is_flag=True, help="Print one JSON object on stdout instead of text."
)
def command(run_dir: Path, folder: Path, raw: bool, as_json: bool) -> None:
    """Write the images of RUN (or of a distilled set's file) in the format of MTT's scripts.

    Every stage gets a folder with images_best.pt and labels_best.pt. The file settings.json holds
    the learning rates, the normalization and the augmentation.
    """
    from pdd_fast.storage.distilled import load_distilled
    from pdd_fast.storage.mtt_images import write_mtt

    files = write_mtt(load_distilled(run_dir), folder, raw)
    if as_json:
        output.print_json({"files": list(map(str, files))})
        return
    output.print_files(files)
