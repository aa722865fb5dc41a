"""ZCA whitening: the published formula, its inverse, and its way through files, datasets and
distilled sets.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from evaluations import evaluated
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import pdd_fast
from pdd_fast import data
from pdd_fast.settings import Config, resolve
from pdd_fast.data import whitening as module
from pdd_fast.data.normalization import Normalization
from pdd_fast.data.splits import Pixels, prepare
from pdd_fast.data.whitening import EPSILON, Whitening
from pdd_fast.runtime.errors import UsageError
from pdd_fast.progressive.experts import make_experts
from pdd_fast.runtime.files import read_tensors, save_tensors
from pdd_fast.storage.mtt_images import read_mtt, write_mtt
from pdd_fast.progressive.stages import distill
from pdd_fast.storage.run import Run
from pdd_fast.progressive.union import UnionSet
from pdd_fast.progressive.context import RunContext


def photographs(count: int = 300, channels: int = 3, height: int = 5, width: int = 4, seed: int = 0) -> Tensor:
    """Images whose pixels depend on their neighbors, some of them hardly varying."""
    draw = torch.Generator().manual_seed(seed)
    size = channels * height * width
    mixing = torch.randn(size, size, generator=draw) * torch.linspace(0.01, 1, size)
    return (torch.randn(count, size, generator=draw) @ mixing + 0.3).view(count, channels, height, width)


def textbook(images: Tensor, epsilon: float) -> tuple[np.ndarray, np.ndarray]:
    """W and the mean, in float64, of all images at once."""
    flat = images.flatten(1).double().numpy()
    eigenvalues, vectors = np.linalg.eigh(np.cov(flat, rowvar=False))
    return vectors @ np.diag(1 / np.sqrt(np.maximum(eigenvalues, 0) + epsilon)) @ vectors.T, flat.mean(0)


def published(train: Tensor, pixels: Tensor, epsilon: float = 0.1) -> Tensor:
    """Whiten ``pixels`` as kornia's ZCAWhitening(eps=epsilon) does once it was fitted to ``train``,
    both in [0, 1].

    It was held against kornia 0.9.0 itself: 1e-15 from it in float64, 1.5e-6 in float32.
    """
    flat = train.double().flatten(1)
    mean = flat.mean(0)
    covariance = (flat - mean).T @ (flat - mean) / (len(flat) - 1)
    u, eigenvalues, _ = torch.linalg.svd(covariance)
    matrix = u @ torch.diag((eigenvalues + epsilon).rsqrt()) @ u.T
    return ((pixels.double().flatten(1) - mean) @ matrix).view(pixels.shape)


@pytest.mark.parametrize("epsilon", [EPSILON, 1.0])
def test_it_is_the_textbooks(epsilon: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "AT_ONCE", 64)  # 300 images: some of it full, the last not
    monkeypatch.setattr(module, "_BLOCK", 16)  # of 60 numbers
    images = photographs()
    matrix, mean = textbook(images, epsilon)
    expected = (images.flatten(1).double().numpy() - mean) @ matrix.T
    fitted = Whitening.fit(images, epsilon)
    found = fitted.apply(images.double()).flatten(1).numpy()
    assert np.abs(found - expected).max() <= 1e-6 * np.abs(expected).max()
    in_single = fitted.apply(images)
    assert in_single.dtype == torch.float32
    assert np.abs(in_single.flatten(1).numpy() - expected).max() <= 1e-5 * np.abs(expected).max()


@given(st.integers(2, 40), st.integers(1, 3), st.integers(1, 5), st.integers(1, 5), st.integers(0, 99))
def test_what_is_whitened_can_be_undone(count: int, channels: int, height: int, width: int, seed: int) -> None:
    """Also of fewer images than pixels, of one pixel, and of images that are all alike."""
    images = photographs(count, channels, height, width, seed)
    for some in (images, images[:1].expand(2, -1, -1, -1)):
        fitted = Whitening.fit(some)
        torch.testing.assert_close(fitted.invert(fitted.apply(some)), some, rtol=0, atol=2e-5 * float(some.abs().max()))


def test_pixels_of_whitened_images_do_not_depend_on_one_another() -> None:
    images = photographs(3000, 1, 4, 4)
    white = Whitening.fit(images, 1e-9).apply(images).flatten(1)
    torch.testing.assert_close(white.T.cov(), torch.eye(16), rtol=0, atol=2e-2)
    torch.testing.assert_close(white.mean(0), torch.zeros(16), rtol=0, atol=1e-3)


def test_arguments_are_left_alone_but_where_asked() -> None:
    images = photographs(50)
    fitted, before = Whitening.fit(images), images.clone()
    white = fitted.apply(images)
    fitted.invert(images)
    assert torch.equal(images, before)
    assert torch.equal(fitted.apply_(images), white)
    assert torch.equal(images, white)


def test_where_images_lie_changes_nothing() -> None:
    images = photographs(20)
    fitted = Whitening.fit(images)
    last = images.contiguous(memory_format=torch.channels_last)
    for call in (fitted.apply, fitted.invert):
        for other in (last, images.flip(0).flip(0), images.repeat_interleave(2, 3)[..., ::2]):
            assert torch.equal(call(other), call(images))
    assert torch.equal(Whitening.fit(last).basis, fitted.basis)


def test_wrong_shapes_and_numbers_are_named() -> None:
    fitted = Whitening.fit(photographs(9))
    with pytest.raises(ValueError, match=r"images must have shape \[n, 3, 5, 4\], got \(2, 3, 4, 5\)"):
        fitted.apply(torch.zeros(2, 3, 4, 5))
    with pytest.raises(ValueError, match="images must be at least 2, got 1"):
        Whitening.fit(photographs(1))
    with pytest.raises(ValueError, match="shapes must be"):
        replace(fitted, scale=fitted.scale[1:])
    with pytest.raises(ValueError, match="basis must be finite"):
        replace(fitted, basis=fitted.basis / 0)
    with pytest.raises(ValueError, match=r"scale must be above 0, got 0\.0"):
        replace(fitted, scale=fitted.scale * 0)


# ---- of datasets ----


def digits_pixels() -> dict[str, Tensor]:
    """The pixels in [0, 1] of every split of the digits."""
    plain = data.load("digits")
    return {
        name: plain.normalization.invert(getattr(plain, name).images)
        for name in ("full_train", "train", "validation", "test")
    }


@pytest.mark.parametrize("epsilon", [EPSILON, 0.01, 2.0])
def test_digits_are_whitened_as_the_published_code_does(epsilon: float) -> None:
    white = data.load("digits", whitening="zca", whitening_epsilon=epsilon)
    pixels = digits_pixels()
    assert white.normalization == Normalization((0.0,), (1.0,))
    assert white.whitening is not None
    assert white.whitening.epsilon == epsilon
    for name, own in pixels.items():
        images = getattr(white, name).images
        expected = published(pixels["full_train"], own, epsilon)
        torch.testing.assert_close(images.double(), expected, rtol=0, atol=1e-5)
        torch.testing.assert_close(white.whitening.invert(images), own, rtol=0, atol=1e-5)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_bytes_are_whitened_as_the_published_code_does(
    channels: int, layout: torch.memory_format, tmp_path: Path
) -> None:
    """2500 images in three pieces, with brightness and contrast that differ from channel to
    channel.
    """
    levels = torch.rand(3000, channels, 6, 5).cumsum(3) * torch.tensor([20.0, 30.0, 50.0])[:channels].view(-1, 1, 1)
    levels = levels.byte().contiguous(memory_format=layout)
    labels = torch.arange(3000) % 2
    pixels = Pixels(("a", "b"), levels[:2500], labels[:2500], levels[2500:], labels[2500:])
    whose = {"data": "bytes"}
    found = prepare("bytes", pixels, 0.2, lambda train: data._whitened(whose, tmp_path / "kept", EPSILON, train))
    floats = levels.double() / 255
    expected = published(floats[:2500], floats)
    torch.testing.assert_close(found.test.images.double(), expected[2500:], rtol=0, atol=1e-5)
    assert found.normalization == Normalization((0.0,) * channels, (1.0,) * channels)
    whitened = expected[:2500].flatten(1)
    nearest = torch.cdist(found.full_train.images.double().flatten(1), whitened).min(1)
    assert sorted(nearest.indices.tolist()) == list(range(2500))
    assert float(nearest.values.max()) <= 1e-4  # of 90 numbers, each 1e-5 away at most


def test_a_run_and_load_whiten_alike_where_nothing_is_said() -> None:
    assert Config.whitening_epsilon == EPSILON == 0.1


@pytest.mark.parametrize("epsilon", [0.0, -0.1, float("nan"), float("inf")])
def test_epsilon_is_checked_at_every_entrance(epsilon: float) -> None:
    with pytest.raises(UsageError, match=r"whitening_epsilon must be (a finite number|above 0)"):
        resolve(whitening="zca", whitening_epsilon=epsilon)
    with pytest.raises(UsageError, match="whitening_epsilon must be a finite number above 0"):
        data.load("digits", whitening="zca", whitening_epsilon=epsilon)
    with pytest.raises(ValueError, match="epsilon must be a finite number above 0"):
        replace(Whitening.fit(photographs(9)), epsilon=epsilon)


def test_it_is_fitted_once_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "whitening.safetensors"
    first = data.load("digits", whitening="zca", keep_whitening=file)
    monkeypatch.setattr(Whitening, "fit", lambda *_: pytest.fail("it was fitted again"))
    again = data.load("digits", whitening="zca", keep_whitening=file)
    assert torch.equal(first.train.images, again.train.images)
    assert torch.equal(first.test.images, again.test.images)


def test_what_is_kept_has_to_fit(tmp_path: Path) -> None:
    file = tmp_path / "whitening.safetensors"
    Whitening.fit(photographs(9)).save(file, {"data": "photographs"})
    with pytest.raises(UsageError, match=r"must be for digits \(1, 8, 8\), got one for photographs \(3, 5, 4\)$"):
        data.load("digits", whitening="zca", keep_whitening=file)
    save_tensors(file, {"mean": torch.zeros(1)}, {})
    with pytest.raises(UsageError, match="is not a whitening: it holds no tensor 'whitening_mean'"):
        data.load("digits", whitening="zca", keep_whitening=file)
    save_tensors(file, {"whitening_mean": torch.zeros(1)}, {})
    with pytest.raises(UsageError, match="is not a whitening"):
        data.load("digits", whitening="zca", keep_whitening=file)
    save_tensors(file, Whitening.fit(torch.rand(9, 1, 8, 8)).tensors(), {"data": "digits", "normalization": {"std": 1}})
    with pytest.raises(UsageError, match="is not a whitening: its normalization is damaged"):
        data.load("digits", whitening="zca", keep_whitening=file)
    tensors = Whitening.fit(torch.rand(9, 1, 8, 8)).tensors() | {"whitening_epsilon": torch.ones(2)}
    save_tensors(file, tensors, {"data": "digits"})
    with pytest.raises(UsageError, match=r"is not a whitening: .*epsilon must be one number, got shape \(2,\)"):
        data.load("digits", whitening="zca", keep_whitening=file)
    with pytest.raises(UsageError, match="whitening must be none or zca, got 'pca'"):
        data.load("digits", whitening="pca")


def test_another_epsilon_than_the_kept_ones_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "whitening.safetensors"
    data.load("digits", whitening="zca", keep_whitening=file, whitening_epsilon=0.5)
    with pytest.raises(UsageError, match=r"whitening_epsilon must be 0\.5 as in .*whitening\.safetensors, got 0\.1; "):
        data.load("digits", whitening="zca", keep_whitening=file)


# ---- of runs and distilled sets ----


def finished(path: Path, **changes: object) -> Run:
    run = Run.create(path, resolve(**(tiny.SETTINGS | {"whitening": "zca", "iterations": 0} | changes)))
    distill(run)
    return run


@pytest.fixture(scope="module")
def white(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return finished(tmp_path_factory.mktemp("runs") / "white")


def test_a_run_on_whitened_images_ends_in_a_set_that_knows_it(white: Run) -> None:
    found = pdd_fast.load_distilled(white.path)
    ctx = RunContext.prepare(white.config, white.path)
    assert found.normalization == Normalization((0.0,), (1.0,))
    assert found.whitening is not None
    assert ctx.data.whitening is not None
    for name, tensor in ctx.data.whitening.tensors().items():
        assert torch.equal(found.whitening.tensors()[name], tensor), name
    # No iteration: the images are real ones still, and their pixels come out as they were.
    pixels = digits_pixels()
    distance = torch.cdist(found.pixels().flatten(1).double(), pixels["train"].flatten(1).double()).min(1).values
    assert float(distance.max()) <= 1e-4
    # What users make of other pixels is what the run was judged by, and what the published code
    # makes of them.
    torch.testing.assert_close(found.transform(pixels["test"]), ctx.data.test.images, rtol=0, atol=1e-5)
    expected = published(pixels["full_train"], pixels["test"]).float()
    torch.testing.assert_close(found.transform(pixels["test"]), expected, rtol=0, atol=1e-5)
    protocol = evaluated(white)["protocol"]
    assert (protocol["whitening"], protocol["whitening_epsilon"]) == ("zca", 0.1)
    assert protocol["normalization"] == {"kind": "channel", "mean": [0.0], "std": [1.0]}


def test_images_that_published_scripts_whitened_come_back_as_their_pixels(tmp_path: Path) -> None:
    """Of MTT and PDD: images_best.pt as ZCAWhitening made them, without a word on how."""
    pixels = digits_pixels()
    folder = tmp_path / "released"
    folder.mkdir()
    torch.save(published(pixels["full_train"], pixels["train"][:20]).float(), folder / "images_best.pt")
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
    pixels, constants = r"normalization none \(pixels in \[0, 1\]\)", r"normalization by mean 0\.3059 and std 0\.3765"
    whitened = pixels + r" and then ZCA whitening with epsilon 0\.1"
    with pytest.raises(
        UsageError, match=f"^--against must name a run with {whitened}, got .*plain with {constants} and without"
    ):
        evaluated(white, against=plain.path)
    with pytest.raises(UsageError, match=f"run with {constants} and without whitening, got .*white with {whitened}$"):
        evaluated(plain, against=white.path)
    with pytest.raises(UsageError, match=r"epsilon 0\.1, got .*half with .* with epsilon 0\.5$"):
        evaluated(white, against=half.path)
    names = [result["name"] for result in evaluated(white, against=white.path, repeats=1)["results"]]
    assert "against" in names
    # Of other images, under the same name.
    found = pdd_fast.load_distilled(white.path)
    assert found.whitening is not None
    replace(found, whitening=replace(found.whitening, mean=found.whitening.mean + 0.1)).save(tmp_path / "other")
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


# ---- of earlier versions, which whitened what they had normalized ----


def in_old_form(run: Run) -> None:
    """Take out of a run's files what earlier versions did not write."""
    stored = json.loads((run.path / "config.json").read_text())
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
    run = Run.create(tmp_path / "old", resolve(**(tiny.SETTINGS | {"whitening": "zca", "iterations": 0})))
    Whitening.fit(data.load("digits").full_train.images).save(run.path / "whitening.safetensors", {"data": "digits"})
    distill(run)
    in_old_form(run)
    return Run.open(run.path)


