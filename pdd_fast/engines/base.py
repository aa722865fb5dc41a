"""Interface of an engine: the two computations that every method is built from."""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from pdd_fast.ops.convnet import ConvNetShape


class DualResult(NamedTuple):
    """Derivatives of s = g·v, with g = ∇_θ ℓ and v the direction.

    docs/mathematics.md, sections 1 and 2, has the formulas.
    """

    slope: Tensor  # [] s itself
    theta: Tensor | None  # [P] ∂s/∂θ, the Hessian-vector product; None if not wanted
    images: Tensor | None  # [rows, C, H, W] ∂s/∂x for the wanted rows; None for none
    labels: Tensor | None  # [B, classes] ∂s/∂y for soft labels; None for hard labels


class PassShape(NamedTuple):
    """Shape of the batch that a pass runs on."""

    batch: int  # B
    image: tuple[int, int, int]  # C, H, W
    dtype: torch.dtype  # of parameters and images
    device: torch.device

    @classmethod
    def of(cls, images: Tensor, batch: int) -> PassShape:
        """Return the shape of ``batch`` images like ``images`` [n, C, H, W]."""
        C, H, W = images.shape[1:]
        return cls(batch, (C, H, W), images.dtype, images.device)


class Engine(Protocol):
    """Gradient and dual pass of the mean cross-entropy ℓ of ``net`` at ``theta``.

    No call records a graph. All tensors of a call have one type, float32 or float64, whatever
    ``precision`` the convolutions are computed in.
    """

    @property
    def net(self) -> nn.Module:
        """Network that the engine computes."""
        ...

    @property
    def shape(self) -> ConvNetShape | None:
        """Shape of ``net`` if its layers are a ConvNet's, else None."""
        ...

    @property
    def precision(self) -> str:
        """Precision of convolutions, one of pdd_fast.runtime.precision.NAMES."""
        ...

    def gradient(
        self, theta: Tensor, images: Tensor, labels: Tensor, keep: bool = False
    ) -> tuple[Tensor, Tensor, Any]:
        """Return losses [B], ∇_θ ℓ [P], and the state from which :meth:`dual` continues this step.

        Args:
            theta: [P].
            images: [B, C, H, W].
            labels: int64 [B] or weights [B, classes].
            keep: save the step's activations, so that :meth:`dual` does not recompute them.
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
        """Return the derivatives of ∇_θ ℓ · ``direction`` at the point of :meth:`gradient`.

        Args:
            theta: [P].
            images: [B, C, H, W].
            labels: int64 [B] or weights [B, classes].
            direction: [P].
            saved: state that :meth:`gradient` or :meth:`without_activations` returned for this
                step. The choice affects rounding only. Saved activations may be used once.
            want_theta: whether the Hessian-vector product is needed.
            rows: int64 indices of the images whose gradient is wanted. None: all; empty: none.
        """
        ...

    def without_activations(self, saved: Any) -> Any:
        """Return ``saved`` without activations, enough for :meth:`dual` to recompute the step."""
        ...

    def saved_bytes(self, shape: PassShape) -> int:
        """Return the bytes that :meth:`gradient` with ``keep=True`` saves for one step."""
        ...

    def working_bytes(self, shape: PassShape, *, dual: bool = False, saved: bool = False) -> int:
        """Return the peak number of bytes in use during a pass.

        Arguments, parameter vectors and saved activations are not counted. The result is 0 if only
        running the pass would tell.

        Args:
            shape: shape of the batch.
            dual: :meth:`dual`; otherwise :meth:`gradient`. :meth:`gradients` takes as much, because
                networks take turns.
            saved: whether the dual pass finds its step's activations saved.
        """
        ...

    def logits(self, theta: Tensor, images: Tensor) -> Tensor:
        """Return logits [B, classes] of images [B, C, H, W]."""
        ...

    def gradients(self, theta: Tensor, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Return losses [K, B] and gradients [K, P] of K networks, each on images of its own.

        The result has the bits of :meth:`gradient`, network by network. No call waits for the
        device.

        Args:
            theta: [K, P].
            images: [K, B, C, H, W].
            labels: int64 [K, B] or weights [K, B, classes].

        Raises:
            ValueError: the shapes do not fit each other.
        """
        ...

    def logits_of(self, theta: Tensor, images: Tensor) -> Tensor:
        """Return logits [K, B, classes] of K networks on the same images.

        Args:
            theta: [K, P].
            images: [B, C, H, W].

        Raises:
            ValueError: ``theta`` has another shape.
        """
        ...


def check_side_by_side(
    theta: Tensor, images: Tensor | None = None, labels: Tensor | None = None
) -> None:
    """Raise ValueError unless the arguments of K networks fit each other.

    Args:
        theta: as for :meth:`Engine.gradients` and :meth:`Engine.logits_of`.
        images: as for :meth:`Engine.gradients`; None for :meth:`Engine.logits_of`.
        labels: as for :meth:`Engine.gradients`; None for :meth:`Engine.logits_of`.
    """
    if theta.dim() != 2 or len(theta) == 0:
        raise ValueError(f"engine: theta must have shape [K, P], got {tuple(theta.shape)}")
    if images is None or labels is None:
        return
    if images.dim() != 5 or len(images) != len(theta):
        raise ValueError(
            f"engine: images must have shape [{len(theta)}, B, C, H, W], got {tuple(images.shape)}"
        )
    hard = labels.dtype == torch.int64
    if labels.dim() != (2 if hard else 3) or labels.shape[:2] != images.shape[:2]:
        expected = ", ".join(map(str, images.shape[:2])) + ("" if hard else ", classes")
        raise ValueError(f"engine: labels must have shape [{expected}], got {tuple(labels.shape)}")
