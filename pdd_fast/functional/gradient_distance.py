"""Distances between gradients, and their gradients with respect to images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from pdd_fast import engines
from pdd_fast.runtime.choices import DISTANCES
from pdd_fast.runtime.errors import require

_NAME = "gradient_matching"


Batches = Tensor | Sequence[Tensor]


# Minimum number of dimensions of a parameter that counts. IDC's published code
# (snu-mllab/Efficient-Dataset-Condensation, `matchloss` of condense.py) skips parameters of one
# dimension unless `--bias true` is given, and those of two unless `--fc true` is given; both
# default to false. The code of DC and DSA (VICO-UoE/DatasetCondensation, `distance_wb` of utils.py)
# uses two dimensions or more.
PARAMETERS = {"convolutions": 3, "weights": 2, "all": 0}


_AUTO = {"squared": "convolutions", "cosine": "weights"}


COSINE_EPS = 1e-6  # added to the product of the two norms, as in both codes


class GradientDistance:
    """Distance D between two gradients of ``net``, with its derivative ∂D/∂g.

    Args:
        net: the network whose parameters' shapes give the parts of a gradient.
        distance: one of :data:`DISTANCES`.
        parameters: one of :data:`PARAMETERS` or "auto", as for :func:`gradient_matching`.

    Raises:
        ValueError: a name is unknown, "all" is combined with "cosine", or ``net`` has no such
            parameters.
    """

    def __init__(self, net: nn.Module, distance: str = "squared", parameters: str = "auto") -> None:
        require(
            _NAME, distance in DISTANCES, "distance", f"be {' or '.join(DISTANCES)}", repr(distance)
        )
        allowed = ["auto", *(name for name in PARAMETERS if distance == "squared" or name != "all")]
        require(
            _NAME,
            parameters in allowed,
            "parameters",
            f"be one of {', '.join(allowed)} where distance is {distance!r}",
            repr(parameters),
        )
        self.distance, self.parameters = (
            distance,
            _AUTO[distance] if parameters == "auto" else parameters,
        )
        self._parts: list[tuple[slice, int]] = []  # slice of the vector, number of its rows
        start = 0
        for parameter in net.parameters():
            stop = start + parameter.numel()
            if parameter.requires_grad and parameter.dim() >= PARAMETERS[self.parameters]:
                self._parts.append((slice(start, stop), len(parameter) if parameter.dim() else 1))
            start = stop
        least = PARAMETERS[self.parameters]
        require(
            _NAME,
            bool(self._parts),
            "parameters",
            f"be such that the network has some (of {least} dimensions or more) that require "
            "gradients",
            repr(parameters),
        )

    @torch.no_grad()
    def __call__(self, gradient: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Return D [] and ∂D/∂gradient [P] of two gradients [P].

        The derivative is zero at parameters that do not count.
        """
        direction = torch.zeros_like(gradient)
        if self.distance == "squared":
            for part, _ in self._parts:
                torch.sub(gradient[part], target[part], out=direction[part])
            return direction.square().sum(), direction.mul_(2)
        values = [
            _cosine(gradient[part], target[part], rows, direction[part])
            for part, rows in self._parts
        ]
        return torch.stack(values).sum(), direction


def _cosine(gradient: Tensor, target: Tensor, rows: int, direction: Tensor) -> Tensor:
    """Return Σ over rows of 1 − g·t / (‖g‖‖t‖ + ε) and write its derivative into ``direction``.

    The derivative of ‖g‖ at g = 0 is taken to be 0, as in torch.

    Args:
        gradient: g, [rows · columns].
        target: t, [rows · columns].
        rows: number of rows.
        direction: [rows · columns], overwritten.
    """
    g, t = gradient.view(rows, -1), target.view(rows, -1)
    g_norm, t_norm = g.norm(dim=1, keepdim=True), t.norm(dim=1, keepdim=True)
    scale = g_norm * t_norm + COSINE_EPS
    cosine = (g * t).sum(1, keepdim=True) / scale
    along = torch.where(g_norm > 0, cosine * (t_norm / (scale * g_norm)), 0)
    torch.sub(along * g, t / scale, out=direction.view(rows, -1))
    return (1 - cosine).sum()


class Matched(NamedTuple):
    """Distance with its derivatives."""

    loss: Tensor  # []
    images: Tensor | None  # [rows, C, H, W]; None if not wanted
    labels: Tensor | None  # [n, classes]; None for class indices


def matched_gradients(
    engine: engines.Engine,
    theta: Tensor,
    target: Tensor,
    images: Tensor,
    labels: Tensor,
    distance: GradientDistance,
    *,
    keep: bool = True,
    rows: Tensor | None = None,
) -> Matched:
    """Return D(∇_θ ℓ(θ, X, y), target) with its derivatives.

    This takes one gradient pass and one dual pass. It records no graph, checks nothing, and never
    waits for the device.

    Args:
        engine: computes the gradient and the dual pass.
        theta: [P].
        target: [P], the gradient of the real images (:func:`class_gradients`).
        images: [n, C, H, W].
        labels: int64 [n] or weights [n, classes].
        distance: D.
        keep: as for :func:`gradient_matching`.
        rows: int64 indices of the images whose derivative is wanted; :class:`Matched` holds the
            derivative of these images only. None means all images, an empty tensor none.
    """
    with torch.no_grad():
        _, gradient, saved = engine.gradient(theta, images, labels, keep=keep)
        loss, direction = distance(gradient, target)
        dual = engine.dual(theta, images, labels, direction, saved, want_theta=False, rows=rows)
    return Matched(loss, dual.images, dual.labels)


def class_gradients(
    engine: engines.Engine, theta: Tensor, images: Batches, labels: Batches
) -> Tensor:
    """Return ∇_θ ℓ [K, P] of K batches at the same parameters.

    No graph is recorded.

    Args:
        engine: computes the gradients.
        theta: [P].
        images: [K, B, C, H, W] or K tensors [B_k, C, H, W].
        labels: int64 or weights: [K, B], [K, B, classes], or K tensors [B_k] or [B_k, classes].
    """
    with torch.no_grad():
        each = [engine.gradient(theta, x, y)[1] for x, y in zip(images, labels, strict=True)]
        return torch.stack(each)