def old_images() -> dict[str, Tensor]:
    """What earlier versions made of the digits."""
    plain = data.load("digits")
    fitted = Whitening.fit(plain.full_train.images)
    return {name: fitted.apply(getattr(plain, name).images) for name in ("train", "validation", "test")}


def test_a_run_of_an_earlier_version_goes_on_as_it_began(old: Run) -> None:
    ctx = RunContext.prepare(old.config, old.path)
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
    torch.testing.assert_close(found.transform(pixels["test"]), old_images()["test"], rtol=0, atol=1e-5)
    distance = torch.cdist(found.pixels().flatten(1).double(), pixels["train"].flatten(1).double()).min(1).values
    assert float(distance.max()) <= 1e-4


def test_a_run_of_an_earlier_version_serves_none_of_this_one(old: Run, white: Run, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"--against must name a run with normalization none .*, got .*old with .* by"):
        evaluated(white, against=old.path)
    with pytest.raises(UsageError, match=r"--against must name a run with normalization by .*white with .* none"):
        evaluated(old, against=white.path)
    settings = tiny.SETTINGS | {"whitening": "zca", "experts_from": str(old.path)}
    with pytest.raises(
        UsageError,
        match=r"normalization must be none \(pixels in \[0, 1\]\) .*got by constants fitted .*train them again",
    ):
        make_experts(Run.create(tmp_path / "new", resolve(**settings)))


@pytest.mark.parametrize("form", ["old", "white"])
def test_a_run_that_lost_its_whitening_takes_it_from_its_sets(form: str, request: pytest.FixtureRequest) -> None:
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
    with pytest.raises(UsageError, match=r"normalization must be none .* got by constants fitted to the images"):
        distill(old)


def test_a_set_that_was_made_of_pixels_in_another_way_than_the_runs_data_is_refused(old: Run) -> None:
    (old.path / "whitening.safetensors").unlink()
    data.load("digits", whitening="zca", keep_whitening=old.path / "whitening.safetensors")
    message = r"must hold images with normalization none .*, got normalization by .* bring back the run's whitening"
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
    ctx = RunContext.prepare(white.config, white.path)
    found = pdd_fast.load_distilled(white.path)
    replace(found, normalization=Normalization((0.5,), (0.25,))).save(tmp_path / "set")
    with pytest.raises(UsageError, match=r"must hold images with normalization none .* got normalization by mean 0\.5"):
        UnionSet.load(tmp_path / "set", ctx)


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
