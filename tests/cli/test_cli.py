"""The command line: what it prints where, its exit statuses, one sentence for every error,
interrupts and resuming.
"""

from __future__ import annotations

import asyncio
import errno
import io
import itertools
import json
import os
import select
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import pytest
import tiny
import torch
from command import Outcome, call, call_main, process
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file

from pdd_fast import __version__, load_distilled
from pdd_fast._version import commit
from pdd_fast.cli import main as cli
from pdd_fast.settings import Config, recipe_names
from pdd_fast.storage.run import Run

STAGES, EXPERTS, ITERATIONS = (
    tiny.SETTINGS["stages"],
    tiny.SETTINGS["num_experts"],
    tiny.SETTINGS["iterations"],
)
CLASSES, TEST_IMAGES = 10, 359  # of the digits


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below ``folder``."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


@dataclass(frozen=True)
class Finished:
    """A finished run and what the command that made it gave back."""

    path: Path
    outcome: Outcome


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


# ---- help and version ----


@pytest.mark.parametrize(
    "arguments", [[], *([name] for name in cli.COMMANDS)], ids=lambda a: a[0] if a else "group"
)
@pytest.mark.parametrize("flag", ["-h", "--help"])
def test_help_goes_to_stdout(arguments: list[str], flag: str) -> None:
    outcome = call(*arguments, flag)
    assert outcome.status == 0
    assert outcome.err == ""
    assert outcome.out.startswith(f"Usage: {' '.join(['pdd-fast', *arguments])}")
    if not arguments:
        assert all(f"  {name} " in outcome.out for name in cli.COMMANDS)


@pytest.mark.parametrize("command", ["distill", "experts"])
def test_help_names_every_flag_with_its_default(command: str) -> None:
    text = " " + " ".join(call(command, "--help").out.partition("Options:")[2].split())
    for flag, default in (
        ("--dataset", Config.dataset),
        ("--stages", Config.stages),
        ("--ipc", Config.ipc),
        ("--method", Config.method),
        ("--recipe", "the dataset's"),
        ("--run-dir", "runs/DATA-ipc..."),
        ("--seed", Config.seed),
        ("--device", Config.device),
        ("--data-dir", Config.data_dir),
        ("--selection-split", Config.selection_split),
        ("--precision", Config.precision),
    ):
        assert f"[default: {default}]" in text.partition(f" {flag} ")[2].partition(" --")[0], flag
    for flag in ("--set KEY=VALUE", "--json", "--resume"):
        assert f" {flag} " in text


def test_recipes_are_listed_by_name_and_by_what_they_are_for() -> None:
    outcome = call("distill", "--recipe", "list")
    assert (outcome.status, outcome.err) == (0, "")
    lines = dict(line.split(maxsplit=1) for line in outcome.out.splitlines())
    assert list(lines) == recipe_names()
    assert lines["cifar10-ipc50"].startswith("CIFAR-10, 50 images a class in 5 stages")
    assert call("experts", "--recipe", "list").out == outcome.out


def test_version_is_the_packages() -> None:
    outcome = call("--version")
    assert (outcome.status, outcome.out, outcome.err) == (
        0,
        f"pdd-fast, version {__version__} (commit {commit()})\n",
        "",
    )


def test_a_bare_call_shows_the_help_and_is_wrong() -> None:
    outcome = call()
    assert (outcome.status, outcome.out) == (2, "")
    assert outcome.err == call("--help").out


def test_help_version_and_wrong_calls_import_no_torch() -> None:
    calls = [
        ["--help"],
        ["--version"],
        *([name, "--help"] for name in cli.COMMANDS),
        ["distill", "--recipe", "list"],
        ["nope"],
        ["distill", "--nope"],
    ]
    program = (
        "import sys\n"
        "from pdd_fast.cli.main import run\n"
        f"statuses = [run(call) for call in {calls!r}]\n"
        "heavy = [name for name in ('torch', 'numpy', 'matplotlib', 'sklearn', 'safetensors') if "
        "name in sys.modules]\n"
        "print(statuses, heavy)\n"
    )
    found = subprocess.run(
        [sys.executable, "-P", "-c", program], capture_output=True, text=True, check=True
    )
    assert found.stdout.splitlines()[-1] == f"{[0] * (len(calls) - 2) + [2, 2]} []"


