"""Ablations: which variants there are, that they share experts and steps, and that the switches do
something.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from pdd_fast.cli.main import run as call
from pdd_fast.evaluation.ablation import Variant, ablate, variants
from pdd_fast.runtime.errors import UsageError
from pdd_fast.settings import resolve
from pdd_fast.storage.distilled import load_distilled
from pdd_fast.storage.run import Run
from pdd_fast.storage.trajectories import list_trajectories

SETTINGS = tiny.SETTINGS | {"stages": 1, "iterations": 2, "repeats": 1, "union_batch": 16}
CHOSEN = variants([1, 3], ["on", "off"], ["none", "forgetting", "learned"])


def test_variants_are_all_combinations_that_differ() -> None:
    assert [variant.name for variant in CHOSEN] == [
        "1 stage",
        "1 stage, forgetting filter",
        "3 stages",
        "3 stages, forgetting filter",
        "3 stages, learned filter",
        "3 stages, no conditioning",
        "3 stages, no conditioning, forgetting filter",
    ]
    assert len({variant.folder for variant in CHOSEN}) == 7
    assert variants([2, 2], ["on"], ["none"]) == [Variant(2, "on", "none")]
    # A single stage has no networks before it: it is one without the filter, and there is a point
    # of it in the plot.
    assert variants([1, 2], ["on", "off"], ["learned"]) == [
        Variant(1, "on", "none"),
        Variant(2, "on", "learned"),
    ]
    for stages, filters in ((1, "none"), (2, "learned")):
        with pytest.raises(
            UsageError,
            match="conditioning must be on where there is a single stage or the filter is",
        ):
            variants([stages], ["off"], [filters])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ablation") / "out"
    ablate(resolve(**SETTINGS), CHOSEN, [0, 1], folder)
    return folder


@pytest.fixture(scope="module")
def content(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "ablation.json").read_text())


def test_every_variant_has_a_row_and_every_seed_a_number(content: dict[str, Any]) -> None:
    assert [result["name"] for result in content["results"]] == [
        *(v.name for v in CHOSEN),
        "random",
    ]
    for result in content["results"]:
        assert len(result["accuracy"]) == 2
        assert result["mean"] == pytest.approx(sum(result["accuracy"]) / 2)
        assert result["ci95"] == pytest.approx(
            12.7062 * abs(result["accuracy"][0] - result["accuracy"][1]) / 2, rel=1e-4
        )
    assert (content["results"][2]["stages"], content["results"][2]["conditioning"]) == (3, "on")


def test_all_variants_take_as_many_steps_and_match_the_same_experts(folder: Path) -> None:
    for seed in (0, 1):
        runs = {variant: Run.open(folder / f"seed-{seed}" / variant.folder) for variant in CHOSEN}
        steps = [sum(run.read_evaluation().steps) for run in runs.values()]
        assert max(steps) - min(steps) <= 0.1 * max(steps)
        first = runs[CHOSEN[0]]
        assert len(list_trajectories(first.experts_dir)) == 2
        for variant, run in runs.items():
            assert run.settings.seed == seed
            assert variant.of(run.settings) == run.settings
            assert run is first or run.settings.experts_from == str(first.path.resolve())
            assert run is first or not run.experts_dir.exists()


def test_conditioning_is_what_makes_later_stages_differ(folder: Path) -> None:
    on, off = (
        Run.open(folder / "seed-0" / name) for name in ("3-stages", "3-stages-no-conditioning")
    )
    one, other = load_distilled(on.path), load_distilled(off.path)
    assert torch.equal(one.subset(1).images, other.subset(1).images)
    for stage in (2, 3):
        assert not torch.equal(one.subset(stage).images, other.subset(stage).images)
        assert on.stage_trajectories_dir(stage).exists()
        assert not off.stage_trajectories_dir(stage).exists()


def test_what_is_learned_is_dropped_in_the_variant_that_says_so(folder: Path) -> None:
    for variant in CHOSEN:
        found = [
            path.parent.name
            for path in (folder / "seed-0" / variant.folder).rglob("learned.safetensors")
        ]
        assert sorted(found) == (["stage-2", "stage-3"] if variant.filter == "learned" else [])


def test_an_interrupted_ablation_goes_on_and_a_foreign_folder_is_left_alone(
    folder: Path, content: dict[str, Any]
) -> None:
    before = {path: path.read_bytes() for path in folder.rglob("distilled.safetensors")}
    (folder / "seed-1" / CHOSEN[-1].folder / "evaluation.json").unlink()
    assert ablate(resolve(**SETTINGS), CHOSEN, [0, 1], folder) == content
    assert {path: path.read_bytes() for path in before} == before
    with pytest.raises(
        UsageError, match="holds a run with other settings; choose another --output"
    ):
        ablate(resolve(**SETTINGS | {"iterations": 3}), CHOSEN, [0], folder)


def test_a_split_is_no_ablations(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="stage_ipc and stage_lr_img must not be given"):
        ablate(
            resolve(**SETTINGS | {"stages": 2, "stage_lr_img": "1,2"}),
            variants([2], ["on"], ["none"]),
            [0],
            tmp_path,
        )
    assert not list(tmp_path.iterdir())


def test_the_command_prints_a_table_and_draws(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = [
        part
        for key, value in SETTINGS.items()
        if key not in ("stages",)
        for part in ("--set", f"{key}={value}")
    ]
    options = [
        "--stages",
        "1,2",
        "--filter",
        "none,learned",
        "--seeds",
        "1",
        "--output",
        str(tmp_path / "out"),
    ]
    arguments = ["ablate", *settings, *options]
    assert call(arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("Test accuracy on digits after ")
    assert [line.split("│")[1].strip() for line in lines if line.startswith("│")] == [
        "1 stage",
        "2 stages",
        "2 stages, learned filter",
        "2 stages, no conditioning",
        "random",
    ]
    assert (tmp_path / "out" / "ablation.png").read_bytes().startswith(b"\x89PNG")
    assert call([*arguments, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["seeds"] == [0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--stages", "1,x"], "--stages must be whole numbers from 1 on"),
        (
            ["--conditioning", "maybe"],
            "--conditioning must be on or off, or several of them joined by commas, got 'maybe'",
        ),
        (
            ["--filter", "easy"],
            "--filter must be none or forgetting or learned, or several of them joined by commas, "
            "got 'easy'",
        ),
        (["--stages", "11", "--ipc", "10"], "stages must be at most ipc (10), got 11"),
    ],
)
def test_wrong_calls_are_sentences(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert call(["ablate", *arguments]) == 2
    assert message in " ".join(capsys.readouterr().err.split())
    assert not list(tmp_path.iterdir())


def test_soft_labels_are_compared_with_random_images_that_have_them_too(tmp_path: Path) -> None:
    content = ablate(
        resolve(**(SETTINGS | {"labels": "soft"})),
        variants([2], ["on"], ["none"]),
        [0],
        tmp_path / "out",
    )
    assert content["labels"] == "soft"
    results = Run.open(tmp_path / "out/seed-0/2-stages").read_evaluation().model_dump()["results"]
    expected = {result["name"]: result["mean"][-1] for result in results}
    assert content["results"][-1]["accuracy"] == [expected["random-soft"]]


def test_a_filter_shares_its_experts_where_the_method_has_none(tmp_path: Path) -> None:
    config = resolve(
        **tiny.of("dm", SETTINGS) | {"factor": 1, "real_batch": 5, "augment_mode": "single"}
    )
    ablate(config, variants([1, 2], ["on"], ["none", "forgetting"]), [0], tmp_path / "out")
    trained = [path.parent.name for path in (tmp_path / "out/seed-0").glob("*/experts")]
    assert trained == ["1-stage-forgetting-filter"]
