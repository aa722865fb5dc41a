"""ZCA whitening: the published formula, its inverse, and its way through files, datasets and
distilled sets."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from evaluations import evaluated
from torch import Tensor
from whitening_support import digits_pixels, finished, photographs, published

import pdd_fast
from pdd_fast import data
from pdd_fast.data.normalization import Normalization
from pdd_fast.data.whitening import Whitening
from pdd_fast.progressive.context import RunContext
from pdd_fast.progressive.experts import make_experts
from pdd_fast.progressive.stages import distill
from pdd_fast.progressive.union import load_union
from pdd_fast.runtime.errors import UsageError
from pdd_fast.runtime.files import read_tensors, save_tensors
from pdd_fast.settings import from_dict, resolve
from pdd_fast.storage.mtt_images import read_mtt, write_mtt
from pdd_fast.storage.run import Run

# ---- of runs and distilled sets ----


def test_a_run_on_whitened_images_ends_in_a_set_that_knows_it(white: Run) -> None:
    found = pdd_fast.load_distilled(white.path)
    ctx = RunContext.prepare(white.settings, white.path)
    assert found.normalization == Normalization((0.0,), (1.0,))
    assert found.whitening is not None
    assert ctx.data.whitening is not None
    for name, tensor in ctx.data.whitening.tensors().items():
        assert torch.equal(found.whitening.tensors()[name], tensor), name
    # No iteration: the images are real ones still, and their pixels come out as they were.
    pixels = digits_pixels()
    distance = (
        torch.cdist(found.pixels().flatten(1).double(), pixels["train"].flatten(1).double())
        .min(1)
        .values
    )
    assert float(distance.max()) <= 1e-4
    # Users turn other pixels into the images that the run was evaluated on, as the published
    # code does.
    torch.testing.assert_close(
        found.transform(pixels["test"]), ctx.data.test.images, rtol=0, atol=1e-5
    )
    expected = published(pixels["full_train"], pixels["test"]).float()
    torch.testing.assert_close(found.transform(pixels["test"]), expected, rtol=0, atol=1e-5)
    protocol = evaluated(white)["protocol"]
    assert (protocol["whitening"], protocol["whitening_epsilon"]) == ("zca", 0.1)
    assert protocol["normalization"] == {"kind": "channel", "mean": [0.0], "std": [1.0]}


def test_images_that_published_scripts_whitened_come_back_as_their_pixels(tmp_path: Path) -> None:
    """Write images_best.pt as MTT and PDD do: whitened by ZCAWhitening, without a word on how."""
    pixels = digits_pixels()
    folder = tmp_path / "released"
    folder.mkdir()
    torch.save(
        published(pixels["full_train"], pixels["train"][:20]).float(), folder / "images_best.pt"
    )
    torch.save(torch.arange(20) % 10, folder / "labels_best.pt")
    own = data.load("digits", whitening="zca")
    found = read_mtt([folder], [0.01], own.normalization, own.whitening, {"data": "digits"})
    torch.testing.assert_close(found.pixels(), pixels["train"][:20], rtol=0, atol=1e-5)
    torch.testing.assert_close(found.transform(found.pixels()), found.images, rtol=0, atol=1e-4)


def test_an_exported_set_says_how_it_was_whitened(white: Run, tmp_path: Path) -> None:
    write_mtt(pdd_fast.load_distilled(white.path), tmp_path / "mtt")
    settings = json.loads((tmp_path / "mtt" / "settings.json").read_text())
    assert (settings["whitening"], settings["whitening_epsilon"]) == ("zca", 0.1)
    assert settings["normalization"] == {"kind": "channel", "mean": [0.0], "std": [1.0]}


def test_sets_are_compared_where_they_are_whitened_alike(white: Run, tmp_path: Path) -> None:
    plain = finished(tmp_path / "plain", whitening="none")
    half = finished(tmp_path / "half", whitening_epsilon=0.5)
    pixels, constants = (
        r"normalization none \(pixels in \[0, 1\]\)",
        r"normalization by mean 0\.3059 and std 0\.3765",
    )
    whitened = pixels + r" and then ZCA whitening with epsilon 0\.1"
    with pytest.raises(
        UsageError,
        match=f"^--against must name a run with {whitened}, got .*plain with {constants} and "
        "without",
    ):
        evaluated(white, against=plain.path)
    with pytest.raises(
        UsageError,
        match=f"run with {constants} and without whitening, got .*white with {whitened}$",
    ):
        evaluated(plain, against=white.path)
    with pytest.raises(UsageError, match=r"epsilon 0\.1, got .*half with .* with epsilon 0\.5$"):
        evaluated(white, against=half.path)
    names = [
        result["name"] for result in evaluated(white, against=white.path, repeats=1)["results"]
    ]
    assert "against" in names
    # A whitening of other images, under the same name.
    found = pdd_fast.load_distilled(white.path)
    assert found.whitening is not None
    replace(found, whitening=replace(found.whitening, mean=found.whitening.mean + 0.1)).save(
        tmp_path / "other"
    )
    with pytest.raises(UsageError, match=r"with epsilon 0\.1, but fitted to other images$"):
        evaluated(white, against=tmp_path / "other")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"whitening": "none"}, "whitening must be none .* got zca"),
        ({"whitening_epsilon": 0.2}, r"whitening_epsilon must be 0\.2 .* got 0\.1"),
    ],
)
def test_experts_serve_runs_that_whiten_alike(
    changes: dict[str, Any], message: str, white: Run, tmp_path: Path
) -> None:
    settings = tiny.SETTINGS | {"whitening": "zca", "experts_from": str(white.path)}
    make_experts(Run.create(tmp_path / "alike", resolve(**settings)))
    with pytest.raises(UsageError, match=message):
        make_experts(Run.create(tmp_path / "other", resolve(**(settings | changes))))


def in_old_form(run: Run) -> None:
    """Take out of a run's files what earlier versions did not write."""
    stored = json.loads((run.path / "config.json").read_text())
    stored["config"] = from_dict(stored.pop("settings")).flat()
    for key in ("normalization", "whitening_epsilon"):
        del stored["config"][key]
    (run.path / "config.json").write_text(json.dumps(stored))
    for file in run.path.rglob("*.safetensors"):
        tensors, metadata = read_tensors(file)
        tensors.pop("whitening_epsilon", None)
        if "images" not in tensors:
            metadata.pop("normalization", None)
        metadata.pop("whitening_epsilon", None)
        save_tensors(file, tensors, metadata)