# ---- a whole run ----


def test_a_run_makes_every_file_and_leaves_no_other(finished: Finished) -> None:
    assert finished.outcome.status == 0
    networks = [f"trajectory-{k:03d}.safetensors" for k in range(EXPERTS)]
    expected = {
        "config.json",
        "distilled.safetensors",
        "metrics.jsonl",
        "evaluation.json",
        "images.png",
        "accuracy.png",
        *(f"experts/{name}" for name in networks),
        *(f"stage-{s}/distilled.safetensors" for s in range(1, STAGES + 1)),
        *(f"stage-{s}/trajectories/{name}" for s in range(2, STAGES + 1) for name in networks),
    }
    assert set(contents(finished.path)) - {".lock"} == expected


def test_results_go_to_stdout_and_progress_to_stderr(finished: Finished) -> None:
    out, err = finished.outcome.out, finished.outcome.err
    assert out.startswith("Test accuracy on digits, percent, mean ± std over 2 fresh networks\n")
    header = out.splitlines()[2].replace("┃", " ").split()
    assert header == ["stage", "ipc", "steps", "pdd", "random", "last-union"]
    files = ["distilled.safetensors", "evaluation.json", "images.png", "accuracy.png"]
    assert out.splitlines()[-4:] == [str(finished.path / name) for name in files]
    for line in (
        "experts: 8/8 epochs",
        f"stage 1/{STAGES}: {ITERATIONS}/{ITERATIONS} iterations",
        f"transition to stage 2/{STAGES}: ",
        "evaluation: 6/6 networks",
    ):
        assert f"\n{line}" in f"\n{err}"
        assert line not in out
    assert " loss " in err
    assert "\x1b" not in out + err  # no control characters where there is no terminal


def test_config_holds_every_setting_and_the_versions(finished: Finished) -> None:
    stored = json.loads((finished.path / "config.json").read_text())
    assert stored["config"] == Config().to_dict() | stored["config"]
    assert set(stored["config"]) == set(Config().to_dict())
    assert {key: stored["config"][key] for key in tiny.SETTINGS} == tiny.SETTINGS
    assert stored["versions"]["pdd_fast"] == __version__
    assert stored["versions"]["torch"] == torch.__version__
    assert stored["versions"]["commit"] == commit()


def test_experts_hold_a_checkpoint_an_epoch_and_where_they_come_from(finished: Finished) -> None:
    for k in range(EXPERTS):
        with safe_open(
            finished.path / "experts" / f"trajectory-{k:03d}.safetensors", framework="pt"
        ) as file:
            checkpoints = file.get_tensor("checkpoints")
            metadata = json.loads(next(iter(file.metadata().values())))
        assert checkpoints.dtype == torch.float32
        assert checkpoints.dim() == 2
        assert len(checkpoints) == tiny.SETTINGS["expert_train_epochs"] + 1
        assert (checkpoints[1:] != checkpoints[:-1]).any(1).all()
        assert metadata["data"] == "digits"
        assert metadata["seed"] == 0
        assert metadata["network"]["width"] == tiny.SETTINGS["width"]


def test_the_distilled_set_holds_every_stage(finished: Finished) -> None:
    distilled = load_distilled(finished.path)
    assert distilled.images.shape == (STAGES * CLASSES, 1, 8, 8)
    assert torch.bincount(distilled.labels).tolist() == [STAGES] * CLASSES
    assert torch.bincount(distilled.stage)[1:].tolist() == [CLASSES] * STAGES
    assert distilled.learning_rates.shape == (STAGES,)
    assert {"data", "augmentation", "network"} <= set(distilled.metadata)
    for stage in range(1, STAGES + 1):
        union = load_distilled(finished.path / f"stage-{stage}" / "distilled.safetensors")
        assert torch.equal(union.images, distilled.union(stage).images)


