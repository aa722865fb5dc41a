"""ZCA whitening: the textbook's matrix, its inverse, and its way through files, data sets and distilled sets."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import pdd_fast
from pdd_fast import data
from pdd_fast.config import resolve
from pdd_fast.data import whitening as module
from pdd_fast.data.whitening import EPSILON, Whitening
from pdd_fast.errors import UsageError
from pdd_fast.evaluate import evaluate_run
from pdd_fast.files import save_tensors
from pdd_fast.progressive import distill
from pdd_fast.runs import Run
from pdd_fast.workbench import Workbench


def photographs(count: int = 300, channels: int = 3, height: int = 5, width: int = 4, seed: int = 0) -> Tensor:
    """Images whose pixels depend on their neighbours, some of them hardly varying."""
    draw = torch.Generator().manual_seed(seed)
    size = channels * height * width
    mixing = torch.randn(size, size, generator=draw) * torch.linspace(0.01, 1, size)
    return (torch.randn(count, size, generator=draw) @ mixing + 0.3).view(count, channels, height, width)


def textbook(images: Tensor, epsilon: float) -> tuple[np.ndarray, np.ndarray]:
    """W and the mean, in float64, of all images at once."""
    flat = images.flatten(1).double().numpy()
    eigenvalues, vectors = np.linalg.eigh(np.cov(flat, rowvar=False))
    return vectors @ np.diag(1 / np.sqrt(np.maximum(eigenvalues, 0) + epsilon)) @ vectors.T, flat.mean(0)


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


# ---- of data sets -------------------------------------------------------------------------------------------------


def test_all_splits_are_whitened_as_the_training_images_are() -> None:
    plain, white = (data.load("digits", whitening=kind) for kind in ("none", "zca"))
    assert plain.whitening is None
    assert white.whitening is not None
    fitted = Whitening.fit(torch.cat([plain.train.images, plain.validation.images]))
    for name in ("train", "validation", "test"):
        before, after = getattr(plain, name), getattr(white, name)
        assert torch.equal(before.labels, after.labels)
        torch.testing.assert_close(after.images, fitted.apply(before.images), rtol=0, atol=1e-4)
        torch.testing.assert_close(white.whitening.invert(after.images), before.images, rtol=0, atol=1e-4)
    assert float(white.train.images.flatten(1).T.cov().diag().max()) <= 1.1


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
    with pytest.raises(UsageError, match="whitening must be none or zca, got 'pca'"):
        data.load("digits", whitening="pca")


# ---- of runs and distilled sets -----------------------------------------------------------------------------------


def finished(path: Path, **changes: object) -> Run:
    run = Run.create(path, resolve(**(tiny.SETTINGS | {"whitening": "zca", "iterations": 0} | changes)))
    distill(run)
    return run


def test_a_run_on_whitened_images_ends_in_a_set_that_knows_it(tmp_path: Path) -> None:
    run = finished(tmp_path / "white")
    found = pdd_fast.load_distilled(run.path)
    bench = Workbench.prepare(run.config, run.path)
    assert found.whitening is not None
    assert bench.data.whitening is not None
    for name, tensor in bench.data.whitening.tensors().items():
        assert torch.equal(found.whitening.tensors()[name], tensor), name
    # No iteration: the images are real ones still, and their pixels come out as they were.
    digits = data.load("digits")
    pixels = digits.normalisation.invert(digits.train.images).flatten(1)
    distance = torch.cdist(found.pixels().flatten(1).double(), pixels.double()).min(1).values
    assert float(distance.max()) <= 1e-3
    # What users make of other pixels is what the run was judged by.
    test = digits.normalisation.invert(digits.test.images)
    torch.testing.assert_close(found.transform(test), bench.data.test.images, rtol=0, atol=1e-3)
    assert evaluate_run(run)["protocol"]["whitening"] == "zca"


def test_sets_are_compared_where_both_are_whitened_or_neither_is(tmp_path: Path) -> None:
    white, plain = finished(tmp_path / "white"), finished(tmp_path / "plain", whitening="none")
    with pytest.raises(UsageError, match=r"with whitening=zca, got .*plain, whose images are not whitened$"):
        evaluate_run(white, against=plain.path)
    with pytest.raises(UsageError, match=r"with whitening=none, got .*white, whose images are whitened$"):
        evaluate_run(plain, against=white.path)


def test_a_damaged_set_is_named(tmp_path: Path) -> None:
    run = finished(tmp_path / "white", stages=1, ipc=1)
    found = pdd_fast.load_distilled(run.path)
    assert found.whitening is not None
    other = Whitening.fit(photographs(9))
    with pytest.raises(ValueError, match=r"whitening must be for \(1, 8, 8\), got \(3, 5, 4\)"):
        replace(found, whitening=other)
    tensors = {"images": found.images, "labels": found.labels, "stage": found.stage}
    tensors |= {"learning_rates": found.learning_rates, "whitening_mean": found.whitening.mean}
    save_tensors(tmp_path / "set", tensors, {"normalisation": found.normalisation.to_dict()})
    with pytest.raises(UsageError, match="set is not a distilled set: 'whitening_basis'"):
        pdd_fast.load_distilled(tmp_path / "set")
