"""Differentiable unroll: N SGD steps forward, and their exact adjoint.

The unroll saves (N+1)·P elements, the parameters of every step. It may save activations too where
memory allows, which spares the adjoint a recomputation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pdd_fast import engines
from pdd_fast.augmentation.dsa import AugmentParameters, PackedAugmentParameters
from pdd_fast.functional.first_order import first_order_only
from pdd_fast.networks.arguments import (
    as_indices,
    as_labels,
    check_batch,
    check_theta,
    moving_parameters,
    require_plain_call,
)
from pdd_fast.ops import convnet
from pdd_fast.ops._threads import in_pieces, select_rows
from pdd_fast.ops.add_rows import add_rows
from pdd_fast.runtime import device_memory
from pdd_fast.runtime.errors import require

MEMORY = ("recompute", "cache", "auto")
_require = partial(require, "unroll")


def unroll(
    net: nn.Module,
    theta: Tensor,
    images: Tensor,
    labels: Tensor,
    learning_rate: Tensor | float | Sequence[Tensor | float],
    batches: Sequence[Tensor | Sequence[int]],
    augmentations: Sequence[AugmentParameters] | None = None,
    engine: str = "auto",
    memory: str = "recompute",
    *,
    memory_limit: int | None = None,
    frozen: Tensor | None = None,
    precision: str = "float32",
    convolution: str = "auto",
) -> Tensor:
    """Return the parameters after N = ``len(batches)`` SGD steps on synthetic images.

    Step i computes θ_{i+1} = θ_i − α_i ∇ℓ(θ_i, A_i X[b_i], y[b_i]), with ℓ the mean cross-entropy
    over the batch. The gradient is exact: it equals what autograd computes through all N steps with
    ``create_graph=True``, although only θ_0..θ_N are saved (docs/mathematics.md, section 1).

    Args:
        net: the network. Its own parameter values are not read and its buffers are not changed.
            Parameters that do not require gradients are frozen: the steps leave their elements of
            ``theta`` unchanged. Do not change layers and hooks before the backward pass, which
            recomputes the steps.
        theta: [P] start parameters, float32 or float64. They fix the precision and the device.
        images: [n, C, H, W], with the type and device of ``theta``.
        labels: class indices [n], or weights [n, classes] with the type of ``theta``. Integers of
            any type, whole numbers in a floating-point vector [n], and one-hot rows of integers or
            bools are converted.
        learning_rate: one learning rate (0-d or a number), or one per step [N].
        batches: N vectors of indices into ``images``, tensors or lists. An image may occur more
            than once. Keep them on the CPU.
        augmentations: None, or N :class:`pdd_fast.AugmentParameters`, each for as many images as
            its batch has.
        engine: "fused" (a ConvNet with the layers and parameters that its constructor made),
            "autograd" (any module), or "auto": "fused" if it applies.
        memory: "recompute" recomputes the activations of each step in the backward pass. "cache"
            saves them; those of a step are freed as soon as the backward pass has used them. "auto"
            saves the activations of as many steps as fit in ``memory_limit``, starting from the
            last step, which the backward pass needs first. The gradient differs by rounding. The
            CPU memory of the fused engine is then held for the next call
            (:func:`pdd_fast.free_buffers`).
        memory_limit: bytes that saved activations may take with "auto". None: half of the memory
            that is free at the moment, so rounding depends on the machine's load. θ_0..θ_N and the
            working memory of one pass are not counted.
        frozen: None, or bool [n]: images whose gradient is not needed. It is not computed; their
            rows are zero.
        precision: of convolutions: "float32", "tf32" or "bfloat16" (docs/precision.md).
        convolution: algorithm of the fused engine on the CPU: "direct", "winograd" (F(4×4, 3×3),
            fewer operations and a larger rounding error), or "auto", which chooses the faster one
            per layer.

    Returns:
        θ_N [P], differentiable once with respect to theta, images, float labels and learning_rate.
        A second derivative raises RuntimeError.

    Raises:
        ValueError, TypeError: an argument does not fit. The message names the argument, the
            requirement and the value.

    Example:
        >>> import torch
        >>> import pdd_fast
        >>> net = pdd_fast.ConvNet(in_channels=1, num_classes=2, image_size=8, width=4, depth=1)
        >>> theta = pdd_fast.flatten_parameters(net)
        >>> images = torch.randn(4, 1, 8, 8, requires_grad=True)
        >>> labels = torch.tensor([0, 1, 0, 1])
        >>> lr = torch.tensor(0.01, requires_grad=True)
        >>> theta_N = pdd_fast.unroll(net, theta, images, labels, lr, batches=[[0, 1], [2, 3]])
        >>> theta_N.square().sum().backward()
        >>> images.grad.shape, lr.grad.shape
        (torch.Size([4, 1, 8, 8]), torch.Size([]))
    """
    require_plain_call("unroll", (theta, images, labels, learning_rate))
    chosen = engines.choose(net, engine, precision, convolution)
    indices = [as_indices("unroll", batch, f"batches[{i}]") for i, batch in enumerate(batches)]
    labels = as_labels("unroll", labels, theta.dtype)
    spec = _check(chosen, theta, images, labels, indices, augmentations, frozen)
    # Called even if no activations will be saved, so that a wrong argument is an error with or
    # without gradients.
    shapes = [engines.PassShape.of(images, len(batch)) for batch in indices]
    keep = kept_steps("unroll", chosen, shapes, memory, memory_limit)
    # The list may hold tensors, whose gradients as_tensor would lose.
    if isinstance(learning_rate, list | tuple):
        each = [torch.as_tensor(lr, dtype=theta.dtype, device=theta.device) for lr in learning_rate]
        learning_rate = torch.stack(each) if each else theta.new_empty(0)
    lrs = torch.as_tensor(learning_rate, dtype=theta.dtype, device=theta.device)
    _require(
        lrs.dim() == 0 or tuple(lrs.shape) == (len(indices),),
        "learning_rate",
        f"be a number or have shape ({len(indices)},)",
        tuple(lrs.shape),
    )
    if torch.is_grad_enabled() and any(t.requires_grad for t in (theta, images, labels, lrs)):
        spec = replace(spec, keep=keep)
    return _Unroll.apply(theta, images, labels, lrs, spec)


def kept_steps(
    operator: str,
    engine: engines.Engine,
    shapes: Sequence[engines.PassShape],
    memory: str,
    limit: int | None,
) -> int:
    """Return the number of steps that save their activations, counted from the last.

    Args:
        operator: function that the arguments belong to, for errors.
        engine: engine of the unroll.
        shapes: shape of the batch of every step.
        memory: as ``memory`` of :func:`unroll`.
        limit: as ``memory_limit`` of :func:`unroll`.

    Raises:
        ValueError, TypeError: ``memory`` or ``limit`` is invalid.
    """
    if memory not in MEMORY:
        raise ValueError(f"{operator}: memory must be {' or '.join(MEMORY)}, got {memory!r}")
    if limit is not None:
        if not isinstance(limit, int) or isinstance(limit, bool):
            raise TypeError(
                f"{operator}: memory_limit must be a whole number of bytes or None, got {limit!r}"
            )
        if limit < 0:
            raise ValueError(f"{operator}: memory_limit must be at least 0, got {limit}")
        if memory == "cache":
            raise ValueError(
                f"{operator}: memory_limit must be None where memory is 'cache', got {limit}; use "
                f"'auto'"
            )
    if memory != "auto":
        return len(shapes) if memory == "cache" else 0
    if not shapes:
        return 0
    left = (
        device_memory.free(shapes[0].device, reclaimable=convnet.idle_bytes()) // 2
        if limit is None
        else limit
    )
    of_one = {shape: engine.kept_bytes(shape) for shape in set(shapes)}
    for count, shape in enumerate(reversed(shapes)):
        left -= of_one[shape]
        if left < 0:
            return count
    return len(shapes)


# ---- the two passes: tensors of fixed shapes, no autograd, no wait for the device ----


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
    kept, first = [], len(spec.batches) - spec.keep
    for i in range(len(spec.batches)):
        x, y = _step_input(spec, i, images, labels)
        _, gradient, saved = spec.engine.gradient(points[i], x, y, keep=i >= first)
        if spec.moving is not None:
            gradient = gradient.masked_fill(~spec.moving, 0)
        for old, moved, new in in_pieces(points[i], gradient, points[i + 1]):
            torch.addcmul(old, moved, lrs[i], value=-1, out=new)
        kept.append(saved)
    return path, kept


def adjoint(
    spec: UnrollSpec,
    path: Tensor,
    kept: list[Any],
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
        kept: from the same call. Its activations are freed step by step; a second call recomputes
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
        saved, kept[i] = kept[i], spec.engine.without_activations(kept[i])
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


class _Unroll(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, theta: Tensor, images: Tensor, labels: Tensor, lrs: Tensor, spec: UnrollSpec
    ) -> Tensor:
        path, kept = forward_path(spec, theta, images, labels, lrs.expand(len(spec.batches)))
        ctx.spec, ctx.kept = spec, kept
        # θ_0 is saved only to make a second derivative through it an error: path holds a copy of
        # its values. A constant theta is not saved, because the caller may write to it.
        ctx.save_for_backward(theta if ctx.needs_input_grad[0] else None, images, labels, lrs, path)
        return path[-1].clone()

    @staticmethod
    @first_order_only("unroll")
    def backward(ctx: Any, saved: tuple[Tensor, ...], grad: Tensor) -> tuple[Tensor | None, ...]:
        _, images, labels, lrs, path = saved
        spec: UnrollSpec = ctx.spec
        wanted = Wanted(*ctx.needs_input_grad[:3])
        alphas = lrs.expand(len(spec.batches))
        found = adjoint(spec, path, ctx.kept, images, labels, alphas, grad, wanted)
        rates_grad = None
        if ctx.needs_input_grad[3]:
            rates_grad = -found.slopes.sum() if lrs.dim() == 0 else -found.slopes
        return found.theta, found.images, found.labels, rates_grad, None


# ---- checks ----


def _check(
    engine: engines.Engine,
    theta: Tensor,
    images: Tensor,
    labels: Tensor,
    batches: Sequence[Tensor],
    augmentations: Sequence[AugmentParameters] | None,
    frozen: Tensor | None,
) -> UnrollSpec:
    check_theta("unroll", engine.net, theta)
    check_batch("unroll", engine.shape, theta, images, labels)
    n = len(images)
    for i, batch in enumerate(batches):
        low, high = (int(bound) for bound in torch.aminmax(batch))
        _require(
            low >= 0 and high < n, f"batches[{i}]", f"hold indices in [0, {n})", f"{low}..{high}"
        )

    aug_params: list[PackedAugmentParameters | None] = [None] * len(batches)
    if augmentations is not None:
        _require(
            len(augmentations) == len(batches),
            "augmentations",
            f"hold {len(batches)} AugmentParameters",
            len(augmentations),
        )
        H, W = images.shape[2:]
        for i, (draw, batch) in enumerate(zip(augmentations, batches, strict=True)):
            _require(
                len(draw) == len(batch),
                f"augmentations[{i}]",
                f"be drawn for {len(batch)} images",
                len(draw),
            )
            drawn = draw.image_size
            _require(
                drawn == (H, W),
                f"augmentations[{i}]",
                f"be drawn for images of {H}x{W} pixels",
                drawn,
            )
            if draw.operations:
                packed = draw.packed(theta.device)
                # Copied, because the caller may write to its own tensor.
                aug_params[i] = packed._replace(values=packed.values.clone())

    rows: list[Tensor | None] = [None] * len(batches)
    if frozen is not None:
        if frozen.dtype != torch.bool:
            raise TypeError(f"unroll: frozen must be bool, got {frozen.dtype}")
        _require(tuple(frozen.shape) == (n,), "frozen", f"have shape ({n},)", tuple(frozen.shape))
        mask = frozen.cpu()
        for i, batch in enumerate(batches):
            learned = learned_rows(~mask[batch.cpu()])
            rows[i] = None if learned is None else learned.to(theta.device)
    indices = [batch.to(theta.device) for batch in batches]
    return UnrollSpec(
        engine, indices, aug_params, rows, moving_parameters("unroll", engine.net, theta)
    )
