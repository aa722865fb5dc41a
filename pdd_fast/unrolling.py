"""The differentiable unroll: N SGD steps forward, and their exact adjoint at a memory of (N+1)·P numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable

from pdd_fast import engines
from pdd_fast.augmentation import AugmentParameters, augment, augment_adjoint
from pdd_fast.networks.parameters import check_parameters

MEMORY = ("recompute", "cache")


def unroll(
    net: nn.Module,
    theta: Tensor,
    images: Tensor,
    labels: Tensor,
    learning_rate: Tensor | float,
    batches: Sequence[Tensor],
    augmentations: Sequence[AugmentParameters] | None = None,
    engine: str = "auto",
    memory: str = "recompute",
    *,
    frozen: Tensor | None = None,
) -> Tensor:
    """Parameters after N = ``len(batches)`` SGD steps θ_{i+1} = θ_i − α_i ∇ℓ(θ_i, A_i X[b_i], y[b_i]).

    ℓ is the mean cross-entropy over the batch. The gradient is exact: it equals what autograd gets through all N steps
    with ``create_graph=True``, while only θ_0..θ_N are kept (docs/mathematics.md, section 1).

    Args:
        net: the network; its own parameters are not read and its buffers are not changed.
        theta: [P] start parameters, float32 or float64; fixes the precision and the device.
        images: [n, C, H, W], of the type and device of ``theta``.
        labels: int64 [n] class indices, or [n, classes] weights of the type of ``theta``.
        learning_rate: one rate (0-d or a number) or one per step [N].
        batches: N vectors of int64 indices into ``images``; an image may occur more than once. Keep them on the CPU.
        augmentations: None, or N draws, each for as many images as its batch has.
        engine: "fused" (ConvNet only), "autograd" (any module), or "auto".
        memory: "recompute" makes each step's activations again in the backward pass; "cache" keeps them.
        frozen: None, or bool [n]: images whose gradient is neither needed nor computed (their rows of it are zero).

    Returns:
        θ_N [P], differentiable once with respect to theta, images, float labels and learning_rate.

    Raises:
        ValueError, TypeError: an argument does not fit; the message names it, what it must be and what it is.
    """
    spec = _check(net, theta, images, labels, batches, augmentations, engine, memory, frozen)
    rates = torch.as_tensor(learning_rate, dtype=theta.dtype, device=theta.device)
    _require(rates.dim() == 0 or tuple(rates.shape) == (len(batches),),
             "learning_rate", f"be a number or have shape ({len(batches)},)", tuple(rates.shape))  # fmt: skip
    return _Unroll.apply(theta, images, labels, rates, spec)


def _require(condition: bool, argument: str, requirement: str, value: Any) -> None:
    if not condition:
        raise ValueError(f"unroll: {argument} must {requirement}, got {value}")


@dataclass
class _Spec:
    """What is fixed for one unroll."""

    engine: engines.Engine
    keep: bool
    batches: list[Tensor]  # [b] indices, on the device
    augmentations: list[AugmentParameters | None]
    rows: list[Tensor | None]  # rows of each batch whose image gradient is wanted; None: all


def _check(
    net: nn.Module,
    theta: Tensor,
    images: Tensor,
    labels: Tensor,
    batches: Sequence[Tensor],
    augmentations: Sequence[AugmentParameters] | None,
    engine: str,
    memory: str,
    frozen: Tensor | None,
) -> _Spec:
    if theta.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"unroll: theta must be float32 or float64, got {theta.dtype}")
    check_parameters("unroll", net, theta)
    for name, tensor in (("images", images), ("labels", labels)):
        _require(tensor.device == theta.device, name, f"be on {theta.device}", tensor.device)
        if tensor.dtype != theta.dtype and not (name == "labels" and tensor.dtype == torch.int64):
            also = " or int64" if name == "labels" else ""
            raise TypeError(f"unroll: {name} must be {theta.dtype}{also}, got {tensor.dtype}")
    _require(images.dim() == 4 and len(images) > 0, "images", "have shape [n, C, H, W]", tuple(images.shape))
    n = len(images)
    if labels.dtype == torch.int64:
        _require(tuple(labels.shape) == (n,), "labels", f"have shape ({n},)", tuple(labels.shape))
    else:
        _require(labels.dim() == 2 and len(labels) == n, "labels", f"have shape ({n}, classes)", tuple(labels.shape))
    _check_network(net, images, labels)
    _require(memory in MEMORY, "memory", f"be {' or '.join(MEMORY)}", repr(memory))

    indices = []
    for i, batch in enumerate(batches):
        if batch.dtype != torch.int64:
            raise TypeError(f"unroll: batches[{i}] must be int64, got {batch.dtype}")
        _require(batch.dim() == 1 and batch.numel() > 0, f"batches[{i}]", "be a vector of indices", tuple(batch.shape))
        low, high = int(batch.min()), int(batch.max())
        _require(low >= 0 and high < n, f"batches[{i}]", f"hold indices in [0, {n})", f"{low}..{high}")
        indices.append(batch.to(theta.device))

    draws: list[AugmentParameters | None] = [None] * len(batches)
    if augmentations is not None:
        _require(len(augmentations) == len(batches), "augmentations", f"hold {len(batches)} draws", len(augmentations))
        for i, (draw, batch) in enumerate(zip(augmentations, batches, strict=True)):
            _require(len(draw) == len(batch), f"augmentations[{i}]", f"be drawn for {len(batch)} images", len(draw))
        draws = list(augmentations)

    rows: list[Tensor | None] = [None] * len(batches)
    if frozen is not None:
        if frozen.dtype != torch.bool:
            raise TypeError(f"unroll: frozen must be bool, got {frozen.dtype}")
        _require(tuple(frozen.shape) == (n,), "frozen", f"have shape ({n},)", tuple(frozen.shape))
        mask = frozen.cpu()
        for i, batch in enumerate(batches):
            learned = (~mask[batch.cpu()]).nonzero().flatten()
            rows[i] = None if len(learned) == len(batch) else learned.to(theta.device)
    return _Spec(engines.choose(net, engine), memory == "cache", indices, draws, rows)


def _check_network(net: nn.Module, images: Tensor, labels: Tensor) -> None:
    """Where the module says what it takes, a mismatch is named before a kernel or a matrix product trips over it."""
    channels, size = getattr(net, "in_channels", None), getattr(net, "image_size", None)
    if isinstance(channels, int) and isinstance(size, tuple):
        expected = (channels, *size)
        _require(tuple(images.shape[1:]) == expected, "images", f"have shape [n, {', '.join(map(str, expected))}]",
                 tuple(images.shape))  # fmt: skip
    classes = getattr(net, "num_classes", None)
    if not isinstance(classes, int):
        return
    if labels.dtype == torch.int64:
        low, high = int(labels.min()), int(labels.max())
        _require(low >= 0 and high < classes, "labels", f"lie in [0, {classes})", f"{low}..{high}")
    else:
        _require(labels.shape[1] == classes, "labels", f"have shape ({len(labels)}, {classes})", tuple(labels.shape))


def _step_input(spec: _Spec, i: int, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Augmented images and labels of step i."""
    batch, draw = spec.batches[i], spec.augmentations[i]
    x = images.index_select(0, batch)
    return (x if draw is None else augment(x, draw)), labels.index_select(0, batch)


