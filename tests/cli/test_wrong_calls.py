"""The command line: what it prints where, its exit statuses, one sentence for every error,
interrupts and resuming."""

from __future__ import annotations

import json
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from cli_support import STAGES, contents
from command import call
from safetensors.torch import save_file

from pdd_fast import load_distilled
from pdd_fast.cli import main as cli
from pdd_fast.storage.run import Run

WRONG = {  # what is wrong: arguments, and what the sentence has to name
    "unknown command": (["distil"], ["'distil'", "did you mean 'distill'"]),
    "unknown command like no other": (["xyz"], ["'xyz'", *cli.COMMANDS]),
    "unknown flag of the group": (["--verbos"], ["--verbos"]),
    "unknown flag": (["distill", "--dataste", "digits"], ["--dataste", "did you mean --dataset"]),
    "flag of before 0.1": (["distill", "--base", "idc"], ["option --base; use --method; "]),
    "flag of before 0.1, ablate": (
        ["ablate", "--select", "test"],
        ["option --select; use --selection-split; "],
    ),
    "flag of before 0.1, bench": (
        ["bench", "--contender", "ours"],
        ["option --contender; use --implementation; "],
    ),
    "flag of before 0.1, which is none now": (
        ["distill", "--guard", "3"],
        ["option --guard; use --set max_rollbacks=VALUE; "],
    ),
    "flag of before 0.1 of another command": (["evaluate", "nowhere", "--base", "idc"], ["--base"]),
    "setting of before 0.1 with a flag": (
        ["distill", "--set", "base=idc"],
        ["unknown setting 'base'; it is called 'method': use --method"],
    ),
    "setting of before 0.1": (
        ["distill", "--set", "guard=3"],
        ["unknown setting 'guard'; it is called 'max_rollbacks'"],
    ),
    "flag without its value": (["distill", "--stages"], ["--stages"]),
    "not a number": (["distill", "--stages", "many"], ["--stages", "'many'"]),
    "not a choice": (
        ["distill", "--selection-split", "train"],
        ["--selection-split", "'train'", "validation"],
    ),
    "unknown method": (["distill", "--method", "mt"], ["method", "'mt'", "mtt"]),
    "an argument too many": (["distill", "digits"], ["digits"]),
    "no RUN": (["evaluate"], ["RUN"]),
    "unknown dataset": (
        ["distill", "--dataset", "cifar"],
        ["dataset", "'cifar'", "did you mean 'cifar1"],
    ),
    "unknown recipe": (
        ["distill", "--recipe", "digit"],
        ["recipe", "'digit'", "did you mean 'digits'"],
    ),
    "unknown setting": (
        ["distill", "--set", "iteration=3"],
        ["'iteration'", "did you mean 'iterations'"],
    ),
    "setting without value": (["distill", "--set", "iterations"], ["KEY=VALUE", "'iterations'"]),
    "setting without name": (["distill", "--set", "=3"], ["KEY=VALUE", "'=3'"]),
    "setting of a wrong type": (
        ["distill", "--set", "iterations=few"],
        ["iterations", "'few'", "whole number"],
    ),
    "setting that is no number": (["distill", "--set", "lr_img=nan"], ["lr_img", "nan"]),
    "setting out of range": (
        ["distill", "--set", "iterations=-1"],
        ["iterations", "at least 0", "-1"],
    ),
    "setting given twice": (["distill", "--seed", "1", "--set", "seed =2"], ["seed", "1", "2"]),
    "negative seed": (["distill", "--seed", "-1"], ["seed", "at least 0", "-1"]),
    "more stages than images": (
        ["distill", "--stages", "4", "--ipc", "3"],
        ["stages", "ipc", "4", "3"],
    ),
    "more images than a class has": (["distill", "--ipc", "500"], ["ipc", "500", "class '"]),
    "too deep for the images": (["distill", "--set", "depth=7"], ["depth", "at most 3", "7"]),
    "no such folder": (
        ["distill", "--dataset", "imagefolder:nowhere"],
        ["imagefolder:nowhere", "train"],
    ),
    "no such data": (["distill", "--dataset", "mnist", "--data-dir", "nowhere"], ["'mnist'"]),
    "not a precision": (["distill", "--precision", "fp8"], ["--precision", "'fp8'", "bfloat16"]),
    "not a precision, set": (
        ["distill", "--set", "precision=fp8"],
        ["precision", "'fp8'", "bfloat16"],
    ),
    "not a graph": (["distill", "--set", "graph=on"], ["graph", "'on'", "auto or off"]),
    "no group": (["distill", "--set", "side_by_side=-1"], ["side_by_side", "at least 0", "-1"]),
    "device that is none": (["distill", "--device", "gpu"], ["device", "'gpu'", "cuda:N"]),
    "GPU that is not there": (["distill", "--device", "cuda:99"], ["cuda:99"]),
    "nothing to resume": (["distill", "--resume", "--run-dir", "nowhere"], ["nowhere", "--resume"]),
    "RUN that is not there": (["evaluate", "nowhere"], ["nowhere", "config.json"]),
    "networks that are none": (["evaluate", "nowhere", "--networks", ""], ["nowhere"]),
    "RUN that is not there to show": (["show", "nowhere"], ["nowhere", "config.json"]),
}


