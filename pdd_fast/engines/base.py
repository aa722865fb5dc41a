"""What an engine does: the two computations that everything else is made of."""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from pdd_fast.ops.convnet import ConvNetShape


class DualResult(NamedTuple):
    """Derivatives of s = g·v, with g = ∇_θ ℓ and v the direction (docs/mathematics.md, sections 1
    and 2).
    """

    slope: Tensor  # [] s itself
    theta: Tensor | None  # [P] ∂s/∂θ, the Hessian-vector product; None where not wanted
    images: Tensor | None  # [rows, C, H, W] ∂s/∂x for the wanted rows; None where none are wanted
    labels: Tensor | None  # [B, classes] ∂s/∂y for soft labels; None for hard ones


class PassShape(NamedTuple):
    """A batch that a pass is made on, in shapes alone."""

    batch: int  # B
    image: tuple[int, int, int]  # C, H, W
    dtype: torch.dtype  # of parameters and images
    device: torch.device

    @classmethod
    def of(cls, images: Tensor, batch: int) -> PassShape:
        """That of ``batch`` images like ``images`` [n, C, H, W]."""
        C, H, W = images.shape[1:]
        return cls(batch, (C, H, W), images.dtype, images.device)


class Engine(Protocol):
    """ℓ is the mean cross-entropy of ``net`` at ``theta`` on ``images`` and ``labels``. No call
    records a graph.

    Tensors are float32 or float64, all of one type, whatever ``precision`` convolutions are
    computed in.
    """

    @property
    def net(self) -> nn.Module: ...

    @property
    def shape(self) -> ConvNetShape | None:
        """Of ``net``, where its layers are a ConvNet's; None for other modules."""
        ...

    @property
    def precision(self) -> str:
        """One of pdd_fast.runtime.precision.NAMES."""
        ...

    def gradient(
        self, theta: Tensor, images: Tensor, labels: Tensor, keep: bool = False
    ) -> tuple[Tensor, Tensor, Any]:
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
            saved: what :meth:`gradient` or :meth:`without_activations` gave for this step. Which of
                them decides only how results are rounded. Activations may serve once.
            want_theta: whether the Hessian-vector product is needed.
            rows: int64 indices of the images whose gradient is wanted; None: all; empty: none.
        """
        ...

    def without_activations(self, saved: Any) -> Any:
        """What remains of ``saved`` where activations have to go: enough for :meth:`dual` to make
        the step again.
        """
        ...

    def kept_bytes(self, shape: PassShape) -> int:
        """What :meth:`gradient` with ``keep=True`` leaves behind of one step on ``shape``."""
        ...

    def working_bytes(
        self, shape: PassShape, *, dual: bool = False, kept: bool = False, networks: int = 1
    ) -> int:
        """Most that is alive during a pass on ``shape``, beside what it was given, parameter
        vectors and what is kept.

        0 where only running it would tell.

        Args:
            dual: :meth:`dual`; otherwise :meth:`gradients`.
            kept: the dual pass of a step whose activations were kept.
            networks: K of :meth:`gradients`.
        """
        ...

    def logits(self, theta: Tensor, images: Tensor) -> Tensor:
        """Logits [B, classes] of images [B, C, H, W]."""
        ...

    def gradients(self, theta: Tensor, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """:meth:`gradient` of K networks, each on images of its own: losses [K, B] and gradients
        [K, P].

        Equal to one network at a time but for rounding; the same bits for K = 1. Nothing in it
        waits for the device.

        Args:
            theta: [K, P].
            images: [K, B, C, H, W].
            labels: int64 [K, B] or weights [K, B, classes].

        Raises:
            ValueError: the shapes do not fit one another.
        """
        ...

    def logits_of(self, theta: Tensor, images: Tensor) -> Tensor:
        """Logits [K, B, classes] of K networks at ``theta`` [K, P] on the same images [B, C, H, W].

        Raises:
            ValueError: ``theta`` has another shape.
        """
        ...


def check_side_by_side(
    theta: Tensor, images: Tensor | None = None, labels: Tensor | None = None
) -> None:
    """Raises ValueError unless the arguments of :meth:`Engine.gradients` or
    :meth:`Engine.logits_of` fit together.
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