def _accumulate_rows(target: Tensor, index: Tensor, rows: Tensor) -> None:
    """target[index] += rows with repeated indices, the same bits every time.

    On the CPU index_add_ goes through the rows in order; on CUDA it adds with atomics in any order, while index_put_
    sorts the indices first.
    """
    if target.device.type == "cuda":
        target.index_put_((index,), rows, accumulate=True)
    else:
        target.index_add_(0, index, rows)


class _Unroll(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, theta: Tensor, images: Tensor, labels: Tensor, rates: Tensor, spec: _Spec) -> Tensor:
        steps = len(spec.batches)
        alphas = rates.expand(steps)
        path = theta.new_empty(steps + 1, theta.numel())  # θ_0..θ_N, one a row
        path[0] = theta
        kept = []
        for i in range(steps):
            x, y = _step_input(spec, i, images, labels)
            _, gradient, saved = spec.engine.gradient(path[i], x, y, keep=spec.keep)
            torch.addcmul(path[i], gradient, alphas[i], value=-1, out=path[i + 1])
            kept.append(saved)
        ctx.spec, ctx.kept = spec, kept
        ctx.save_for_backward(images, labels, rates, path)
        return path[steps].clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
        images, labels, rates, path = ctx.saved_tensors  # type: ignore[attr-defined]
        spec: _Spec = ctx.spec  # type: ignore[attr-defined]
        kept: list[Any] = ctx.kept  # type: ignore[attr-defined]
        want_theta, want_images, want_labels, want_rates, _ = ctx.needs_input_grad  # type: ignore[attr-defined]
        steps = len(spec.batches)
        alphas = rates.expand(steps)
        none = torch.empty(0, dtype=torch.int64, device=path.device)
        adjoint = grad.clone()  # λ_{i+1}
        images_grad = torch.zeros_like(images) if want_images else None
        labels_grad = torch.zeros_like(labels) if want_labels else None
        slopes = rates.new_empty(steps)
        for i in reversed(range(steps)):
            x, y = _step_input(spec, i, images, labels)
            rows = spec.rows[i] if want_images else none
            # θ_0's own adjoint is a Hessian-vector product that only the caller can want.
            dual = spec.engine.dual(path[i], x, y, adjoint, kept[i], want_theta=i > 0 or want_theta, rows=rows)
            slopes[i] = dual.slope
            if images_grad is not None and dual.images is not None:
                batch, draw, part = spec.batches[i], spec.augmentations[i], dual.images
                if rows is not None:
                    batch, draw = batch.index_select(0, rows), draw[rows] if draw is not None else None
                if draw is not None:
                    part = augment_adjoint(part, draw)
                _accumulate_rows(images_grad, batch, part.mul_(-alphas[i]))
            if labels_grad is not None and dual.labels is not None:
                _accumulate_rows(labels_grad, spec.batches[i], dual.labels.mul_(-alphas[i]))
            if dual.theta is not None:
                adjoint.addcmul_(dual.theta, alphas[i], value=-1)
        rates_grad = None
        if want_rates:
            rates_grad = -slopes.sum() if rates.dim() == 0 else -slopes
        return adjoint if want_theta else None, images_grad, labels_grad, rates_grad, None