@pytest.fixture
def old(tmp_path: Path) -> Run:
    """A finished run as an earlier version left it."""
    run = Run.create(
        tmp_path / "old", resolve(**(tiny.SETTINGS | {"whitening": "zca", "iterations": 0}))
    )
    Whitening.fit(data.load("digits").full_train.images).save(
        run.path / "whitening.safetensors", {"data": "digits"}
    )
    distill(run)
    in_old_form(run)
    return Run.open(run.path)


def old_images() -> dict[str, Tensor]:
    """The digits as earlier versions whitened them."""
    plain = data.load("digits")
    fitted = Whitening.fit(plain.full_train.images)
    return {
        name: fitted.apply(getattr(plain, name).images) for name in ("train", "validation", "test")
    }


# ---- of earlier versions, which whitened what they had normalized ----


def test_a_run_of_an_earlier_version_goes_on_as_it_began(old: Run) -> None:
    ctx = RunContext.prepare(old.settings, old.path)
    for name, expected in old_images().items():
        torch.testing.assert_close(getattr(ctx.data, name).images, expected, rtol=0, atol=1e-5)
    assert ctx.data.normalization == data.load("digits").normalization
    before = evaluated(old)["results"]
    last = pdd_fast.load_distilled(old.path)
    # The last stage is made again, of the experts and trajectories that are there.
    old.stage_file(3).unlink()
    old.distilled_file.unlink()
    distill(old)
    again = pdd_fast.load_distilled(old.path)
    assert torch.equal(again.images, last.images)
    assert again.normalization == last.normalization == ctx.data.normalization
    assert evaluated(old)["results"] == before


def test_a_set_of_an_earlier_version_keeps_its_transformation(old: Run) -> None:
    found, pixels = pdd_fast.load_distilled(old.path), digits_pixels()
    assert found.whitening is not None
    assert found.whitening.epsilon == 0.1
    torch.testing.assert_close(
        found.transform(pixels["test"]), old_images()["test"], rtol=0, atol=1e-5
    )
    distance = (
        torch.cdist(found.pixels().flatten(1).double(), pixels["train"].flatten(1).double())
        .min(1)
        .values
    )
    assert float(distance.max()) <= 1e-4


