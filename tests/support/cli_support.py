"""Helpers of the tests of cli."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import tiny
from command import Outcome

STAGES, EXPERTS, ITERATIONS = (
    tiny.SETTINGS["stages"],
    tiny.SETTINGS["num_experts"],
    tiny.SETTINGS["iterations"],
)


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below ``folder``."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


@dataclass(frozen=True)
class Finished:
    """A finished run and what the command that made it gave back."""

    path: Path
    outcome: Outcome
