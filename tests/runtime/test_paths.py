"""Paths: runs in other working directories, data that have moved, home directories."""

from __future__ import annotations

import io
import json
import shlex
import shutil
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from photographs import photographs
from PIL import Image

from pdd_fast import load_distilled
from pdd_fast.cli import main as cli
from pdd_fast.runtime import paths
from pdd_fast.runtime.files import read_tensors, save_tensors
from pdd_fast.settings import Settings, absolute
from pdd_fast.storage.run import Run
from pdd_fast.storage.trajectories import Trajectory, write_trajectory

SMALL = {
    "stages": 2,
    "ipc": 2,
    "num_experts": 1,
    "expert_train_epochs": 3,
    "iterations": 1,
    "eval_networks": 1,
    "eval_epochs": 1,
    "transition_epochs": 1,
    "union_epochs": 1,
    "repeats": 1,
    "augment": "none",
}


def call(*arguments: str | Path) -> tuple[int, str]:
    """The command line in this process: its status and what it wrote to stderr."""
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()) as err:
        status = cli.run([str(a) for a in arguments])
    return status, err.getvalue()


def flags(**changes: Any) -> list[str]:
    return tiny.flags(**(SMALL | changes))


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a folder of images, birds."""
    photographs(tmp_path / "here" / "birds", count=6)
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


@pytest.fixture
def begun(here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run that has its experts, made with relative paths; the working directory is another one
    since.
    """
    assert call("experts", *flags(dataset="imagefolder:birds"), "--run-dir", "run")[0] == 0
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    return here / "run"


def stored(run: Path) -> dict[str, Any]:
    return json.loads((run / "config.json").read_text())


def without_record(run: Path, **settings: Any) -> None:
    """Makes the files of a run what they were before there were fingerprints."""
    content = stored(run)
    content.pop("data")
    content["settings"] |= settings
    (run / "config.json").write_text(json.dumps(content))
    for path in (run / "experts").iterdir():
        trajectory = Trajectory(path)
        vectors = [trajectory.checkpoint(epoch) for epoch in range(trajectory.epochs + 1)]
        kept = {
            key: value
            for key, value in trajectory.metadata.items()
            if key not in ("fingerprint", "classes")
        }
        write_trajectory(path, vectors, kept)


# ---- from another working directory ----


def test_a_run_on_relative_paths_goes_on_from_anywhere(begun: Path, here: Path) -> None:
    assert stored(begun)["settings"]["dataset"] == f"imagefolder:{here / 'birds'}"
    assert stored(begun)["data"]["data"] == "imagefolder:birds"  # what is given away says no more
    assert call("distill", "--resume", "--run-dir", begun)[0] == 0
    assert call("evaluate", begun)[0] == 0
    assert load_distilled(begun).metadata["data"] == "imagefolder:birds"
    assert load_distilled(begun).metadata["fingerprint"] == stored(begun)["data"]["fingerprint"]
    assert str(here) not in json.dumps(load_distilled(begun).metadata)