def test_a_run_of_an_earlier_version_serves_none_of_this_one(
    old: Run, white: Run, tmp_path: Path
) -> None:
    with pytest.raises(
        UsageError,
        match=r"--against must name a run with normalization none .*, got .*old with .* by",
    ):
        evaluated(white, against=old.path)
    with pytest.raises(
        UsageError, match=r"--against must name a run with normalization by .*white with .* none"
    ):
        evaluated(old, against=white.path)
    settings = tiny.SETTINGS | {"whitening": "zca", "experts_from": str(old.path)}
    with pytest.raises(
        UsageError,
        match=r"normalization must be none \(pixels in \[0, 1\]\) .*got by constants fitted "
        r".*train them again",
    ):
        make_experts(Run.create(tmp_path / "new", resolve(**settings)))


@pytest.mark.parametrize("form", ["old", "white"])
def test_a_run_that_lost_its_whitening_takes_it_from_its_sets(
    form: str, request: pytest.FixtureRequest
) -> None:
    run: Run = request.getfixturevalue(form)
    before, file = evaluated(run)["results"], run.path / "whitening.safetensors"
    content = file.read_bytes()
    file.unlink()
    assert evaluated(run)["results"] == before
    last = pdd_fast.load_distilled(run.path)
    run.stage_file(3).unlink()
    run.distilled_file.unlink()
    distill(run)
    assert torch.equal(pdd_fast.load_distilled(run.path).images, last.images)
    assert not file.exists()
    file.write_bytes(content)


def test_an_earlier_run_without_its_whitening_is_refused_where_no_set_has_it(old: Run) -> None:
    for file in (old.path / "whitening.safetensors", old.distilled_file, old.stage_file(1)):
        file.unlink()
    with pytest.raises(
        UsageError, match=r"normalization must be none .* got by constants fitted to the images"
    ):
        distill(old)


def test_a_set_that_was_made_of_pixels_in_another_way_than_the_runs_data_is_refused(
    old: Run,
) -> None:
    (old.path / "whitening.safetensors").unlink()
    data.load("digits", whitening="zca", keep_whitening=old.path / "whitening.safetensors")
    message = (
        r"must hold images with normalization none .*, got normalization by .* bring "
        r"back the run's whitening"
    )
    with pytest.raises(UsageError, match=message):
        evaluated(old)


def test_an_earlier_run_without_whitening_goes_on_and_serves_others(tmp_path: Path) -> None:
    run = finished(tmp_path / "plain", whitening="none")
    before = evaluated(run)["results"]
    in_old_form(run)
    old = Run.open(run.path)
    distill(old)
    assert evaluated(old)["results"] == before
    settings = tiny.SETTINGS | {"experts_from": str(old.path)}
    make_experts(Run.create(tmp_path / "fitted", resolve(**settings)))


def test_a_stage_of_other_images_is_refused(white: Run, tmp_path: Path) -> None:
    ctx = RunContext.prepare(white.settings, white.path)
    found = pdd_fast.load_distilled(white.path)
    replace(found, normalization=Normalization((0.5,), (0.25,))).save(tmp_path / "set")
    with pytest.raises(
        UsageError,
        match=r"must hold images with normalization none .* got normalization by mean 0\.5",
    ):
        load_union(tmp_path / "set", ctx)


def test_a_damaged_set_is_named(tmp_path: Path) -> None:
    run = finished(tmp_path / "white", stages=1, ipc=1)
    found = pdd_fast.load_distilled(run.path)
    assert found.whitening is not None
    other = Whitening.fit(photographs(9))
    with pytest.raises(ValueError, match=r"whitening must be for \(1, 8, 8\), got \(3, 5, 4\)"):
        replace(found, whitening=other)
    tensors = {"images": found.images, "labels": found.labels, "stage": found.stage}
    tensors |= {"learning_rates": found.learning_rates, "whitening_mean": found.whitening.mean}
    save_tensors(tmp_path / "set", tensors, {"normalization": found.normalization.to_dict()})
    with pytest.raises(UsageError, match="set is not a distilled set: 'whitening_basis'"):
        pdd_fast.load_distilled(tmp_path / "set")
