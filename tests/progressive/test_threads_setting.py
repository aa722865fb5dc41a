"""The setting ``threads``: it holds for the work of a run, and the process keeps its own number."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from pdd_fast.evaluation.evaluate import evaluate_run
from pdd_fast.progressive.experts import make_experts
from pdd_fast.progressive.stages import distill
from pdd_fast.runtime.progress import Reporter, Task
from pdd_fast.settings import resolve
from pdd_fast.storage.run import Run


class Watching(Reporter):
    """Reporter that records the number of threads at the beginning of each task."""

    def __init__(self) -> None:
        self.seen: set[int] = set()

    @contextmanager
    def task(self, name: str, total: int, unit: str, done: int = 0) -> Iterator[Task]:
        self.seen.add(torch.get_num_threads())
        yield Task()


@pytest.mark.parametrize(("setting", "used"), [(0, 3), (2, 2)])
def test_it_holds_during_the_work_and_not_after_it(tmp_path: Path, setting: int, used: int) -> None:
    torch.set_num_threads(3)
    run = Run.create(tmp_path / "run", resolve(**(tiny.of("mtt") | {"threads": setting})))
    for work in (make_experts, distill, evaluate_run):
        call: Callable[..., Any] = work
        reporter = Watching()
        call(run, reporter)
        assert reporter.seen == {used}
        assert torch.get_num_threads() == 3


def test_an_error_gives_the_process_its_threads_back(tmp_path: Path) -> None:
    torch.set_num_threads(3)

    class Failing(Reporter):
        @contextmanager
        def task(self, name: str, total: int, unit: str, done: int = 0) -> Iterator[Task]:
            raise ValueError("as a reporter may")
            yield Task()

    run = Run.create(tmp_path / "run", resolve(**(tiny.of("mtt") | {"threads": 2})))
    with pytest.raises(ValueError, match="as a reporter may"):
        make_experts(run, Failing())
    assert torch.get_num_threads() == 3
