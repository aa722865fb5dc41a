"""What an engine does: the two computations that everything else is made of."""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

from torch import Tensor, nn


class DualResult(NamedTuple):
    """Derivatives of s = g·v, with g = ∇_θ ℓ and v the direction (docs/mathematics.md, sections 1 and 2)."""

    slope: Tensor  # [] s itself
    theta: Tensor | None  # [P] ∂s/∂θ, the Hessian-vector product; None where not wanted
    images: Tensor | None  # [rows, C, H, W] ∂s/∂x for the wanted rows; None where none are wanted
    labels: Tensor | None  # [B, classes] ∂s/∂y for soft labels; None for hard ones


class Engine(Protocol):
    """ℓ is the mean cross-entropy of ``net`` at ``theta`` on ``images`` and ``labels``. No call records a graph."""

    @property
    def net(self) -> nn.Module: ...

    def gradient(self, theta: Tensor, images: Tensor, labels: Tensor, keep: bool = False) -> tuple[Tensor, Tensor, Any]:
        """Losses [B], ∇_θ ℓ [P], and what :meth:`dual` needs to take this step up again.

        Args:
            theta: [P].
            images: [B, C, H, W].
            labels: int64 [B] or weights [B, classes].
            keep: keep the step's activations so that :meth:`dual` does not make them again.
        """
        ...

    def dual(
        self,
        theta: Tensor,
        images: Tensor,
        labels: Tensor,
        direction: Tensor,
        saved: Any,
        want_theta: bool = True,
        rows: Tensor | None = None,
    ) -> DualResult:
        """The derivatives of ∇_θ ℓ · ``direction`` at the point of :meth:`gradient`.

        Args:
            direction: [P].
            saved: what :meth:`gradient` gave for this step.
            want_theta: whether the Hessian-vector product is needed.
            rows: int64 indices of the images whose gradient is wanted; None: all; empty: none.
        """
        ...

    def logits(self, theta: Tensor, images: Tensor) -> Tensor:
        """Logits [B, classes] of images [B, C, H, W]."""
        ...
