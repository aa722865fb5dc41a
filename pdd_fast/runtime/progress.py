"""How long work tells of its progress without knowing who listens."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class Task:
    """One countable piece of work, e.g. the iterations of a stage."""

    def advance(self, count: int = 1, **values: Any) -> None:
        """``count`` more units are done; ``values`` (loss, accuracy, ...) are worth showing beside
        the bar.
        """


class Reporter:
    """Receives progress; this one ignores it. The command line's shows bars, tests may record."""

    @contextmanager
    def task(self, name: str, total: int, unit: str, done: int = 0) -> Iterator[Task]:
        """A task of ``total`` units, ``done`` of which were finished by an earlier process."""
        yield Task()

    def message(self, text: str) -> None:
        """A sentence worth reading once."""


SILENT = Reporter()
