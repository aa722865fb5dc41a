"""Multi-formation against torch's own resampling, cell by cell, and against its own transpose."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from cases import layouts, relative_error
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

import pdd_fast
from pdd_fast.augmentation.multi_formation import combine, decode, decode_labels

SIZES = pytest.mark.parametrize(
    "size", [(8, 8), (12, 6), (9, 7), (13, 32), (5, 5), (3, 4)], ids=str
)
FACTORS = pytest.mark.parametrize("factor", [1, 2, 3])


def bounds(side: int, factor: int) -> list[int]:
    """Rounded, halves up, by floating-point numbers: another way than the package's."""
    return [int(i * side / factor + 0.5) for i in range(factor + 1)]


def cells(images: Tensor, factor: int) -> list[Tensor]:
    rows, columns = (bounds(side, factor) for side in images.shape[2:])
    return [
        images[:, :, rows[i] : rows[i + 1], columns[j] : columns[j + 1]]
        for i in range(factor)
        for j in range(factor)
    ]


def by_torch(images: Tensor, factor: int) -> Tensor:
    size = images.shape[2:]
    return torch.cat(
        [
            F.interpolate(cell, size=size, mode="bilinear", align_corners=False)
            for cell in cells(images, factor)
        ]
    )


@SIZES
@FACTORS
def test_decoding_is_torchs_interpolation_of_every_cell(
    size: tuple[int, int], factor: int, device: torch.device
) -> None:
    for images in layouts(torch.randn(4, 3, *size, dtype=torch.float64)):
        found, expected = decode(images.to(device), factor), by_torch(images, factor)
        assert found.shape == (4 * factor**2, 3, *size)
        assert relative_error(found, expected) <= 1e-12
    rounded = decode(images.float().to(device), factor)
    assert rounded.dtype == torch.float32
    assert relative_error(rounded, expected) <= 1e-6


@given(
    n=st.integers(0, 3),
    channels=st.integers(1, 3),
    height=st.integers(1, 40),
    width=st.integers(1, 40),
    factor=st.integers(1, 6),
    seed=st.integers(0, 1000),
)
def test_whatever_the_sizes(
    n: int, channels: int, height: int, width: int, factor: int, seed: int
) -> None:
    assume(factor <= min(height, width))
    draw = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=draw, dtype=torch.float64)

    images, small = randn(n, channels, height, width), randn(n * factor**2, channels, height, width)
    assert [cell.shape[2:].numel() > 0 for cell in cells(images, factor)] == [True] * factor**2
    found, made = decode(images, factor), combine(small, factor)
    assert found.shape == small.shape
    assert made.shape == images.shape
    if n:
        assert relative_error(found, by_torch(images, factor)) <= 1e-12
    # Both keep a constant, and so their weights sum to 1 wherever they are.
    for function, given_images in ((decode, images), (combine, small)):
        flat = function(torch.full_like(given_images, 2.5), factor)
        assert (flat - 2.5).abs().sum() <= 1e-12 * flat.numel()
        assert function(given_images.abs(), factor).min() >= 0 if n else True


@SIZES
@FACTORS
@pytest.mark.parametrize("function", [decode, combine])
def test_the_way_back_is_the_transpose(
    function: Any, size: tuple[int, int], factor: int, device: torch.device
) -> None:
    n = 2 if function is decode else 2 * factor**2
    x = torch.randn(n, 3, *size, dtype=torch.float64).to(device).requires_grad_()
    out = function(x, factor)
    y = torch.randn(out.shape, dtype=torch.float64).to(device)
    (transposed,) = torch.autograd.grad(out, x, y)
    there, back = (out.detach() * y).sum(), (x.detach() * transposed).sum()
    assert abs(float(there - back)) <= 1e-12 * float(out.detach().norm() * y.norm())


@pytest.mark.parametrize("function", [decode, combine])
def test_gradcheck_twice(function: Any) -> None:
    x = torch.randn(4, 1, 3, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda images: function(images, 2), x)
    assert torch.autograd.gradgradcheck(lambda images: function(images, 2).square(), x)


def test_the_gradient_is_that_of_torchs_interpolation(device: torch.device) -> None:
    images = torch.randn(3, 2, 9, 7, dtype=torch.float64).to(device).requires_grad_()
    grad = torch.randn(12, 2, 9, 7, dtype=torch.float64).to(device)
    found, expected = (
        torch.autograd.grad(f(images, 2), images, grad)[0] for f in (decode, by_torch)
    )
    assert relative_error(found, expected) <= 1e-12


@pytest.mark.usefixtures("every_region_shared")
def test_same_bits_again_and_for_any_number_of_threads(device: torch.device) -> None:
    images = torch.randn(20, 3, 32, 32).to(device).requires_grad_()
    grad = torch.randn(80, 3, 32, 32).to(device)

    def made(threads: int) -> tuple[Tensor, Tensor]:
        torch.set_num_threads(threads)
        out = decode(images, 2)
        return out.detach(), torch.autograd.grad(out, images, grad)[0]

    first = made(1)
    for threads in (1, 2, 3):
        assert all(torch.equal(a, b) for a, b in zip(made(threads), first, strict=True))


@FACTORS
def test_order_and_labels(factor: int) -> None:
    """Image k is all k, and its cell (i, j) is k + (f·i + j) / 100."""
    images = torch.arange(3.0)[:, None, None, None].expand(3, 1, 6, 6).clone()
    for number, cell in enumerate(cells(images, factor)):
        cell += number / 100
    found = decode(images, factor)
    expected = [k + number / 100 for number in range(factor**2) for k in range(3)]
    assert torch.allclose(found[:, 0, 0, 0], torch.tensor(expected))
    assert torch.allclose(found, found[:, :1, :1, :1].expand_as(found))
    assert decode_labels(torch.arange(3), factor).tolist() == [0, 1, 2] * factor**2
    soft = torch.randn(3, 4)
    assert torch.equal(decode_labels(soft, factor), torch.cat([soft] * factor**2))


