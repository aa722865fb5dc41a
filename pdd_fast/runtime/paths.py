"""Convert paths as people write them to paths that hold from any working directory. Imports no
torch.
"""

from __future__ import annotations

import os
from pathlib import Path

FOLDER = "imagefolder:"  # of the names of datasets that are folders: imagefolder:DIR


def expanded(path: str | Path) -> Path:
    """Return ``path`` with a leading ``~`` replaced by the home directory, where that is known."""
    return Path(os.path.expanduser(path))


def readable(name: str) -> str:
    """A file's name as text that can be drawn and encoded: bytes that are not UTF-8 as \\xNN, so
    that names that differ still do.
    """
    return os.fsencode(name).decode("utf-8", errors="backslashreplace")


def absolute(path: str | Path) -> str:
    """Return ``path`` as it holds from any working directory. Symbolic links stay, unless a ``..``
    follows them.
    """
    whole = Path.cwd() / expanded(path)
    return str(whole.resolve() if ".." in whole.parts else whole)


def absolute_dataset(name: str) -> str:
    """Return the name of a dataset with its folder, where it is one, made absolute."""
    return FOLDER + absolute(name.removeprefix(FOLDER)) if name.startswith(FOLDER) else name


def short_dataset(name: str) -> str:
    """Return the name of a dataset with the last part of its folder alone, which does not say where
    it lies.
    """
    if not name.startswith(FOLDER):
        return name
    return FOLDER + readable(Path(absolute(name.removeprefix(FOLDER))).resolve().name)