def test_experts_and_other_runs_are_found_from_anywhere(
    begun: Path, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(here)
    taken = flags(dataset="imagefolder:birds", experts_from="run")
    assert call("experts", *taken, "--run-dir", "second")[0] == 0
    assert stored(here / "second")["settings"]["experts_from"] == str(begun)
    monkeypatch.chdir(here.parent)
    assert call("distill", "--resume", "--run-dir", "here/second")[0] == 0
    assert call("distill", "--resume", "--run-dir", "here/run")[0] == 0
    assert call("evaluate", "here/run", "--against", "here/second")[0] == 0
    # Paths that are given again are compared as absolute ones.
    again = ["distill", "--resume", "--run-dir", "here/second", "--set"]
    assert call(*again, "experts_from=here/run", "--dataset", "imagefolder:here/birds")[0] == 0
    status, said = call(*again, "experts_from=run")
    assert status == 2
    assert (
        f"experts_from must be {begun} as in the run that is continued, got {here.parent / 'run'}"
        in said
    )


def test_paths_in_a_configuration_become_absolute_where_they_are_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/me")
    found = absolute(Settings(dataset="cifar10", data_dir="data", experts_from="~/experts"))
    assert (found.dataset, found.data_dir, found.experts_from) == (
        "cifar10",
        str(tmp_path / "data"),
        "/home/me/experts",
    )
    assert absolute(found) == found
    assert absolute(Settings()) == Settings()  # digits come with a package
    assert absolute(Settings(dataset="imagefolder:~/x")) == Settings(
        dataset="imagefolder:/home/me/x"
    )
    (tmp_path / "a").mkdir()
    assert paths.absolute("a/../b") == str((tmp_path / "b").resolve())
    assert paths.absolute("~nobody-of-this-name/x") == str(tmp_path / "~nobody-of-this-name/x")


# ---- data that have moved ----


def moved(here: Path, name: str = "moved") -> str:
    shutil.move(here / "birds", here.parent / name)
    return f"imagefolder:{here.parent / name}"


def test_data_are_named_where_they_lie_now(begun: Path, here: Path) -> None:
    place = moved(here)
    status, said = call("distill", "--resume", "--run-dir", begun)
    assert status == 2
    assert "must hold a folder train/, got no such folder" in said
    assert call("distill", "--resume", "--run-dir", begun, "--dataset", place)[0] == 0
    assert call("evaluate", begun, "--dataset", "imagefolder:../moved")[0] == 0
    assert load_distilled(begun).metadata["fingerprint"] == stored(begun)["data"]["fingerprint"]


def test_a_moved_run_has_the_bytes_of_one_that_stayed(begun: Path, here: Path) -> None:
    shutil.copytree(begun, here / "copy")
    assert call("distill", "--resume", "--run-dir", here / "copy")[0] == 0
    assert (
        call("distill", "--resume", "--run-dir", begun, "--dataset", moved(here, "birds"))[0] == 0
    )
    for name in ("distilled.safetensors", "stage-1/distilled.safetensors"):
        assert (begun / name).read_bytes() == (here / "copy" / name).read_bytes()


def edit(folder: Path) -> None:
    path = folder / "test" / "bee" / "0.png"
    pixels = np.array(Image.open(path))
    pixels[0, 0, 0] ^= 1
    Image.fromarray(pixels).save(path)


def rename(folder: Path) -> None:
    path = folder / "train" / "ant" / "0.png"
    path.rename(path.with_name("9.png"))


def rename_class(folder: Path) -> None:
    for part in ("train", "test"):
        (folder / part / "bee").rename(folder / part / "bug")


def add_class(folder: Path) -> None:
    for part in ("train", "test"):
        shutil.copytree(folder / part / "bee", folder / part / "cat")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (edit, "with other images or labels (fingerprint "),
        (rename, "with the training images in another order"),
        (rename_class, "with class 'bee', not imagefolder:moved with 'bug' in its place"),
        (add_class, "of 2 classes, not imagefolder:moved of 3"),
    ],
)
def test_other_data_are_refused_in_one_sentence(
    change: Any, said: str, begun: Path, here: Path
) -> None:
    place = moved(here)
    change(here.parent / "moved")
    before = stored(begun)
    status, err = call("distill", "--resume", "--run-dir", begun, "--dataset", place)
    assert (status, err.count("\n")) == (2, 1)
    assert f"dataset must be the one that {begun} was begun with, got another: " in err
    assert said in err
    assert stored(begun) == before