def test_metrics_hold_an_object_an_iteration(finished: Finished) -> None:
    rows = [json.loads(line) for line in (finished.path / "metrics.jsonl").read_text().splitlines()]
    steps = [row for row in rows if "loss" in row]
    assert [(row["stage"], row["iteration"]) for row in steps] == [
        (s, i) for s in range(1, STAGES + 1) for i in range(1, ITERATIONS + 1)
    ]
    for row in steps:
        assert row["loss"] > 0
        assert row["seconds"] > 0
        assert row["memory"] > 1_000_000


def test_the_evaluation_has_exactly_its_format(finished: Finished) -> None:
    evaluation = json.loads((finished.path / "evaluation.json").read_text())
    assert set(evaluation) == {"protocol", "stages", "steps", "results", "paired"}
    assert evaluation["stages"] == STAGES
    assert len(evaluation["steps"]) == STAGES
    assert all(isinstance(count, int) and count > 0 for count in evaluation["steps"])
    assert evaluation["protocol"]["data"] == "digits"
    assert evaluation["protocol"]["images_per_class"] == [1, 2, 3]
    assert [result["name"] for result in evaluation["results"]] == ["pdd", "random", "last-union"]
    for result in evaluation["results"]:
        assert set(result) == {
            "name",
            "labels",
            "network",
            "seeds",
            "accuracy",
            "mean",
            "std",
            "ci95",
        }
        assert (result["labels"], result["network"]) == ("hard", "ConvNet")
        assert len(set(result["seeds"])) == 2
        assert [len(row) for row in result["accuracy"]] == [STAGES, STAGES]
        for percent in itertools.chain(*result["accuracy"]):
            assert percent * TEST_IMAGES / 100 == pytest.approx(
                round(percent * TEST_IMAGES / 100), abs=1e-6
            )
        columns = list(zip(*result["accuracy"], strict=True))
        assert result["mean"] == pytest.approx([statistics.fmean(column) for column in columns])
        assert result["std"] == pytest.approx([statistics.stdev(column) for column in columns])
    assert (
        len({tuple(result["seeds"]) for result in evaluation["results"]}) == 1
    )  # the same networks for all


def test_pictures_can_be_looked_at(finished: Finished) -> None:
    for name in ("images.png", "accuracy.png"):
        with Image.open(finished.path / name) as image:
            image.load()
            assert image.format == "PNG"
            assert min(image.size) >= 200
            assert len(image.convert("L").getcolors(256) or []) > 10  # not blank


def test_flags_and_set_say_the_same(here: Path) -> None:
    flags = {
        "dataset": "digits",
        "stages": 1,
        "ipc": 2,
        "seed": 3,
        "device": "cpu",
        "precision": "tf32",
        "data_dir": "x",
        "selection_split": "test",
    }
    named = [f"--{key.replace('_', '-')}={value}" for key, value in flags.items()]
    small = {
        "num_experts": 1,
        "expert_train_epochs": 1,
        "expert_epochs": 1,
        "max_start_epoch": 0,
        "width": 2,
        "depth": 1,
    }
    assignments = [f"--set={key}={value}" for key, value in small.items()]
    assert call("experts", *named, *assignments, "--run-dir", "by flags").status == 0
    assert (
        call("experts", *tiny.flags(**flags, **small), *assignments, "--run-dir", "by set").status
        == 0
    )
    stored = [
        json.loads((here / name / "config.json").read_text())["config"]
        for name in ("by flags", "by set")
    ]
    for config in stored:
        assert {key: config[key] for key in (*flags, *small)} == flags | small


def test_a_run_without_run_dir_is_named_by_what_it_is(here: Path) -> None:
    outcome = call("experts", *tiny.flags(seed=7, expert_train_epochs=3))
    assert outcome.status == 0
    assert (here / "runs" / "digits-ipc3-stages3-seed7" / "config.json").is_file()
    again = call("experts", *tiny.flags(seed=7, expert_train_epochs=3), "--resume")
    assert (again.status, again.out, again.err) == (0, outcome.out, "")


# ---- the other commands on it ----


def one_object(text: str) -> Any:
    """The JSON object that ``text`` is, on one line."""
    assert text.count("\n") == 1
    return json.loads(text)


