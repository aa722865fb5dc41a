"""Progress reports of long work, independent of who receives them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class Task:
    """Countable piece of work, for example the iterations of a stage."""

    def advance(self, count: int = 1, **values: Any) -> None:
        """Report ``count`` more finished units, with ``values`` (loss, accuracy, ...) to show."""


class Reporter:
    """Receiver of progress that ignores it; the command line's subclass shows bars."""

    @contextmanager
    def task(self, name: str, total: int, unit: str, done: int = 0) -> Iterator[Task]:
        """Yield a task of ``total`` units, of which an earlier process finished ``done``."""
        yield Task()

    def message(self, text: str) -> None:
        """Report a sentence worth reading once."""


SILENT = Reporter()
