"""Helpers of the tests of whitening."""

from __future__ import annotations

from pathlib import Path

import tiny
import torch
from torch import Tensor

from pdd_fast import data
from pdd_fast.progressive.stages import distill
from pdd_fast.settings import resolve
from pdd_fast.storage.run import Run


def photographs(
    count: int = 300, channels: int = 3, height: int = 5, width: int = 4, seed: int = 0
) -> Tensor:
    """Images whose pixels depend on their neighbors, some of them hardly varying."""
    draw = torch.Generator().manual_seed(seed)
    size = channels * height * width
    mixing = torch.randn(size, size, generator=draw) * torch.linspace(0.01, 1, size)
    return (torch.randn(count, size, generator=draw) @ mixing + 0.3).view(
        count, channels, height, width
    )


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


def digits_pixels() -> dict[str, Tensor]:
    """The pixels in [0, 1] of every split of the digits."""
    plain = data.load("digits")
    return {
        name: plain.normalization.invert(getattr(plain, name).images)
        for name in ("full_train", "train", "validation", "test")
    }


def finished(path: Path, **changes: object) -> Run:
    run = Run.create(
        path, resolve(**(tiny.SETTINGS | {"whitening": "zca", "iterations": 0} | changes))
    )
    distill(run)
    return run