def test_the_continuation_of_a_run_on_moved_data_says_where_they_lie(
    begun: Path, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    place = moved(here)
    with monkeypatch.context() as patch:
        patch.setattr("pdd_fast.progressive.stages.ensure_experts", interrupt)
        status, said = call("distill", "--resume", "--run-dir", begun, "--dataset", place)
    assert status == 130
    again = shlex.split(said.rpartition("continue with: ")[2])
    assert again == [
        "pdd-fast",
        "distill",
        "--resume",
        "--run-dir",
        str(begun),
        "--set",
        f"dataset={place}",
    ]
    assert call(*again[1:])[0] == 0


def test_data_that_changed_in_their_place_are_refused_too(begun: Path, here: Path) -> None:
    edit(here / "birds")
    status, said = call("distill", "--resume", "--run-dir", begun)
    assert status == 2
    assert "with other images or labels" in said


def test_a_finished_run_is_judged_on_its_images_in_any_order(begun: Path, here: Path) -> None:
    assert call("distill", "--resume", "--run-dir", begun)[0] == 0
    rename(here / "birds")
    assert call("evaluate", begun)[0] == 0
    edit(here / "birds")
    status, said = call("evaluate", begun)
    assert status == 2
    assert "with other images or labels" in said


def test_a_named_dataset_is_no_place(begun: Path) -> None:
    for command in (["distill", "--resume", "--run-dir", begun], ["evaluate", begun]):
        status, said = call(*command, "--dataset", "digits")
        assert status == 2
        assert "dataset must be imagefolder:" in said
        assert "as in the run that is continued, got digits" in said


# ---- runs from before there were fingerprints ----


def test_old_runs_are_known_by_name(begun: Path, here: Path) -> None:
    without_record(begun)
    shutil.copytree(here / "birds", here.parent / "other" / "birds")
    shutil.move(here / "birds", here.parent / "renamed")
    status, said = call(
        "distill",
        "--resume",
        "--run-dir",
        begun,
        "--dataset",
        f"imagefolder:{here.parent / 'renamed'}",
    )
    assert status == 2
    assert "imagefolder:birds, not imagefolder:renamed" in said
    place = f"imagefolder:{here.parent / 'other' / 'birds'}"
    assert call("distill", "--resume", "--run-dir", begun, "--dataset", place)[0] == 0
    assert stored(begun)["data"]["fingerprint"] == load_distilled(begun).metadata["fingerprint"]


def test_old_runs_on_relative_paths_go_on_where_they_were_made(
    begun: Path, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_record(begun, dataset="imagefolder:birds")
    assert call("distill", "--resume", "--run-dir", begun)[0] == 2
    monkeypatch.chdir(here)
    assert call("distill", "--resume", "--run-dir", "run", "--dataset", "imagefolder:birds")[0] == 0


# ---- experts and sets of other data ----


def test_experts_of_other_data_of_the_same_name_are_refused(begun: Path, here: Path) -> None:
    photographs(here.parent / "other" / "birds", seed=1, count=6)
    settings = flags(
        dataset=f"imagefolder:{here.parent / 'other' / 'birds'}", experts_from=str(begun)
    )
    status, said = call("experts", *settings, "--run-dir", here / "second")
    assert (status, said.count("\n")) == (2, 1)
    assert (
        "trajectory-000.safetensors: data must be the run's, got imagefolder:birds with other "
        "images" in said
    )
    assert not (here / "second").exists()


def test_experts_of_the_same_data_under_another_name_serve(begun: Path, here: Path) -> None:
    settings = flags(dataset=moved(here), experts_from=str(begun))
    assert call("experts", *settings, "--run-dir", here / "second")[0] == 0
    without_record(begun)  # old experts are known by name
    status, said = call("experts", *settings, "--run-dir", here / "third")
    assert status == 2
    assert "data must be the run's, got imagefolder:birds, not imagefolder:moved" in said


@pytest.mark.parametrize(
    ("classes", "said"),
    [
        (("ant", "bee", "cat"), "of 3 classes, not imagefolder:birds of 2"),
        (("ant", "bug"), "with class 'bug'"),
        (("ant", "bee"), "with other images or labels"),
    ],
)
def test_against_a_run_on_other_data_is_one_sentence(
    classes: tuple[str, ...], said: str, begun: Path, here: Path
) -> None:
    assert call("distill", "--resume", "--run-dir", begun)[0] == 0
    photographs(here.parent / "other" / "birds", seed=1, classes=classes, count=6)
    settings = flags(dataset=f"imagefolder:{here.parent / 'other' / 'birds'}")
    assert call("distill", *settings, "--run-dir", here / "second")[0] == 0
    for other in (here / "second", here / "second" / "distilled.safetensors"):
        status, err = call("evaluate", begun, "--against", other)
        assert (status, err.count("\n")) == (2, 1)
        assert "--against must name a run on imagefolder:birds (3, 8, 8), got " in err
        assert said in err


@pytest.mark.parametrize("soft", [False, True], ids=["hard", "soft"])
def test_against_an_old_set_with_more_classes_is_one_sentence(
    soft: bool, begun: Path, here: Path
) -> None:
    assert call("distill", "--resume", "--run-dir", begun)[0] == 0
    found = load_distilled(begun)
    labels = torch.full((len(found.labels), 3), 1 / 3) if soft else torch.full_like(found.labels, 2)
    old = {
        key: value for key, value in found.metadata.items() if key not in ("fingerprint", "classes")
    }
    replace(found, labels=labels, metadata=old).save(here / "old.safetensors")
    status, err = call("evaluate", begun, "--against", here / "old.safetensors")
    assert (status, err.count("\n")) == (2, 1)
    assert (
        "labels must have 2 columns, one for each class, got 3"
        if soft
        else "labels must lie in [0, 2), got 2..2"
    ) in err


def test_a_set_of_other_data_in_a_runs_place_is_not_judged(begun: Path) -> None:
    assert call("distill", "--resume", "--run-dir", begun)[0] == 0
    found = load_distilled(begun)
    replace(found, metadata=found.metadata | {"fingerprint": "bbbb-cc"}).save(
        begun / "distilled.safetensors"
    )
    status, said = call("evaluate", begun)
    assert status == 2
    assert (
        "distilled.safetensors must be for the run's data, got one for imagefolder:birds with "
        "other images" in said
    )


@pytest.mark.parametrize(
    "settings", [{"whitening": "zca"}, {"filter": "forgetting"}], ids=["whitening", "forgetting"]
)
def test_what_a_run_keeps_of_its_data_is_not_taken_for_other_data(
    settings: dict[str, str], begun: Path, here: Path
) -> None:
    assert (
        call(
            "distill",
            *flags(dataset=f"imagefolder:{here / 'birds'}", **settings),
            "--run-dir",
            here / "second",
        )[0]
        == 0
    )
    (kept,) = [
        path
        for path in (here / "second").glob("*.safetensors")
        if path.stem in ("whitening", "forgetting")
    ]
    tensors, metadata = read_tensors(kept)
    assert metadata["fingerprint"] == stored(here / "second")["data"]["fingerprint"]
    for path in (here / "second").glob("stage-*"):
        shutil.rmtree(path)
    (here / "second" / "distilled.safetensors").unlink()
    save_tensors(kept, tensors, metadata | {"fingerprint": "bbbb-cc"})
    status, said = call("distill", "--resume", "--run-dir", here / "second")
    assert status == 2
    assert (
        f"{kept} must be for the run's data, got one for imagefolder:birds with other images"
        in said
    )
    for old in ("fingerprint", "classes"):
        metadata.pop(old)
    save_tensors(kept, tensors, metadata)
    assert call("distill", "--resume", "--run-dir", here / "second")[0] == 0


# ---- the home directory ----


def test_a_tilde_is_the_home_directory_in_every_path(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(here))
    monkeypatch.chdir(here.parent)
    own = flags(dataset="imagefolder:~/birds")
    assert call("distill", *own, "--run-dir=~/run")[0] == 0
    assert (
        call(
            "distill",
            "--resume",
            "--run-dir=~/run",
            "--dataset=imagefolder:~/birds",
            "--data-dir=~/data",
        )[0]
        == 0
    )
    assert (
        call(
            "experts",
            *flags(dataset="imagefolder:~/birds", experts_from="~/run"),
            "--run-dir=~/second",
        )[0]
        == 0
    )
    assert (
        call(
            "evaluate",
            "~/run",
            "--against=~/run/distilled.safetensors",
            "--dataset=imagefolder:~/birds",
        )[0]
        == 0
    )
    assert call("show", "~/run")[0] == 0
    assert call("export", "~/run", "--output=~/mtt")[0] == 0
    ablate = ["ablate", "--stages=1", "--conditioning=on", "--seeds=1", "--output=~/ablation"]
    assert call(*ablate, *own)[0] == 0
    assert {"run", "second", "mtt", "ablation"} <= {path.name for path in here.iterdir()}
    assert not list(here.parent.glob("~*"))
    assert Run.open("~/run").path == here / "run"
    assert len(load_distilled("~/run").images) == 4
