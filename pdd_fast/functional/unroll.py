"""Differentiable unroll: N SGD steps forward, and their exact adjoint.

The unroll saves (N+1)·P elements, the parameters of every step. It may save activations too where
memory allows, which spares the adjoint a recomputation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from pdd_fast import engines
from pdd_fast.augmentation.parameters import AugmentParameters, PackedAugmentParameters
from pdd_fast.functional.adjoint import UnrollSpec, Wanted, adjoint, forward_path, learned_rows
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
from pdd_fast.runtime import device_memory
from pdd_fast.runtime.choices import MEMORY
from pdd_fast.runtime.errors import require

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
    keep = saved_steps("unroll", chosen, shapes, memory, memory_limit)
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


def saved_steps(
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
                "'auto'"
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
    of_one = {shape: engine.saved_bytes(shape) for shape in set(shapes)}
    for count, shape in enumerate(reversed(shapes)):
        left -= of_one[shape]
        if left < 0:
            return count
    return len(shapes)


# ---- the two passes: tensors of fixed shapes, no autograd, no wait for the device ----


class _Unroll(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, theta: Tensor, images: Tensor, labels: Tensor, lrs: Tensor, spec: UnrollSpec
    ) -> Tensor:
        path, states = forward_path(spec, theta, images, labels, lrs.expand(len(spec.batches)))
        ctx.spec, ctx.states = spec, states
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
        found = adjoint(spec, path, ctx.states, images, labels, alphas, grad, wanted)
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