def test_experts_then_distill_makes_the_same_run(finished: Finished, tmp_path: Path) -> None:
    path = tmp_path / "run"
    made = call("experts", *tiny.flags(), "--run-dir", path)
    assert made.status == 0
    assert made.out.startswith(f"{EXPERTS} experts of 4 epochs, selection accuracy ")
    assert made.out.splitlines()[-1] == str(path / "experts")
    assert not (path / "stage-1").exists()
    assert call("distill", "--resume", "--run-dir", path).status == 0
    expected = contents(finished.path)
    for name, found in contents(path).items():
        if name != "metrics.jsonl":  # it holds seconds
            assert found == expected[name], name


def test_experts_as_json(run: Path) -> None:
    outcome = call("experts", "--resume", "--run-dir", run, "--json")
    found = one_object(outcome.out)
    assert outcome.status == 0
    assert (found["run"], found["experts"]) == (str(run), EXPERTS)
    assert len(found["selection_accuracy"]) == EXPERTS


def test_resuming_a_finished_run_changes_nothing_and_works_nothing_out(run: Path) -> None:
    before = contents(run)
    outcome = call("distill", "--resume", "--run-dir", run, *tiny.flags())
    assert (outcome.status, outcome.err) == (
        0,
        "",
    )  # every piece of work would tell of its progress
    assert contents(run) == before | {".lock": b""}


def test_distill_as_json(run: Path) -> None:
    outcome = call("distill", "--resume", "--run-dir", run, "--json")
    found = one_object(outcome.out)
    assert outcome.status == 0
    assert found["run"] == str(run)
    assert all(Path(file).is_file() for file in found["files"])
    assert found["evaluation"] == json.loads((run / "evaluation.json").read_text())


def test_evaluate_with_other_repeats(run: Path) -> None:
    before = json.loads((run / "evaluation.json").read_text())
    outcome = call("evaluate", run, "--repeats", "3")
    after = json.loads((run / "evaluation.json").read_text())
    assert outcome.status == 0
    assert "mean ± std over 3 fresh networks" in outcome.out
    files = {run / name for name in ("evaluation.json", "images.png", "accuracy.png")}
    assert set(map(Path, outcome.out.splitlines()[-3:])) == files
    assert outcome.err.startswith("evaluation: 9/9 networks")
    for old, new in zip(before["results"], after["results"], strict=True):
        assert len(new["accuracy"]) == len(new["seeds"]) == 3
        assert new["accuracy"][:2] == old["accuracy"]


def test_evaluate_other_networks(run: Path) -> None:
    outcome = call("evaluate", run, "--repeats", "2", "--networks", "convnet, mlp", "--subsets")
    assert outcome.status == 0
    assert outcome.out.count("Test accuracy on digits") == 2
    assert "fresh networks (MLP)" in outcome.out
    assert "subsets" in outcome.out
    assert outcome.out.count("pdd − random in the end: ") == 2
    wrong = call("evaluate", run, "--networks", "mlq")
    assert wrong.status == 2
    assert "did you mean 'mlp'?" in wrong.sentence()
    call("evaluate", run)


def test_evaluate_as_json_and_against_another_run(run: Path) -> None:
    outcome = call("evaluate", run, "--repeats", "1", "--json", "--against", run, "--device", "cpu")
    found = one_object(outcome.out)
    assert outcome.status == 0
    assert found == json.loads((run / "evaluation.json").read_text())
    assert [result["name"] for result in found["results"]] == [
        "pdd",
        "random",
        "last-union",
        "against",
    ]
    assert found["results"][3]["accuracy"] == found["results"][2]["accuracy"]
    assert all(result["std"] == [0.0] * STAGES for result in found["results"])


def test_show_draws_and_prints_the_table(finished: Finished, run: Path) -> None:
    for name in ("images.png", "accuracy.png"):
        (run / name).unlink()
    outcome = call("show", run)
    assert (outcome.status, outcome.err) == (0, "")
    table = finished.outcome.out[: finished.outcome.out.index("└")]
    assert outcome.out.startswith(table)
    assert outcome.out.splitlines()[-2:] == [str(run / "images.png"), str(run / "accuracy.png")]
    assert contents(run) == contents(finished.path)
    found = one_object(call("show", run, "--json").out)
    assert found["evaluation"] == json.loads((run / "evaluation.json").read_text())


