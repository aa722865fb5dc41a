"""Fixtures that several test files of this folder share."""

from __future__ import annotations

import experts_support
import pytest
import stages_support
from stopping import Stopper

from pdd_fast.progressive.context import RunContext
from pdd_fast.progressive.stages import distill
from pdd_fast.storage.run import Run


@pytest.fixture(scope="module")
def ctx() -> RunContext:
    return RunContext.prepare(experts_support.configuration())


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, int]:
    """An uninterrupted run, and how often it reported."""
    run = Run.create(tmp_path_factory.mktemp("finished") / "run", stages_support.configuration())
    counter = Stopper()
    distill(run, counter)
    return run, counter.count
