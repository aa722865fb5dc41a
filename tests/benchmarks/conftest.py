"""Fixtures that several test files of this folder share."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from bench_command_support import MACHINE, Answer

from pdd_fast.benchmarks import machine, measure, processes, roofline


@pytest.fixture
def answers(monkeypatch: pytest.MonkeyPatch) -> Callable[[Answer], None]:
    """Puts answers in the place of processes."""

    def put(answer: Answer) -> None:
        def run(arguments: list[str], limit: float) -> dict[str, Any]:
            told = json.loads(arguments[-1])
            assert Path(told["scratch"]).is_dir()
            assert told["device"] == "cpu"
            return answer(told["case"], told["implementation"])

        monkeypatch.setattr(processes, "run", run)
        monkeypatch.setattr(
            machine, "ask", lambda with_gpu, threads: MACHINE | {"threads": threads or 2}
        )

    return put


@pytest.fixture(autouse=True)
def _flags_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    """A benchmark sets torch's flags for its whole process, which here is that of all tests."""
    for module in (measure, roofline):
        monkeypatch.setattr(module, "set_precision", lambda name: None)