def test_show_takes_a_run_with_one_stage_of_three(run: Path) -> None:
    for name in ("distilled.safetensors", "evaluation.json", "images.png", "accuracy.png"):
        (run / name).unlink()
    shutil.rmtree(run / "stage-2")
    shutil.rmtree(run / "stage-3")
    outcome = call("show", run)
    assert (outcome.status, outcome.err) == (0, "")
    assert outcome.out == f"{run} has not been evaluated yet\n{run / 'images.png'}\n"
    assert one_object(call("show", run, "--json").out)["evaluation"] is None


# ---- wrong calls ----

WRONG = {  # what is wrong: arguments, and what the sentence has to name
    "unknown command": (["distil"], ["'distil'", "did you mean 'distill'"]),
    "unknown command like no other": (["xyz"], ["'xyz'", *cli.COMMANDS]),
    "unknown flag of the group": (["--verbos"], ["--verbos"]),
    "unknown flag": (["distill", "--dataste", "digits"], ["--dataste", "did you mean --dataset"]),
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
    "text", ["", "{", "[]", '{"config": {"nope": 1}}', '{"config": {"stages": "two"}}']
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


# ---- work that fails ----


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
    config["config"] |= {"lr_img": 1e38, "max_rollbacks": 0}
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


# ---- interrupts ----


def interrupt_after(
    monkeypatch: pytest.MonkeyPatch, function: str, calls: int, number: signal.Signals
) -> None:
    """This process gets signal ``number`` when ``function`` has been called ``calls`` times."""
    original = resolve_name(function)
    count = 0

    def counted(*arguments: Any, **options: Any) -> Any:
        nonlocal count
        value = original(*arguments, **options)
        count += 1
        if count == calls:
            signal.raise_signal(number)
        return value

    monkeypatch.setattr(function, counted)


def continuation(outcome: Outcome) -> list[str]:
    """The arguments of the command that an interrupted one says to continue with."""
    said, _, command = outcome.err.splitlines()[-1].partition("; continue with: ")
    assert said == "pdd-fast: interrupted"
    program, *arguments = shlex.split(command)
    assert program == "pdd-fast"
    return arguments


@pytest.mark.parametrize("calls", [1, 3, ITERATIONS + 8])
def test_ctrl_c_leaves_a_run_that_goes_on_with_the_same_bits(
    calls: int, finished: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "it's a run; with $all"
    interrupt_after(monkeypatch, "pdd_fast.storage.run.Metrics.append", calls, signal.SIGINT)
    outcome = call("distill", *tiny.flags(), "--run-dir", path)
    assert (outcome.status, outcome.out) == (130, "")
    assert not (path / "distilled.safetensors").exists()
    arguments = continuation(outcome)
    assert arguments == ["distill", "--resume", "--run-dir", str(path)]
    assert call(*arguments).status == 0
    expected = contents(finished.path)
    for name, found in contents(path).items():
        if name != "metrics.jsonl":  # it holds seconds
            assert found == expected[name], name
    rows = [
        [
            (row["stage"], row["iteration"], row.get("loss"))
            for row in map(json.loads, text.splitlines())
        ]
        for text in ((path / "metrics.jsonl").read_text(), expected["metrics.jsonl"].decode())
    ]
    assert rows[0] == rows[1]


def test_ctrl_c_before_anything_was_made_leaves_a_run_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupt_after(monkeypatch, "sklearn.datasets.load_digits", 1, signal.SIGINT)
    outcome = call("experts", *tiny.flags(), "--run-dir", tmp_path / "run")
    assert outcome.status == 130
    arguments = continuation(outcome)
    assert arguments[0] == "experts"
    assert call(*arguments).status == 0


def test_the_continuation_of_a_continuation_keeps_its_place_to_work(
    only_experts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupt_after(monkeypatch, "pdd_fast.storage.run.Metrics.append", 2, signal.SIGINT)
    outcome = call(
        "distill", "--resume", "--run-dir", only_experts, "--device", "auto", "--set", "seed=0"
    )
    assert outcome.status == 130
    expected = ["distill", "--resume", "--run-dir", str(only_experts), "--set", "device=auto"]
    assert continuation(outcome) == expected
    assert call(*expected).status == 0


def test_ctrl_c_while_evaluating_says_no_more_than_that(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = contents(run)
    interrupt_after(monkeypatch, "pdd_fast.evaluation.schedule.accuracies", 2, signal.SIGINT)
    outcome = call("evaluate", run)
    assert (outcome.status, outcome.out) == (130, "")
    assert outcome.err.splitlines()[-1] == "pdd-fast: interrupted"
    assert contents(run) == before


@pytest.mark.parametrize("entry", [call, call_main])
@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_terminated_command_exits_with_its_signal_and_can_be_continued(
    number: signal.Signals,
    status: int,
    entry: Callable[..., Outcome],
    finished: Finished,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = tmp_path / "run"
    interrupt_after(
        monkeypatch, "pathlib.Path.replace", 3, number
    )  # config.json, its data, an expert
    outcome = entry("experts", *tiny.flags(), "--run-dir", path)
    assert (outcome.status, outcome.out) == (status, "")
    assert [p.name for p in (path / "experts").iterdir()] == ["trajectory-000.safetensors"]
    assert call(*continuation(outcome)).status == 0
    for name, found in contents(path / "experts").items():
        assert found == (finished.path / "experts" / name).read_bytes()


SIGNALS = (signal.SIGTERM, signal.SIGHUP)


@pytest.fixture
def handlers() -> Iterator[None]:
    """Puts handlers back that a test has set."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("handlers")
@pytest.mark.parametrize("arguments", [("--version",), ("nope",), ("show", "nowhere")])
@pytest.mark.parametrize("entry", [call, call_main])
def test_the_callers_signal_handlers_are_put_back(
    entry: Callable[..., Outcome], arguments: tuple[str, ...]
) -> None:
    def theirs(*_: object) -> None:
        """A server's."""

    for number in SIGNALS:
        signal.signal(number, theirs)
    entry(*arguments)
    assert [signal.getsignal(number) for number in SIGNALS] == [theirs, theirs]


@pytest.mark.usefixtures("handlers")
def test_signals_that_the_caller_ignores_stay_ignored(
    finished: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # nohup
    path = tmp_path / "run"
    interrupt_after(monkeypatch, "pathlib.Path.replace", 2, signal.SIGHUP)
    assert call("experts", *tiny.flags(), "--run-dir", path).status == 0
    assert contents(path / "experts") == contents(finished.path / "experts")


def test_commands_run_in_threads_of_a_program_with_an_event_loop(
    finished: Finished, tmp_path: Path
) -> None:
    before = [signal.getsignal(number) for number in SIGNALS]

    async def serve() -> list[int]:
        jobs = [
            asyncio.to_thread(
                cli.run, ["distill", *tiny.flags(), "--run-dir", str(tmp_path / f"run {k}")]
            )
            for k in range(2)
        ]
        here = cli.run(["show", str(finished.path), "--json"])  # on the loop's own thread
        return [here, *await asyncio.gather(*jobs)]

    with redirect_stdout(io.StringIO()) as out, redirect_stderr(io.StringIO()):
        assert asyncio.run(serve()) == [0, 0, 0]
    assert out.getvalue().count("Test accuracy on digits") == 2
    assert [signal.getsignal(number) for number in SIGNALS] == before
    for k in range(2):
        found = (tmp_path / f"run {k}" / "distilled.safetensors").read_bytes()
        assert found == (finished.path / "distilled.safetensors").read_bytes()


def test_the_entry_point_ends_a_thread_with_the_status() -> None:
    seen: list[object] = []

    def work() -> None:
        try:
            cli.main(["nope"])
        except SystemExit as error:
            seen.append(error.code)

    with redirect_stderr(io.StringIO()) as err:
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    assert seen == [2]
    assert "no such command 'nope'" in err.getvalue()


@pytest.mark.parametrize("command", ["distill", "evaluate", "show"])
def test_a_picture_that_fails_does_not_fail_the_work(
    command: str, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise ValueError("no font")

    for name in ("images.png", "accuracy.png"):
        (run / name).unlink()
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", fail)
    arguments = {
        "distill": ["--resume", "--run-dir", run],
        "evaluate": [run, "--repeats", "1"],
        "show": [run],
    }[command]
    outcome = call(command, *arguments)
    assert outcome.status == (1 if command == "show" else 0)  # drawing is what show is for
    assert "Test accuracy on digits" in outcome.out
    assert f"pdd-fast: warning: {run / 'images.png'} could not be drawn: no font\n" in outcome.err
    assert f"pdd-fast: warning: {run / 'accuracy.png'} could not be drawn: no font\n" in outcome.err
    assert "images.png" not in outcome.out
    if command == "show":
        assert outcome.err.splitlines()[-1].startswith(
            "pdd-fast: images.png and accuracy.png could not be drawn"
        )


@pytest.mark.skipif(sys.platform != "linux", reason="other systems' file names are Unicode")
def test_class_folders_that_are_no_utf_8_go_through_a_whole_run(tmp_path: Path, here: Path) -> None:
    root = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9s"))
    colors = itertools.count(1)
    for part, count in (("train", 6), ("test", 3)):
        for name in (b"caf\xe8", b"caf\xe9"):
            folder = root / part / os.fsdecode(name)
            folder.mkdir(parents=True)
            for i in range(count):
                Image.new("L", (8, 8), next(colors) * 7).save(folder / f"{i}.png")
    path = here / "run"
    outcome = call_main("distill", *tiny.flags(dataset=f"imagefolder:{root}"), "--run-dir", path)
    assert outcome.status == 0, outcome.err
    assert r"Test accuracy on imagefolder:caf\xe9s" in outcome.out
    assert load_distilled(path).metadata["classes"] == [r"caf\xe8", r"caf\xe9"]
    assert (path / "images.png").stat().st_size > 0
    assert "warning" not in outcome.err
    assert call_main("evaluate", path, "--repeats", "1").status == 0
    assert call_main("distill", "--resume", "--run-dir", path).status == 0
    assert call_main("export", path, "--output", here / "out").status == 0


def test_the_entry_point_exits_with_the_status() -> None:
    assert call_main("--version") == call("--version")
    assert call_main("nope").status == 2


def test_a_terminal_without_the_tables_characters_gets_others(run: Path) -> None:
    outcome = call_main("show", run, encoding="ascii")
    assert (outcome.status, outcome.err) == (0, "")
    assert "| stage | " in outcome.out
    assert "mean ? std" in outcome.out


@pytest.mark.parametrize("closed", ["stdout", "stderr"])
def test_a_closed_stream_is_no_error(
    closed: str, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    streams = {"stdout": io.StringIO(), "stderr": io.StringIO()} | {closed: None}
    for name, stream in streams.items():
        monkeypatch.setattr(sys, name, stream)
    with pytest.raises(SystemExit, match="0"):
        cli.main(["evaluate", str(run), "--repeats", "1"])
    getattr(sys, closed).close()
    monkeypatch.undo()
    for name, stream in streams.items():
        if stream is not None:
            assert ("Test accuracy" if name == "stdout" else "evaluation: 3/3") in stream.getvalue()


# ---- in a process of its own ----


@pytest.mark.parametrize("ignored", [False, True], ids=["hangup", "nohup"])
def test_a_terminal_that_is_closed_leaves_a_run_to_continue(ignored: bool, tmp_path: Path) -> None:
    pty = pytest.importorskip("pty")
    path = tmp_path / "run"
    flags = tiny.flags(
        iterations=60 if ignored else 100_000,
        eval_every=0,
        ipc=1,
        stages=1,
        checkpoint_seconds=1000,
    )
    program = "from pdd_fast.cli.main import main; main()"
    arguments = [sys.executable, "-P", "-c", program, "distill", *flags, "--run-dir", str(path)]
    # A session of its own, whose terminal this is.
    leader = "import os, pty, signal, sys; ignored = sys.argv.pop(1) == 'True'"
    leader += (
        "; signal.signal(signal.SIGHUP, signal.SIG_IGN) if ignored else None; "
        "os.execv(sys.argv[1], sys.argv[1:])"
    )
    child, terminal = pty.fork()
    if child == 0:
        os.environ["OMP_NUM_THREADS"] = "1"
        os.execv(sys.executable, [sys.executable, "-c", leader, str(ignored), *arguments])
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if (path / "metrics.jsonl").exists() and (path / "metrics.jsonl").read_text().count(
            "loss"
        ) >= 5:
            break
        if select.select([terminal], [], [], 0.05)[0]:
            os.read(terminal, 4096)
    os.close(terminal)
    _, status = os.waitpid(child, 0)
    if ignored:
        # Results cannot be written to the terminal, which is a failure; the work is done.
        assert os.waitstatus_to_exitcode(status) != 129
        assert (path / "evaluation.json").exists()
        return
    assert os.waitstatus_to_exitcode(status) == 129
    assert (path / "stage-1" / "checkpoint.safetensors").exists()
    assert not (path / "distilled.safetensors").exists()


def test_the_printed_command_continues_an_interrupted_process(tmp_path: Path) -> None:
    path = tmp_path / "a run"
    # The stage takes minutes: the signal comes while it goes on.
    child = process(
        "distill", *tiny.flags(iterations=100_000, eval_every=0, ipc=1, stages=1), "--run-dir", path
    )
    deadline = time.monotonic() + 60
    while child.poll() is None and time.monotonic() < deadline:
        if (path / "metrics.jsonl").exists() and (path / "metrics.jsonl").read_text().count(
            "loss"
        ) >= 5:
            break
        time.sleep(0.05)
    for _ in range(
        6
    ):  # Python drops an interrupt that comes within a destructor; people press again
        child.send_signal(signal.SIGINT)
        with suppress(subprocess.TimeoutExpired):
            out, err = child.communicate(timeout=10)
            break
    assert (child.returncode, out) == (130, "")
    assert "Traceback" not in err or "Exception ignored" in err
    done = (path / "metrics.jsonl").read_text().count("loss")
    assert 5 <= done < 100_000
    arguments = continuation(Outcome(130, out, err))
    command = err.splitlines()[-1].partition("continue with: ")[2]

    # Near the end, so that the test is short: what a shell makes of the command is the question.
    config = json.loads((path / "config.json").read_text())
    config["config"]["iterations"] = done + 3
    (path / "config.json").write_text(json.dumps(config))
    program = Path(sys.executable).with_name("pdd-fast")
    if not program.exists():
        pytest.skip("the entry point was installed elsewhere")
    environment = os.environ | {
        "PATH": f"{program.parent}{os.pathsep}{os.environ['PATH']}",
        "OMP_NUM_THREADS": "1",
    }
    again = subprocess.run(
        command, shell=True, env=environment, capture_output=True, text=True, timeout=120
    )
    assert again.returncode == 0, again.stderr
    assert f"stage 1/1: {done + 3}/{done + 3} iterations" in again.stderr
    assert (path / "distilled.safetensors").exists()
    assert arguments == ["distill", "--resume", "--run-dir", str(path)]
    losses = [
        row
        for row in map(json.loads, (path / "metrics.jsonl").read_text().splitlines())
        if "loss" in row
    ]
    assert [row["iteration"] for row in losses] == list(range(1, done + 4))


class FullDisk(io.StringIO):
    """Where nothing more can be written."""

    def write(self, text: str) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("flags", [[], ["--json"]])
def test_results_that_cannot_be_written_fail_the_command(flags: list[str], run: Path) -> None:
    with redirect_stdout(FullDisk()), redirect_stderr(io.StringIO()) as err:
        status = cli.run(["show", str(run), *flags])
    assert (status, err.getvalue()) == (1, f"pdd-fast: {os.strerror(errno.ENOSPC)}\n")
