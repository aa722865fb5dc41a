"""Paths as people write them, made valid in any working directory; imports no torch."""

from __future__ import annotations

import os
from pathlib import Path

FOLDER = "imagefolder:"  # prefix of datasets that are folders: imagefolder:DIR


def expanded(path: str | Path) -> Path:
    """Return ``path`` with a leading ``~`` replaced by the home directory, if that is known."""
    return Path(os.path.expanduser(path))


def readable(name: str) -> str:
    r"""Return a file's name as text that can be displayed and encoded.

    Bytes that are not UTF-8 become \xNN, so that different names stay different.
    """
    return os.fsencode(name).decode("utf-8", errors="backslashreplace")


def absolute(path: str | Path) -> str:
    """Return ``path`` as an absolute path.

    Symbolic links stay, unless a ``..`` follows them.
    """
    whole = Path.cwd() / expanded(path)
    return str(whole.resolve() if ".." in whole.parts else whole)


def absolute_dataset(name: str) -> str:
    """Return the name of a dataset with its folder, if it has one, made absolute."""
    return FOLDER + absolute(name.removeprefix(FOLDER)) if name.startswith(FOLDER) else name


def short_dataset(name: str) -> str:
    """Return the name of a dataset with only the last part of its folder.

    The result does not reveal where the folder is.
    """
    if not name.startswith(FOLDER):
        return name
    return FOLDER + readable(Path(absolute(name.removeprefix(FOLDER))).resolve().name)