@SIZES
@FACTORS
def test_decoding_what_was_combined(size: tuple[int, int], factor: int) -> None:
    """Constant images come back as they were, and smooth ones nearly: by the same index."""
    n = 2
    constants = torch.randn(n * factor**2, 3, 1, 1, dtype=torch.float64).expand(-1, -1, *size)
    assert relative_error(decode(combine(constants, factor), factor), constants) <= 1e-12
    y, x = (torch.linspace(-1, 1, side, dtype=torch.float64) for side in size)
    slopes = torch.randn(n * factor**2, 3, 2, 1, 1, dtype=torch.float64)
    smooth = 3 + slopes[:, :, 0] * y[:, None] + slopes[:, :, 1] * x
    found = decode(combine(smooth, factor), factor)
    # A slope loses only half a pixel of a cell at its edges.
    lost = [
        max(1 / (b - a) for a, b in itertools.pairwise(at))
        for at in (bounds(s, factor) for s in size)
    ]
    allowed = sum(slopes[:, :, i].abs() * lost[i] for i in range(2))
    assert ((found - smooth).abs() <= allowed + 1e-12).all()


def test_combining_averages_over_areas() -> None:
    images = torch.randn(8, 3, 12, 6, dtype=torch.float64)
    found = combine(images, 2)
    for cell, group in zip(cells(found, 2), images.chunk(4), strict=True):
        assert relative_error(cell, F.avg_pool2d(group, 2)) <= 1e-12
    # 5 pixels in cells of 3 and 2: weights in fifths, by hand.
    ramp = torch.arange(5, dtype=torch.float64).expand(4, 1, 5, 5)
    row = combine(ramp, 2)[0, 0, 0]
    thirds = [
        (0 + 2 / 3 * 1) / (5 / 3),
        (1 / 3 * 1 + 2 + 1 / 3 * 3) / (5 / 3),
        (2 / 3 * 3 + 4) / (5 / 3),
    ]
    halves = [(0 + 1 + 0.5 * 2) / 2.5, (0.5 * 2 + 3 + 4) / 2.5]
    assert torch.allclose(row, torch.tensor(thirds + halves, dtype=torch.float64), rtol=1e-12)


def test_with_factor_1_images_are_what_they_were() -> None:
    images = torch.randn(3, 1, 4, 4)
    assert decode(images, 1) is images
    assert combine(images, 1) is images


def test_augmentations_follow_and_the_gradient_goes_through_both(device: torch.device) -> None:
    images = torch.randn(2, 3, 9, 8, dtype=torch.float64).to(device)
    draw = pdd_fast.DSA(mode="multiple").sample(8, (9, 8))

    def augmented(decoded: Tensor) -> Tensor:
        return pdd_fast.augment(decoded, draw)

    leaf, plain = images.clone().requires_grad_(), images.clone().requires_grad_()
    found, expected = augmented(decode(leaf, 2)), augmented(by_torch(plain, 2))
    assert relative_error(found, expected) <= 1e-12
    found.square().sum().backward()
    expected.square().sum().backward()
    assert leaf.grad is not None
    assert plain.grad is not None
    assert relative_error(leaf.grad, plain.grad) <= 1e-12


def test_a_first_call_in_inference_mode_leaves_the_next_one_differentiable() -> None:
    images = torch.randn(2, 1, 23, 29)  # sides of no other test
    with torch.inference_mode():
        decode(images, 2)
    leaf = images.requires_grad_()
    decode(leaf, 2).sum().backward()
    assert leaf.grad is not None


IMAGES = torch.zeros(4, 1, 3, 5)
WRONG: dict[str, tuple[Any, tuple[Any, ...], type[Exception], str]] = {
    "factor 0": (decode, (IMAGES, 0), ValueError, "decode: factor must be at least 1, got 0"),
    "half a factor": (
        decode,
        (IMAGES, 1.5),
        TypeError,
        "decode: factor must be a whole number, got 1.5",
    ),
    "a truth": (
        combine,
        (IMAGES, True),
        TypeError,
        "combine: factor must be a whole number, got True",
    ),
    "more cells than pixels": (
        decode,
        (IMAGES, 4),
        ValueError,
        "decode: factor must be at most 3 for images of 3x5 pixels, got 4",
    ),
    "planes": (
        decode,
        (IMAGES[0], 2),
        ValueError,
        r"decode: images must have shape \[n, C, H, W\], got \(1, 3, 5\)",
    ),
    "whole numbers": (
        decode,
        (IMAGES.long(), 2),
        TypeError,
        "decode: images must be floating-point, got torch.int64",
    ),
    "too few images": (
        combine,
        (IMAGES[:3], 2),
        ValueError,
        "combine: images must hold a multiple of factor² = 4 images, got 3",
    ),
    "labels of labels": (
        decode_labels,
        (torch.zeros(1, 2, 3), 2),
        ValueError,
        r"decode_labels: labels must have shape \[n\] or",
    ),
    "labels, factor -1": (
        decode_labels,
        (torch.zeros(3), -1),
        ValueError,
        "decode_labels: factor must be at least 1, got -1",
    ),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_arguments_are_named(wrong: str) -> None:
    function, arguments, error, message = WRONG[wrong]
    with pytest.raises(error, match=f"^{message}"):
        function(*arguments)