# ---- wrong calls ----


@pytest.mark.parametrize(("arguments", "named"), WRONG.values(), ids=list(WRONG))
def test_a_wrong_call_is_one_sentence_and_leaves_nothing(
    arguments: list[str], named: list[str], here: Path
) -> None:
    outcome = call(*arguments)
    assert (outcome.status, outcome.out) == (2, "")
    for words in named:
        assert words in outcome.sentence()
    assert contents(here) == {}


def test_the_corrected_call_finds_its_place_free(here: Path) -> None:
    wrong = call("experts", *tiny.flags(device="cuda:99"), "--run-dir", "run")
    assert wrong.status == 2
    assert list(here.iterdir()) == []
    assert call("experts", *tiny.flags(), "--run-dir", "run").status == 0


def test_a_run_that_exists_is_not_touched(run: Path) -> None:
    before = contents(run)
    for command in ("distill", "experts"):
        outcome = call(command, *tiny.flags(seed=1), "--run-dir", run)
        assert outcome.status == 2
        assert str(run) in outcome.sentence()
        assert "--resume" in outcome.sentence()
    assert contents(run) == before


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_a_place_that_is_taken_is_not_touched(kind: str, here: Path) -> None:
    if kind == "file":
        (here / "place").write_text("mine")
    else:
        (here / "place").mkdir()
        (here / "place" / "mine.txt").write_text("mine")
    before = contents(here)
    outcome = call("distill", *tiny.flags(), "--run-dir", "place")
    assert outcome.status == 2
    assert outcome.sentence().startswith("place exists")
    assert "--run-dir" in outcome.sentence()
    for arguments in (
        ["show", "place"],
        ["evaluate", "place"],
        ["distill", "--resume", "--run-dir", "place"],
    ):
        outcome = call(*arguments)
        assert outcome.status == 2
        assert "place" in outcome.sentence()
    assert contents(here) == before


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--ipc", "6"], ["ipc", "3", "6"]),
        (["--set", "lr_img=11"], ["lr_img", "10", "11"]),
        (["--set", "iterations=9", "--seed", "0"], ["iterations", "4", "9"]),
        (["--recipe", "digits"], ["--recipe", "--resume"]),
        (["--set", "iteration=9"], ["'iteration'", "'iterations'"]),
        (["--set", "width=wide"], ["width", "'wide'"]),
    ],
    ids=lambda value: value[1] if value[0].startswith("-") else None,
)
def test_a_run_is_not_resumed_with_another_setting(
    flags: list[str], named: list[str], run: Path
) -> None:
    before = contents(run)
    outcome = call("distill", "--resume", "--run-dir", run, *flags)
    assert (outcome.status, outcome.out) == (2, "")
    for words in named:
        assert words in outcome.sentence()
    assert contents(run) == before


def test_a_run_is_resumed_with_another_place_to_work(run: Path) -> None:
    before = contents(run)
    flags = ["--device", "auto", "--data-dir", "elsewhere"]
    changes = (
        "checkpoint_seconds=1",
        "side_by_side=2",
        "graph=off",
        "memory=auto",
        "memory_limit=0.5",
    )
    flags += [f"--set={setting}" for setting in changes]
    assert call("distill", "--resume", "--run-dir", run, *flags).status == 0
    assert contents(run) == before | {".lock": b""}
    outcome = call("distill", "--resume", "--run-dir", run, "--device", "gpu")
    assert outcome.status == 2
    assert "'gpu'" in outcome.sentence()


