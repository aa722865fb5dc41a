"""Stop a run after a number of reports and continue it, as a killed process would be."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from pdd_fast.progressive.stages import distill
from pdd_fast.runtime.progress import Reporter, Task
from pdd_fast.settings import Settings
from pdd_fast.storage.run import Run


class Stopped(BaseException):
    """Like KeyboardInterrupt: no handler for ordinary errors sees it."""


class Stopper(Reporter):
    """Raises when the ``limit``-th unit of work is reported; counts them otherwise."""

    def __init__(self, limit: int | None = None) -> None:
        self.limit, self.count, self.tasks = limit, 0, list[str]()

    @contextmanager
    def task(self, name: str, total: int, unit: str, done: int = 0) -> Iterator[Task]:
        stopper = self
        self.tasks.append(name)

        class Counting(Task):
            def advance(self, count: int = 1, **values: Any) -> None:
                stopper.count += 1
                if stopper.count == stopper.limit:
                    raise Stopped

        yield Counting()


def stopped_and_continued(path: Path, config: Settings, limit: int) -> Run:
    """A run that was stopped at its ``limit``-th report and then finished by another process, as it
    were.
    """
    stopped = Run.create(path, config)
    with pytest.raises(Stopped):
        distill(stopped, Stopper(limit))
    distill(Run.open(stopped.path))
    return stopped


def bytes_of(run: Run) -> dict[str, bytes]:
    """Every file that the result consists of."""
    return {
        str(p.relative_to(run.path)): p.read_bytes()
        for p in sorted(run.path.rglob("*.safetensors"))
    }
