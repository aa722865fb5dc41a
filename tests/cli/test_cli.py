"""The command line: what it prints where, its exit statuses, one sentence for every error,
interrupts and resuming."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from cli_support import EXPERTS, ITERATIONS, STAGES, Finished, contents
from command import call
from PIL import Image
from safetensors import safe_open

from pdd_fast import __version__, load_distilled, recipes
from pdd_fast._version import commit
from pdd_fast.cli import main as cli
from pdd_fast.settings import Settings, default, from_dict

CLASSES, TEST_IMAGES = 10, 359  # of the digits


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
    for flag, wanted in (
        ("--dataset", default("dataset")),
        ("--stages", default("stages")),
        ("--ipc", default("ipc")),
        ("--method", default("method")),
        ("--recipe", "the dataset's"),
        ("--run-dir", "runs/DATA-ipc..."),
        ("--seed", default("seed")),
        ("--device", default("device")),
        ("--data-dir", default("data_dir")),
        ("--selection-split", default("selection_split")),
        ("--precision", default("precision")),
    ):
        assert f"[default: {wanted}]" in text.partition(f" {flag} ")[2].partition(" --")[0], flag
    for flag in ("--set KEY=VALUE", "--json", "--resume"):
        assert f" {flag} " in text


def test_recipes_are_listed_by_name_and_by_what_they_are_for() -> None:
    outcome = call("distill", "--recipe", "list")
    assert (outcome.status, outcome.err) == (0, "")
    lines = dict(line.split(maxsplit=1) for line in outcome.out.splitlines())
    assert list(lines) == recipes.names()
    assert lines["cifar10-ipc50"].startswith("CIFAR-10, 50 images per class in 5 stages")
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
    whole = Settings().to_dict()
    assert set(stored["settings"]) == set(whole)
    assert set(stored["settings"]["method"]) == set(whole["method"])
    flat = from_dict(stored["settings"]).flat()
    assert {key: flat[key] for key in tiny.SETTINGS} == tiny.SETTINGS
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
        from_dict(json.loads((here / name / "config.json").read_text())["settings"]).flat()
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


def one_object(text: str) -> Any:
    """The JSON object that ``text`` is, on one line."""
    assert text.count("\n") == 1
    return json.loads(text)


# ---- the other commands on it ----


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


@pytest.mark.parametrize(
    ("environment", "imported", "spins"),
    [
        ({}, False, "3000"),
        ({"GOMP_SPINCOUNT": "7"}, False, "7"),
        ({"OMP_WAIT_POLICY": "active"}, False, None),
        ({}, True, None),
    ],
)
def test_idle_threads_of_torch_sleep_soon_unless_the_environment_or_the_process_decided(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], imported: bool, spins: str | None
) -> None:
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        monkeypatch.setenv(name, "")  # so that the environment is restored afterwards
        monkeypatch.delenv(name)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    if not imported:
        monkeypatch.delitem(sys.modules, "torch", raising=False)
    with pytest.raises(SystemExit) as ended:
        cli.main(["--version"])
    assert ended.value.code == 0
    assert os.environ.get("GOMP_SPINCOUNT") == spins
