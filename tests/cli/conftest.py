"""Fixtures that several test files of this folder share."""

from __future__ import annotations

import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
from cli_support import Finished
from command import call
from output_support import Clock

from pdd_fast.cli import progress


@pytest.fixture(autouse=True)
def _hangup_is_not_ignored() -> Iterator[None]:
    """Undo nohup for a test and its processes: the command line leaves an ignored signal alone."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    path = tmp_path_factory.mktemp("finished") / "run"
    return Finished(path, call("distill", *tiny.flags(), "--run-dir", path))


@pytest.fixture
def run(finished: Finished, tmp_path: Path) -> Path:
    """A copy of the finished run that a test may change."""
    return Path(shutil.copytree(finished.path, tmp_path / "a run"))


@pytest.fixture
def only_experts(finished: Finished, tmp_path: Path) -> Path:
    """A run that stopped before its first stage."""
    path = tmp_path / "only experts"
    shutil.copytree(finished.path / "experts", path / "experts")
    shutil.copy(finished.path / "config.json", path)
    return path


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory."""
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=clock))
    return clock
