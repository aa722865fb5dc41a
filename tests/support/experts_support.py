"""Helpers of the tests of experts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import tiny
from torch import Tensor

from pdd_fast.progressive.context import RunContext
from pdd_fast.progressive.experts import make_experts
from pdd_fast.runtime.progress import SILENT, Reporter, Task
from pdd_fast.settings import Settings, resolve
from pdd_fast.storage.run import Run

EPOCHS, EXPERTS = 4, 2


def configuration(**changes: Any) -> Settings:
    settings = {
        "num_experts": EXPERTS,
        "expert_train_epochs": EPOCHS,
        "expert_momentum": 0.5,
        "checkpoint_seconds": 0,
    }
    return resolve(**(tiny.SETTINGS | settings | changes))


class Interrupted(BaseException):
    """Like KeyboardInterrupt: no handler for ordinary errors sees it."""


class Recorder(Reporter):
    """Keeps what it is told; raises at the ``limit``-th epoch that is finished."""

    def __init__(self, limit: int | None = None) -> None:
        self.limit, self.epochs, self.totals, self.advances = (
            limit,
            0,
            list[tuple[int, int]](),
            list[int](),
        )
        self.values: list[dict[str, Any]] = []

    @contextmanager
    def task(self, name: str, total: int, unit: str, done: int = 0) -> Iterator[Task]:
        recorder = self
        recorder.totals.append((total, done))

        class Recording(Task):
            def advance(self, count: int = 1, **values: Any) -> None:
                recorder.advances.append(count)
                recorder.values.append(values)
                recorder.epochs += "network" in values
                if recorder.epochs == recorder.limit:
                    raise Interrupted

        yield Recording()


def made(path: Path, config: Settings, reporter: Reporter = SILENT) -> Run:
    run = Run.create(path, config)
    make_experts(run, reporter)
    return run


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def interrupt(path: Path, config: Settings, limit: int) -> Run:
    run = Run.create(path, config)
    with pytest.raises(Interrupted):
        make_experts(run, Recorder(limit))
    return run


def starting(ctx: RunContext) -> Callable[[range], Tensor]:
    """Initial parameters of a group of experts."""
    return lambda group: ctx.initial_state("expert", group).theta
