"""Multi-formation (IDC; Kim et al., ICML 2022): every stored image holds f×f smaller ones.

:func:`decode` cuts an image into f×f cells and enlarges each to full size. :func:`combine` fills
the cells with images. Both are linear and separable: a cell X becomes R X Cᵀ (docs/mathematics.md,
section 9). The forward pass is two matrix products, and the backward pass their transposes. Both
give the same bits every time on a GPU too, whereas the gradient of torch's ``interpolate`` adds
with atomics.

If f does not divide a side, its cells have unequal sizes, with boundaries at i·H/f rounded half up.
IDC's published code pads such images with a constant instead, which costs every cell at that side a
row of pixels.
"""

from __future__ import annotations

import functools
import itertools

import torch
from torch import Tensor


def decode(images: Tensor, factor: int) -> Tensor:
    """Return the ``factor``² images that each of ``images`` holds, enlarged to full size.

    Enlarging is bilinear, as by ``interpolate(..., align_corners=False)``, and differentiable to
    any order.

    Args:
        images: [n, C, H, W], floating-point.
        factor: f, number of cells along each side, in [1, min(H, W)]. With 1, the result is
            ``images`` itself.

    Returns:
        [n·f², C, H, W]: cell (0, 0) of all images first, then cell (0, 1) of all, and so on, as in
        IDC's published code. :func:`decode_labels` gives their labels.

    Raises:
        ValueError, TypeError: an argument does not fit.
    """
    _check("decode", images, factor)
    if factor == 1:
        return images
    H, W = images.shape[2:]
    decoded = [
        _resampled(images[:, :, top:bottom, left:right], "bilinear", (H, W))
        for top, bottom in _cells(H, factor)
        for left, right in _cells(W, factor)
    ]
    return torch.cat(decoded)


def decode_labels(labels: Tensor, factor: int) -> Tensor:
    """Return the labels of the images that :func:`decode` returns.

    Args:
        labels: [n] or [n, classes], labels of the stored images.
        factor: f; with 1, the result is ``labels`` itself.

    Returns:
        [n·f²] or [n·f², classes].

    Raises:
        ValueError, TypeError: an argument does not fit.
    """
    _check_factor("decode_labels", factor)
    if labels.dim() not in (1, 2):
        raise ValueError(
            f"decode_labels: labels must have shape [n] or [n, classes], got {tuple(labels.shape)}"
        )
    if factor == 1:
        return labels
    return labels.repeat(factor**2, *[1] * (labels.dim() - 1))


def combine(images: Tensor, factor: int) -> Tensor:
    """Return images whose cells hold ``images``, shrunk.

    A stage that starts from real images uses it. Shrinking averages over areas; a pixel on an edge
    counts by the part of it that lies inside. IDC's published code takes the nearest pixel instead.
    Differentiable to any order.

    Args:
        images: [n·f², C, H, W], floating-point, in the order of :func:`decode`: the first n go to
            cell (0, 0).
        factor: f, in [1, min(H, W)]. With 1, the result is ``images`` itself.

    Returns:
        [n, C, H, W].

    Raises:
        ValueError, TypeError: an argument does not fit.
    """
    _check("combine", images, factor)
    if len(images) % factor**2:
        raise ValueError(
            f"combine: images must hold a multiple of factor² = {factor**2} images, got "
            f"{len(images)}"
        )
    if factor == 1:
        return images
    H, W = images.shape[2:]
    groups = iter(images.unflatten(0, (factor**2, len(images) // factor**2)))
    rows = [
        [
            _resampled(next(groups), "area", (bottom - top, right - left))
            for left, right in _cells(W, factor)
        ]
        for top, bottom in _cells(H, factor)
    ]
    return torch.cat([torch.cat(row, 3) for row in rows], 2)


def _cells(side: int, factor: int) -> list[tuple[int, int]]:
    """Return the first pixel and the one after the last of each of ``factor`` cells."""
    bounds = [(2 * i * side + factor) // (2 * factor) for i in range(factor + 1)]
    return list(itertools.pairwise(bounds))


def _resampled(images: Tensor, kind: str, size: tuple[int, int]) -> Tensor:
    """Return R X Cᵀ of every plane X of ``images``, with ``size`` H×W."""
    rows, columns = (
        _matrix(kind, before, after, images.dtype, images.device)
        for before, after in zip(images.shape[2:], size, strict=True)
    )
    return rows @ (images @ columns.mT)


# Never cleared, because a captured CUDA graph reads the matrix at its address. There is one of a
# few kilobytes per pair of sides.
@functools.cache
def _matrix(kind: str, before: int, after: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return the weights [after, before] along one side; rows sum to 1."""
    # The first call may come from inside either mode, and later calls from outside.
    with torch.inference_mode(False), torch.no_grad():
        made = _bilinear(before, after) if kind == "bilinear" else _area(before, after)
        return made.to(device, dtype)


def _bilinear(before: int, after: int) -> Tensor:
    place = (
        (torch.arange(after, dtype=torch.float64, device="cpu") + 0.5) * (before / after) - 0.5
    ).clamp_min(0)
    low = place.floor().long().clamp_max(before - 1)
    high, weight = (low + 1).clamp_max(before - 1), place - low
    made, row = (
        torch.zeros(after, before, dtype=torch.float64, device="cpu"),
        torch.arange(after, device="cpu"),
    )
    made.index_put_((row, low), 1 - weight, accumulate=True)
    return made.index_put_((row, high), weight, accumulate=True)


def _area(before: int, after: int) -> Tensor:
    """Return the part of each pixel that lies in [i, i + 1)·before / after.

    The parts are whole numbers up to the last division.
    """
    pixel, cell = (
        torch.arange(before, device="cpu") * after,
        torch.arange(after, device="cpu")[:, None] * before,
    )
    shared = torch.minimum(pixel + after, cell + before) - torch.maximum(pixel, cell)
    return shared.clamp_min(0).double() / before


def _check_factor(operator: str, factor: int) -> None:
    if not isinstance(factor, int) or isinstance(factor, bool):
        raise TypeError(f"{operator}: factor must be a whole number, got {factor!r}")
    if factor < 1:
        raise ValueError(f"{operator}: factor must be at least 1, got {factor}")


def _check(operator: str, images: Tensor, factor: int) -> None:
    _check_factor(operator, factor)
    if images.dim() != 4:
        raise ValueError(
            f"{operator}: images must have shape [n, C, H, W], got {tuple(images.shape)}"
        )
    if not images.is_floating_point():
        raise TypeError(f"{operator}: images must be floating-point, got {images.dtype}")
    H, W = images.shape[2:]
    if factor > min(H, W):
        raise ValueError(
            f"{operator}: factor must be at most {min(H, W)} for images of {H}x{W} pixels, got "
            f"{factor}"
        )