@pytest.mark.parametrize("command", ["evaluate", "show"])
def test_a_run_without_a_finished_stage_is_continued_first(
    command: str, only_experts: Path
) -> None:
    outcome = call(command, only_experts)
    assert (outcome.status, outcome.out) == (2, "")
    assert str(only_experts) in outcome.sentence()
    assert "pdd-fast distill --resume" in outcome.sentence()


@pytest.mark.parametrize("command", ["evaluate", "show"])
@pytest.mark.parametrize("damage", ["empty", "cut", "noise", "foreign", "shape"])
def test_a_damaged_distilled_set_is_named(command: str, damage: str, run: Path) -> None:
    for file in (run / "distilled.safetensors", run / f"stage-{STAGES}" / "distilled.safetensors"):
        whole = file.read_bytes()
        if damage == "foreign":
            save_file({"images": torch.zeros(2)}, file)
        elif damage == "shape":
            metadata = {"pdd_fast": json.dumps({"normalization": {"mean": [0.0], "std": [1.0]}})}
            tensors = {
                name: torch.ones(4) for name in ("images", "labels", "stage", "learning_rates")
            }
            save_file(tensors, file, metadata=metadata)
        else:
            file.write_bytes(
                {"empty": b"", "cut": whole[: len(whole) // 2], "noise": b"\xff" * 500}[damage]
            )
    outcome = call(command, run)
    assert (outcome.status, outcome.out) == (2, "")
    assert str(run) in outcome.sentence()
    assert "distilled.safetensors" in outcome.sentence()


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        '{"config": {"nope": 1}}',
        '{"config": {"stages": "two"}}',
        '{"settings": {"nope": 1}}',
        '{"settings": {"stages": "two"}}',
    ],
)
def test_a_damaged_configuration_is_named(text: str, run: Path) -> None:
    (run / "config.json").write_text(text)
    for arguments in (["show"], ["evaluate"], ["distill", "--resume", "--run-dir"]):
        outcome = call(*arguments, run)
        assert (outcome.status, outcome.out) == (2, "")
        assert "config.json" in outcome.sentence()


def test_against_has_to_be_on_the_same_data(run: Path, tmp_path: Path) -> None:
    before = contents(run)
    distilled = load_distilled(run)
    other = tmp_path / "other.safetensors"
    replace(distilled, metadata=distilled.metadata | {"data": "mnist"}).save(other)
    outcome = call("evaluate", run, "--against", other)
    assert (outcome.status, outcome.out) == (2, "")
    for words in ("--against", "digits", "mnist", str(other)):
        assert words in outcome.sentence()
    outcome = call("evaluate", run, "--against", tmp_path / "nowhere")
    assert outcome.status == 2
    assert str(tmp_path / "nowhere") in outcome.sentence()
    assert contents(run) == before


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--repeats", "0"], ["repeats", "at least 1", "0"]),
        (["--repeats", "some"], ["--repeats", "'some'"]),
        (["--device", "cuda:99"], ["cuda:99"]),
    ],
)
def test_evaluate_refuses_what_cannot_be(flags: list[str], named: list[str], run: Path) -> None:
    before = contents(run)
    outcome = call("evaluate", run, *flags)
    assert (outcome.status, outcome.out) == (2, "")
    for words in named:
        assert words in outcome.sentence()
    assert contents(run) == before


def test_a_run_that_another_process_works_on_is_left_to_it(run: Path) -> None:
    before = contents(run)
    with Run.open(run).lock():
        for command in ("distill", "experts"):
            outcome = call(command, "--resume", "--run-dir", run)
            assert (outcome.status, outcome.out) == (2, "")
            assert outcome.sentence() == f"{run} is in use by another process"
    assert contents(run) == before | {".lock": b""}


def test_a_new_run_that_another_process_took_up_is_left_to_it(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with ExitStack() as other:

        def taken(run: Run, reporter: Any) -> None:
            other.enter_context(run.lock())
            with run.lock():
                raise AssertionError("locked twice")

        monkeypatch.setattr("pdd_fast.progressive.experts.make_experts", taken)
        outcome = call("experts", *tiny.flags(), "--run-dir", "run")
    assert outcome.status == 2
    assert outcome.sentence() == "run is in use by another process"
    assert (here / "run" / "config.json").exists()
