"""Softmax cross-entropy with hard or soft labels: losses and gradient, also on dual numbers.

For one sample with logits l, label weights y and p = softmax(l): loss = -Σ_k y_k log p_k. Gradients
are those of the mean over the batch, as in ``torch.nn.functional.cross_entropy``. On dual numbers,
with tangent l̇, the tangent of log p is l̇ - Σ_j p_j l̇_j.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from pdd_fast.ops import _native
from pdd_fast.ops._registry import Operator, require_floating, require_like
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
    hard = labels.dtype == torch.int64
    shape = logits.shape[:1] if hard else logits.shape
    require_like(name, "labels", labels, logits, tuple(shape), labels.dtype if hard else None)


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


class _CrossEntropy(NamedTuple):
    logits: Tensor  # [B, K], float32 or float64
    # int64 [B] class indices in [0, K), or weights [B, K] with the type of logits (any real
    # numbers)
    labels: Tensor

    def check(self, name: str) -> None:
        _check_labels(name, self.logits, self.labels)

    def allocate(self) -> tuple[Tensor, Tensor]:
        logits = self.logits
        return logits.new_empty(logits.shape[0]), logits.new_empty(logits.shape)

    def kernel(self, name: str) -> tuple[Tensor, Tensor]:
        logits, results = self.logits.contiguous(), self.allocate()
        _native.call(name, logits, *logits.shape, logits, *_split_labels(self.labels), *results)
        return results

    def reference(self) -> tuple[Tensor, Tensor]:
        y = _weights(self.logits, self.labels)
        log_p = self.logits.log_softmax(1)
        losses = -(y * log_p).sum(1)
        return losses, (log_p.exp() * y.sum(1, keepdim=True) - y) / len(y)


cross_entropy = Operator("cross_entropy", _CrossEntropy)
"""Return the losses of a batch [B] and the gradient of their mean in the logits [B, K].

Raises:
    ValueError, TypeError: a shape, type or device does not fit, or a class index is out of range.
        On CUDA, the loss of a sample with such an index is NaN instead.
"""


# ---- cross_entropy_dual ----


class _CrossEntropyDual(NamedTuple):
    logits: Tensor  # [B, K]
    logits_tangent: Tensor  # [B, K]
    labels: Tensor  # as for cross_entropy; they carry no tangent

    def check(self, name: str) -> None:
        logits = self.logits
        _check_labels(name, logits, self.labels)
        require_like(name, "logits_tangent", self.logits_tangent, logits, tuple(logits.shape))

    def allocate(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        logits = self.logits
        label_rows = 0 if self.labels.dtype == torch.int64 else logits.shape[0]
        return (
            logits.new_empty(logits.shape[0]),
            logits.new_empty(logits.shape),
            logits.new_empty(logits.shape),
            logits.new_empty(label_rows, logits.shape[1]),
        )

    def kernel(self, name: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        logits, tangent = self.logits.contiguous(), self.logits_tangent.contiguous()
        hard, soft = _split_labels(self.labels)
        *results, labels_tangent = every = self.allocate()
        of_labels = None if soft is None else labels_tangent
        _native.call(name, logits, *logits.shape, logits, tangent, hard, soft, *results, of_labels)
        return every

    def reference(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        logits, tangent, labels = self
        y = _weights(logits, labels)
        total = y.sum(1, keepdim=True)
        p = logits.softmax(1)
        log_p_tangent = tangent - (p * tangent).sum(1, keepdim=True)
        labels_tangent = -log_p_tangent / len(logits)
        return (
            -(y * log_p_tangent).sum(1),
            (p * total - y) / len(logits),
            p * log_p_tangent * total / len(logits),
            labels_tangent[:0].clone() if labels.dtype == torch.int64 else labels_tangent,
        )


cross_entropy_dual = Operator("cross_entropy_dual", _CrossEntropyDual)
"""Return :data:`cross_entropy` on dual numbers.

Returns:
    Tangents of the losses [B]; gradient of the mean loss with respect to the logits [B, K]; its
    tangent [B, K]; tangent of the gradient with respect to soft labels [B, K] ([0, K] for hard
    labels).
"""
