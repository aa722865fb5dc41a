"""Gradient matching: the distance between parameter gradients of synthetic and of real images.

With g = ∇_θ ℓ on the synthetic images and v = ∂D/∂g, the gradient of D with respect to the images
is the tangent of ∇_x ℓ along v (docs/mathematics.md, section 8). One dual pass without its
Hessian-vector product therefore replaces a double backward pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pdd_fast import engines
from pdd_fast.functional.first_order import first_order_only
from pdd_fast.functional.gradient_distance import (
    _NAME,
    Batches,
    GradientDistance,
    class_gradients,
    matched_gradients,
)
from pdd_fast.networks.arguments import as_labels, check_batch, check_theta, require_plain_call
from pdd_fast.ops.convnet import ConvNetShape
from pdd_fast.runtime.errors import require


def gradient_matching(
    net: nn.Module,
    theta: Tensor,
    real_images: Batches,
    real_labels: Batches,
    images: Batches,
    labels: Batches,
    distance: str = "squared",
    *,
    parameters: str = "auto",
    keep: bool = True,
    engine: str = "auto",
    precision: str = "float32",
    convolution: str = "auto",
) -> Tensor:
    """Return the distance D between the gradients of synthetic and of real images.

    D(∇_θ ℓ(θ, X, y), ∇_θ ℓ(θ, X_real, y_real)) is computed for one pair of batches, or summed over
    K pairs, for example one per class. ℓ is the mean cross-entropy over a batch.

    The gradient of D is exact: it equals that of autograd with ``create_graph=True``. It is
    computed together with the value, so that the backward pass only scales it.

    Sources: Zhao et al., "Dataset condensation with gradient matching" (DC, ICLR 2021), and Kim et
    al., "Dataset condensation via efficient synthetic-data parameterization" (IDC, ICML 2022).

    Args:
        net: the network. Its own parameter values are not read and its buffers are not changed.
            Parameters that do not require gradients are frozen and do not count.
        theta: [P] parameters, float32 or float64, a constant. They fix the precision and the
            device.
        real_images: [B, C, H, W], with the type and device of ``theta``; constants. For K pairs:
            [K, B, C, H, W], or a sequence of K tensors [B_k, C, H, W].
        real_labels: class indices [B] or weights [B, classes], converted as for
            :func:`pdd_fast.unroll`. For K pairs: [K, B], [K, B, classes] or a sequence.
        images: synthetic images [n, C, H, W], [K, n, C, H, W] or K tensors [n_k, C, H, W].
        labels: labels of ``images``, in the same forms as ``real_labels``.
        distance: D for two gradients g and t. "squared": the sum of (g − t)². "cosine": the sum of
            1 − g·t / (‖g‖‖t‖ + 1e-6) over all weights and, within a weight, over its output rows,
            each flattened. A row of zeros counts 1. The distance of a gradient from itself is 0 up
            to the 1e-6.
        parameters: parameters that count: "convolutions" (three dimensions or more), "weights" (two
            or more, so linear layers too), "all" (biases and norms too; for "squared" only), or
            "auto". "auto" means "convolutions" for "squared", as in IDC, and "weights" for
            "cosine", as in DC and DSA.
        keep: save the activations of the pass that computes g for the dual pass that follows, which
            then does not recompute them. Only one batch's activations are alive at a time. The
            gradient differs by rounding.
        engine: "fused" (ConvNet only), "autograd" (any module), or "auto".
        precision: of convolutions: "float32", "tf32" or "bfloat16" (docs/precision.md).
        convolution: algorithm of the fused engine on the CPU: "direct", "winograd" or "auto".

    Returns:
        0-d tensor, differentiable once with respect to ``images`` and float ``labels``. A second
        derivative raises RuntimeError.

    Raises:
        ValueError, TypeError: an argument does not fit. The message names the argument, the
            requirement and the value.

    Example:
        >>> import torch
        >>> import pdd_fast
        >>> net = pdd_fast.ConvNet(in_channels=1, num_classes=2, image_size=8, width=4, depth=1)
        >>> theta = pdd_fast.flatten_parameters(net)
        >>> real_images, real_labels = torch.randn(6, 1, 8, 8), torch.tensor([0, 1] * 3)
        >>> images = torch.randn(2, 1, 8, 8, requires_grad=True)
        >>> labels = torch.tensor([0, 1])
        >>> loss = pdd_fast.gradient_matching(net, theta, real_images, real_labels, images, labels)
        >>> loss.backward()
        >>> images.grad.shape
        torch.Size([2, 1, 8, 8])
    """
    given = (real_images, real_labels, images, labels)
    each = (
        tensor for part in given for tensor in (part if isinstance(part, list | tuple) else [part])
    )
    require_plain_call(_NAME, [theta, *each])
    chosen = engines.choose(net, engine, precision, convolution)
    measured = GradientDistance(net, distance, parameters)
    check_theta(_NAME, net, theta)
    require(
        _NAME,
        not theta.requires_grad,
        "theta",
        "be a constant",
        "one that requires a gradient; detach it",
    )
    real = _pairs(chosen.shape, theta, real_images, real_labels, ("real_images", "real_labels"))
    synthetic = _pairs(chosen.shape, theta, images, labels, ("images", "labels"))
    require(
        _NAME,
        len(real) == len(synthetic),
        "images",
        f"hold {len(real)} batches, as real_images does",
        len(synthetic),
    )
    if len(real) == 1:
        _, target, _ = chosen.gradient(theta, real[0].images.detach(), real[0].labels.detach())
        targets = target[None]
    else:
        targets = class_gradients(chosen, theta, real_images, [each.labels for each in real])
    tensors = [*(each.images for each in synthetic), *(each.labels for each in synthetic)]
    wanted = [torch.is_grad_enabled() and each.images.requires_grad for each in synthetic]
    follow = [
        torch.is_grad_enabled() and (each.images.requires_grad or each.labels.requires_grad)
        for each in synthetic
    ]
    spec = _Spec(chosen, measured, theta, targets, keep, wanted, follow)
    return _GradientMatching.apply(spec, *tensors)


# ---- without autograd: the interface of the methods ----


# ---- with autograd ----


class _Pair(NamedTuple):
    images: Tensor  # [n, C, H, W]
    labels: Tensor  # [n] or [n, classes]


@dataclass(frozen=True)
class _Spec:
    """Constants of one call."""

    engine: engines.Engine
    distance: GradientDistance
    theta: Tensor  # [P]
    targets: Tensor  # [K, P]
    keep: bool
    wanted: list[bool]  # per pair: whether the derivative of its images is wanted
    follow: list[bool]  # per pair: whether any derivative is wanted


class _GradientMatching(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, spec: _Spec, *tensors: Tensor) -> Tensor:
        pairs = len(spec.targets)
        total, found = spec.theta.new_zeros(()), list[Tensor | None]([None] * len(tensors))
        for k, (images, labels) in enumerate(zip(tensors[:pairs], tensors[pairs:], strict=True)):
            if not spec.follow[k]:
                _, gradient, _ = spec.engine.gradient(spec.theta, images, labels)
                total = total + spec.distance(gradient, spec.targets[k])[0]
                continue
            # D is itself the scalar that is differentiated, so its gradient is known up to the
            # factor that the backward pass receives.
            loss, found[k], found[pairs + k] = matched_gradients(
                spec.engine,
                spec.theta,
                spec.targets[k],
                images,
                labels,
                spec.distance,
                keep=spec.keep,
                rows=None if spec.wanted[k] else images.new_empty(0, dtype=torch.int64),
            )
            total = total + loss
        # The inputs are saved only to make a second derivative through them an error.
        ctx.save_for_backward(
            *found,
            *(
                t if need else None
                for t, need in zip(tensors, ctx.needs_input_grad[1:], strict=True)
            ),
        )
        ctx.derivatives = len(found)
        return total

    @staticmethod
    @first_order_only(_NAME)
    def backward(
        ctx: Any, saved: tuple[Tensor | None, ...], grad: Tensor
    ) -> tuple[Tensor | None, ...]:
        found = saved[: ctx.derivatives]
        return None, *(None if each is None else grad * each for each in found)


def _pairs(
    known: ConvNetShape | None,
    theta: Tensor,
    images: Batches,
    labels: Batches,
    names: tuple[str, str],
) -> list[_Pair]:
    """Return the batches of one side, each checked.

    A tensor with one dimension more than a batch holds K batches.
    """
    images_name, labels_name = names
    for name, given in zip(names, (images, labels), strict=True):
        tensors = [given] if isinstance(given, Tensor) else given
        if not isinstance(tensors, Sequence) or not all(
            isinstance(each, Tensor) for each in tensors
        ):
            raise TypeError(
                f"{_NAME}: {name} must be a tensor or a sequence of tensors, got "
                f"{type(given).__name__}"
            )
    if isinstance(images, Tensor) and images.dim() != 5:
        if not isinstance(labels, Tensor):
            raise TypeError(
                f"{_NAME}: {labels_name} must be a tensor, as {images_name} is, got a sequence"
            )
        labels = as_labels(_NAME, labels, theta.dtype, labels_name)
        check_batch(_NAME, known, theta, images, labels, names)
        return [_Pair(images, labels)]
    count = len(images)
    require(_NAME, count > 0, images_name, "hold a batch at least", "none")
    require(
        _NAME,
        (labels.dim() > 0 if isinstance(labels, Tensor) else True) and len(labels) == count,
        labels_name,
        f"hold {count} batches, as {images_name} does",
        _size(labels),
    )
    found = [
        _Pair(x, as_labels(_NAME, y, theta.dtype, f"{labels_name}[{k}]"))
        for k, (x, y) in enumerate(zip(images, labels, strict=True))
    ]
    for k, pair in enumerate(found):
        check_batch(_NAME, known, theta, *pair, (f"{images_name}[{k}]", f"{labels_name}[{k}]"))
    return found


def _size(batches: Batches) -> str:
    return f"shape {tuple(batches.shape)}" if isinstance(batches, Tensor) else str(len(batches))
