"""ZCA whitening: the published formula, its inverse, and its way through files, datasets and
distilled sets."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from whitening_support import digits_pixels, photographs, published

from pdd_fast import data
from pdd_fast.data import whitening as module
from pdd_fast.data.normalization import Normalization
from pdd_fast.data.splits import Pixels, prepare
from pdd_fast.data.whitening import EPSILON, Whitening
from pdd_fast.runtime.errors import UsageError
from pdd_fast.runtime.files import save_tensors
from pdd_fast.settings import default, resolve


def textbook(images: Tensor, epsilon: float) -> tuple[np.ndarray, np.ndarray]:
    """W and the mean, in float64, of all images at once."""
    flat = images.flatten(1).double().numpy()
    eigenvalues, vectors = np.linalg.eigh(np.cov(flat, rowvar=False))
    return vectors @ np.diag(
        1 / np.sqrt(np.maximum(eigenvalues, 0) + epsilon)
    ) @ vectors.T, flat.mean(0)


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


@given(
    st.integers(2, 40), st.integers(1, 3), st.integers(1, 5), st.integers(1, 5), st.integers(0, 99)
)
def test_what_is_whitened_can_be_undone(
    count: int, channels: int, height: int, width: int, seed: int
) -> None:
    """Also of fewer images than pixels, of one pixel, and of images that are all alike."""
    images = photographs(count, channels, height, width, seed)
    for some in (images, images[:1].expand(2, -1, -1, -1)):
        fitted = Whitening.fit(some)
        torch.testing.assert_close(
            fitted.invert(fitted.apply(some)), some, rtol=0, atol=2e-5 * float(some.abs().max())
        )


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
    with pytest.raises(
        ValueError, match=r"images must have shape \[n, 3, 5, 4\], got \(2, 3, 4, 5\)"
    ):
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
    levels = torch.rand(3000, channels, 6, 5).cumsum(3) * torch.tensor([20.0, 30.0, 50.0])[
        :channels
    ].view(-1, 1, 1)
    levels = levels.byte().contiguous(memory_format=layout)
    labels = torch.arange(3000) % 2
    pixels = Pixels(("a", "b"), levels[:2500], labels[:2500], levels[2500:], labels[2500:])
    whose = {"data": "bytes"}
    found = prepare(
        "bytes", pixels, 0.2, lambda train: data._whitened(whose, tmp_path / "kept", EPSILON, train)
    )
    floats = levels.double() / 255
    expected = published(floats[:2500], floats)
    torch.testing.assert_close(found.test.images.double(), expected[2500:], rtol=0, atol=1e-5)
    assert found.normalization == Normalization((0.0,) * channels, (1.0,) * channels)
    whitened = expected[:2500].flatten(1)
    nearest = torch.cdist(found.full_train.images.double().flatten(1), whitened).min(1)
    assert sorted(nearest.indices.tolist()) == list(range(2500))
    assert float(nearest.values.max()) <= 1e-4  # of 90 numbers, each 1e-5 away at most


def test_a_run_and_load_whiten_alike_where_nothing_is_said() -> None:
    assert default("whitening_epsilon") == EPSILON == 0.1


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
    with pytest.raises(
        UsageError, match=r"must be for digits \(1, 8, 8\), got one for photographs \(3, 5, 4\)$"
    ):
        data.load("digits", whitening="zca", keep_whitening=file)
    save_tensors(file, {"mean": torch.zeros(1)}, {})
    with pytest.raises(
        UsageError, match="is not a whitening file: it holds no tensor 'whitening_mean'"
    ):
        data.load("digits", whitening="zca", keep_whitening=file)
    save_tensors(file, {"whitening_mean": torch.zeros(1)}, {})
    with pytest.raises(UsageError, match="is not a whitening file"):
        data.load("digits", whitening="zca", keep_whitening=file)
    save_tensors(
        file,
        Whitening.fit(torch.rand(9, 1, 8, 8)).tensors(),
        {"data": "digits", "normalization": {"std": 1}},
    )
    with pytest.raises(UsageError, match="is not a whitening file: its normalization is damaged"):
        data.load("digits", whitening="zca", keep_whitening=file)
    tensors = Whitening.fit(torch.rand(9, 1, 8, 8)).tensors() | {"whitening_epsilon": torch.ones(2)}
    save_tensors(file, tensors, {"data": "digits"})
    with pytest.raises(
        UsageError, match=r"is not a whitening file: .*epsilon must be one number, got shape \(2,\)"
    ):
        data.load("digits", whitening="zca", keep_whitening=file)
    with pytest.raises(UsageError, match="whitening must be none or zca, got 'pca'"):
        data.load("digits", whitening="pca")


def test_another_epsilon_than_the_kept_ones_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "whitening.safetensors"
    data.load("digits", whitening="zca", keep_whitening=file, whitening_epsilon=0.5)
    with pytest.raises(
        UsageError,
        match=r"whitening_epsilon must be 0\.5 as in .*whitening\.safetensors, got 0\.1; ",
    ):
        data.load("digits", whitening="zca", keep_whitening=file)
