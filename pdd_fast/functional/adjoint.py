"""The forward path of unrolled SGD and its adjoint."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pdd_fast import engines
from pdd_fast.augmentation.parameters import PackedAugmentParameters
from pdd_fast.ops._threads import in_pieces, select_rows
from pdd_fast.ops.add_rows import add_rows


@dataclass(frozen=True)
class UnrollSpec:
    """Constants of one unroll of N steps, on its device.

    Every list has one entry per step.
    """

    engine: engines.Engine
    batches: Sequence[Tensor]  # int64 [b]
    aug_params: Sequence[PackedAugmentParameters | None]  # of b images; None: no augmentation
    # int64, rows of the batch whose image gradient is wanted; None: all
    rows: Sequence[Tensor | None]
    moving: Tensor | None = None  # bool [P], elements that the steps change; None: all
    keep: int = 0  # number of steps, counted from the last, that save their activations
    # Number of leading images that no entry of ``rows`` contains. The gradient of the images starts
    # after them.
    frozen: int = 0


class Wanted(NamedTuple):
    """Gradients that :func:`adjoint` computes; the slopes come at no cost."""

    theta: bool
    images: bool
    labels: bool


class Gradients(NamedTuple):
    """Derivatives of an outer loss L through the unroll (docs/mathematics.md, section 1)."""

    theta: Tensor | None  # [P] ∂L/∂θ_0; None if not wanted, as below
    images: Tensor | None  # [n, C, H, W], without the spec's leading frozen images
    labels: Tensor | None  # [n, classes]
    slopes: Tensor  # [N] s_i = −∂L/∂α_i


def forward_path(
    spec: UnrollSpec, theta: Tensor, images: Tensor, labels: Tensor, alphas: Tensor
) -> tuple[Tensor, list[Any]]:
    """Return θ_0..θ_N as [N + 1, P], and what the engine saved of every step.

    Args:
        spec: constants of the unroll.
        theta: [P].
        images: [n, C, H, W].
        labels: int64 [n] or weights [n, classes].
        alphas: [N], learning rate of every step.
    """
    path = _parameter_rows(theta, len(spec.batches) + 1)
    for start, piece in in_pieces(path[0], theta):
        start.copy_(piece)
    points, lrs = path.unbind(), alphas.unbind()
    states, first = [], len(spec.batches) - spec.keep
    for i in range(len(spec.batches)):
        x, y = _step_input(spec, i, images, labels)
        _, gradient, saved = spec.engine.gradient(points[i], x, y, keep=i >= first)
        if spec.moving is not None:
            gradient = gradient.masked_fill(~spec.moving, 0)
        for old, moved, new in in_pieces(points[i], gradient, points[i + 1]):
            torch.addcmul(old, moved, lrs[i], value=-1, out=new)
        states.append(saved)
    return path, states


def adjoint(
    spec: UnrollSpec,
    path: Tensor,
    states: list[Any],
    images: Tensor,
    labels: Tensor,
    alphas: Tensor,
    grad: Tensor,
    wanted: Wanted,
) -> Gradients:
    """Return the gradients of the unroll, computed from λ_N = ``grad`` by one dual pass per step.

    Args:
        spec: constants of the unroll.
        path: from :func:`forward_path`, called with the same ``spec``, ``images``, ``labels`` and
            ``alphas``.
        states: from the same call. Its activations are freed step by step; a second call recomputes
            them.
        images: [n, C, H, W].
        labels: int64 [n] or weights [n, classes].
        alphas: [N], learning rate of every step.
        grad: λ_N [P], the gradient of the outer loss with respect to θ_N.
        wanted: gradients to compute. Class indices have none.
    """
    steps = len(spec.batches)
    none = torch.empty(0, dtype=torch.int64, device=path.device)
    carried = grad.clone()  # λ_{i+1}
    images_grad = torch.empty_like(images[spec.frozen :]) if wanted.images else None
    labels_grad = torch.zeros_like(labels) if wanted.labels else None
    for (piece,) in in_pieces(images_grad) if images_grad is not None else ():
        piece.zero_()
    slopes = alphas.new_empty(steps)
    # Unbound once, because indexing a tensor takes 2 µs each time.
    points, lrs, downhill = path.unbind(), alphas.unbind(), (-alphas).unbind()
    for i in reversed(range(steps)):
        x, y = _step_input(spec, i, images, labels)
        rows = spec.rows[i] if wanted.images else none
        # The adjoint of θ_0 is a Hessian-vector product that only the caller can want.
        saved, states[i] = states[i], spec.engine.without_activations(states[i])
        direction = carried if spec.moving is None else carried.masked_fill(~spec.moving, 0)
        dual = spec.engine.dual(
            points[i], x, y, direction, saved, want_theta=i > 0 or wanted.theta, rows=rows
        )
        del saved  # frees the step's activations before the next dual pass
        slopes[i] = dual.slope
        if images_grad is not None and dual.images is not None:
            batch, aug_params, part = spec.batches[i], spec.aug_params[i], dual.images
            if rows is not None:
                batch, aug_params = (
                    batch.index_select(0, rows),
                    None if aug_params is None else _part(aug_params, rows),
                )
            if aug_params is not None:
                part = aug_params.adjoint(part)
            for (piece,) in in_pieces(part):
                piece.mul_(downhill[i])
            images_grad = add_rows(images_grad, batch - spec.frozen if spec.frozen else batch, part)
        if labels_grad is not None and dual.labels is not None:
            labels_grad = add_rows(labels_grad, spec.batches[i], dual.labels.mul_(downhill[i]))
        if dual.theta is not None:
            for piece, change in in_pieces(carried, dual.theta):
                piece.addcmul_(change, lrs[i], value=-1)
    return Gradients(carried if wanted.theta else None, images_grad, labels_grad, slopes)


def _parameter_rows(like: Tensor, rows: int) -> Tensor:
    """Return an uninitialized tensor [rows, P]."""
    if like.device.type != "cuda":
        return like.new_empty(rows, like.numel())
    # Rows are padded to 64 elements: P is rarely a multiple of 4, and convolutions whose weights
    # are not aligned to 16 bytes take slower kernels.
    padded = -(-like.numel() // 64) * 64
    return like.new_empty(rows, padded)[:, : like.numel()]


def learned_rows(learned: Tensor) -> Tensor | None:
    """Return the rows of a batch whose images are learned, as :class:`UnrollSpec` takes them.

    Args:
        learned: bool [b].

    Returns:
        int64 indices; None if all images are learned.
    """
    rows = learned.nonzero().flatten()
    return None if len(rows) == len(learned) else rows


def _step_input(spec: UnrollSpec, i: int, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return the augmented images and the labels of step i."""
    batch, aug_params = spec.batches[i], spec.aug_params[i]
    x = select_rows(images, batch)
    return (x if aug_params is None else aug_params.apply(x)), labels.index_select(0, batch)


def _part(aug_params: PackedAugmentParameters, rows: Tensor) -> PackedAugmentParameters:
    """Return the augmentation parameters of some of the images."""
    return PackedAugmentParameters(
        aug_params.values.index_select(1, rows),
        aug_params.operations.index_select(1, rows),
        aug_params.cutout_size,
    )
