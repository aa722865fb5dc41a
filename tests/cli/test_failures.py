"""The command line: what it prints where, its exit statuses, one sentence for every error,
interrupts and resuming."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from cli_support import Finished, contents
from command import call


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """Writes beyond ``size`` bytes fail, as they do on a full disk."""
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


# ---- work that fails ----


def test_a_disk_that_is_full_from_the_start_leaves_no_run(here: Path) -> None:
    with largest_file(100):
        outcome = call("distill", *tiny.flags(), "--run-dir", "run")
    assert (outcome.status, outcome.out) == (1, "")
    assert "File too large" in outcome.sentence()
    assert "internal error" not in outcome.sentence()
    assert contents(here) == {}


def test_a_disk_that_fills_up_leaves_a_run_that_is_continued(
    finished: Finished, only_experts: Path
) -> None:
    size = (finished.path / "stage-1" / "distilled.safetensors").stat().st_size
    with largest_file(size - 1):
        outcome = call("distill", "--resume", "--run-dir", only_experts)
    assert (outcome.status, outcome.out) == (1, "")
    sentence = outcome.err.splitlines()[-1]  # after the progress
    assert "File too large" in sentence
    assert "internal error" not in sentence
    assert not list(only_experts.rglob("*.tmp"))
    command = shlex.split(sentence.partition("continue with: ")[2])
    assert command[0] == "pdd-fast"
    assert call(*command[1:]).status == 0
    expected = (finished.path / "distilled.safetensors").read_bytes()
    assert (only_experts / "distilled.safetensors").read_bytes() == expected


def test_a_place_that_cannot_be_written_is_named(here: Path) -> None:
    (here / "file").write_text("")
    outcome = call("distill", *tiny.flags(), "--run-dir", "file/run")
    assert (outcome.status, outcome.out) == (1, "")
    assert outcome.sentence() == "Not a directory: file/run"


def test_images_that_diverge_are_said_to(only_experts: Path) -> None:
    config = json.loads((only_experts / "config.json").read_text())
    config["settings"]["method"] |= {"lr_img": 1e38, "max_rollbacks": 0}
    (only_experts / "config.json").write_text(json.dumps(config))
    outcome = call("distill", "--resume", "--run-dir", only_experts)
    assert (outcome.status, outcome.out) == (1, "")
    assert outcome.err.count("\n") == 1
    for words in ("stage 1", "lr_img", "1e+38"):
        assert words in outcome.err


def test_an_internal_error_is_written_to_a_file(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*arguments: Any, **options: Any) -> None:
        raise ZeroDivisionError(
            "the numbers of Ångström\nand \udcff"
        )  # half of a character, as in a strange path

    (tmp_path / "details").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "details"))
    monkeypatch.setattr("pdd_fast.evaluation.evaluate.evaluate_run", broken)
    outcome = call("evaluate", run)
    assert (outcome.status, outcome.out) == (1, "")
    (file,) = (tmp_path / "details").iterdir()
    assert outcome.sentence() == (
        f"internal error: ZeroDivisionError: the numbers of Ångström; the details are in {file}"
    )
    text = file.read_text(encoding="utf-8")
    assert text.startswith("Traceback (most recent call last):")
    assert "in broken" in text
    assert r"and \udcff" in text

    monkeypatch.setenv("PDD_FAST_TRACEBACK", "1")
    outcome = call("evaluate", run)
    assert (outcome.status, outcome.out) == (1, "")
    assert outcome.err.startswith("Traceback (most recent call last):")
    assert "in broken" in outcome.err
    assert len(list((tmp_path / "details").iterdir())) == 1


def test_an_internal_error_where_no_file_can_be_written(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "nowhere"))
    monkeypatch.setattr(
        "pdd_fast.evaluation.evaluate.evaluate_run", lambda *arguments, **options: 1 // 0
    )
    outcome = call("evaluate", run)
    assert outcome.status == 1
    assert outcome.sentence().startswith("internal error: ZeroDivisionError")
    assert "PDD_FAST_TRACEBACK=1" in outcome.sentence()


def cuda_memory() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.\nMore.")


@pytest.mark.parametrize(
    "exhaust",
    [lambda: torch.empty(2**60), lambda: bytearray(2**62), cuda_memory],
    ids=["torch", "python", "cuda"],
)
def test_memory_that_runs_out_is_said_to(
    exhaust: Callable[[], Any], run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "pdd_fast.evaluation.evaluate.evaluate_run", lambda *arguments, **options: exhaust()
    )
    outcome = call("evaluate", run)
    assert (outcome.status, outcome.out) == (1, "")
    assert outcome.sentence().startswith("out of memory; lower ")
    assert "inner_steps" in outcome.sentence()
