"""Softmax cross-entropy with hard or soft labels: losses and gradient, also on dual numbers.

For one sample with logits l, label weights y and p = softmax(l): loss = -Σ_k y_k log p_k. Gradients
are those of the mean over the batch, as in ``torch.nn.functional.cross_entropy``. On dual numbers,
with tangent l̇, the tangent of log p is l̇ - Σ_j p_j l̇_j.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pdd_fast.ops import _native
from pdd_fast.ops._registry import operator, require_floating, require_like
from pdd_fast.runtime.errors import require


def _check_labels(name: str, logits: Tensor, labels: Tensor) -> None:
    require_floating(name, "logits", logits)
    require(name, logits.dim() == 2, "logits", "have shape [B, K]", tuple(logits.shape))
    require(
        name,
        logits.shape[0] > 0 and logits.shape[1] > 0,
        "logits",
        "not be empty",
        tuple(logits.shape),
    )
    if labels.dtype == torch.int64:
        require(
            name,
            labels.shape == logits.shape[:1],
            "labels",
            f"have shape ({len(logits)},)",
            tuple(labels.shape),
        )
        require(
            name, labels.device == logits.device, "labels", f"be on {logits.device}", labels.device
        )
    else:
        require_like(name, "labels", labels, logits, tuple(logits.shape))


def _split_labels(labels: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """Return (hard, soft), one of them None, contiguous."""
    labels = labels.contiguous()
    return (labels, None) if labels.dtype == torch.int64 else (None, labels)


def _weights(logits: Tensor, labels: Tensor) -> Tensor:
    """Return label weights [B, K], one-hot for hard labels."""
    if labels.dtype != torch.int64:
        return labels
    return torch.nn.functional.one_hot(labels, logits.shape[1]).to(logits.dtype)


# ---- cross_entropy ----


def _allocate(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    return logits.new_empty(logits.shape[0]), logits.new_empty(logits.shape)


def _kernel(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    logits = logits.contiguous()
    hard, soft = _split_labels(labels)
    losses, grad = _allocate(logits, labels)
    _native.call("cross_entropy", logits, *logits.shape, logits, hard, soft, losses, grad)
    return losses, grad


def cross_entropy_reference(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return :func:`cross_entropy` in plain torch."""
    y = _weights(logits, labels)
    log_p = logits.log_softmax(1)
    losses = -(y * log_p).sum(1)
    return losses, (log_p.exp() * y.sum(1, keepdim=True) - y) / len(logits)


_cross_entropy = operator(
    "cross_entropy(Tensor logits, Tensor labels) -> (Tensor, Tensor)",
    check=lambda logits, labels: _check_labels("cross_entropy", logits, labels),
    allocate=_allocate,
    kernel=_kernel,
    reference=cross_entropy_reference,
)


def cross_entropy(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return the losses of a batch and the gradient of their mean.

    Args:
        logits: [B, K], float32 or float64.
        labels: int64 [B] class indices in [0, K), or weights [B, K] with the type of ``logits``
            (any real numbers).

    Returns:
        losses [B], and the gradient of ``losses.mean()`` with respect to the logits [B, K].

    Raises:
        ValueError, TypeError: a shape, type or device does not fit, or a class index is out of
            range. On CUDA, the loss of a sample with such an index is NaN instead.
    """
    return _cross_entropy(logits, labels)


# ---- cross_entropy_dual ----


def _check_dual(logits: Tensor, logits_tangent: Tensor, labels: Tensor) -> None:
    _check_labels("cross_entropy_dual", logits, labels)
    require_like(
        "cross_entropy_dual", "logits_tangent", logits_tangent, logits, tuple(logits.shape)
    )


def _allocate_dual(
    logits: Tensor, logits_tangent: Tensor, labels: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    label_rows = 0 if labels.dtype == torch.int64 else logits.shape[0]
    return (
        logits.new_empty(logits.shape[0]),
        logits.new_empty(logits.shape),
        logits.new_empty(logits.shape),
        logits.new_empty(label_rows, logits.shape[1]),
    )


def _kernel_dual(
    logits: Tensor, logits_tangent: Tensor, labels: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    logits, logits_tangent = logits.contiguous(), logits_tangent.contiguous()
    hard, soft = _split_labels(labels)
    losses_tangent, grad, grad_tangent, labels_tangent = _allocate_dual(
        logits, logits_tangent, labels
    )
    _native.call(
        "cross_entropy_dual",
        logits,
        *logits.shape,
        logits,
        logits_tangent,
        hard,
        soft,
        losses_tangent,
        grad,
        grad_tangent,
        None if soft is None else labels_tangent,
    )
    return losses_tangent, grad, grad_tangent, labels_tangent


def cross_entropy_dual_reference(
    logits: Tensor, logits_tangent: Tensor, labels: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return :func:`cross_entropy_dual` in plain torch."""
    y = _weights(logits, labels)
    total = y.sum(1, keepdim=True)
    p = logits.softmax(1)
    log_p_tangent = logits_tangent - (p * logits_tangent).sum(1, keepdim=True)
    labels_tangent = -log_p_tangent / len(logits)
    return (
        -(y * log_p_tangent).sum(1),
        (p * total - y) / len(logits),
        p * log_p_tangent * total / len(logits),
        labels_tangent[:0].clone() if labels.dtype == torch.int64 else labels_tangent,
    )


_cross_entropy_dual = operator(
    "cross_entropy_dual(Tensor logits, Tensor logits_tangent, Tensor labels) -> (Tensor, Tensor, "
    "Tensor, Tensor)",
    check=_check_dual,
    allocate=_allocate_dual,
    kernel=_kernel_dual,
    reference=cross_entropy_dual_reference,
)


def cross_entropy_dual(
    logits: Tensor, logits_tangent: Tensor, labels: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return :func:`cross_entropy` on dual numbers (labels carry no tangent).

    Args:
        logits: [B, K].
        logits_tangent: [B, K].
        labels: as for :func:`cross_entropy`.

    Returns:
        Tangents of the losses [B]; gradient of the mean loss with respect to the logits [B, K]; its
        tangent [B, K]; tangent of the gradient with respect to soft labels [B, K] ([0, K] for hard
        labels).
    """
    return _cross_entropy_dual(logits, logits_tangent, labels)
