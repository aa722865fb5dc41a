"""Engine for the ConvNet: one kernel per pass on the CPU, the composed passes elsewhere."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from pdd_fast.engines.base import DualResult, PassShape, check_side_by_side
from pdd_fast.engines.composed import ComposedPasses
from pdd_fast.networks.convnet import kernel_shape
from pdd_fast.ops import convnet
from pdd_fast.ops.convnet import ConvNetShape
from pdd_fast.runtime import precision as precisions


class FusedEngine:
    """Engine for the networks that the kernels compute.

    Args:
        net: the network.
        precision: of convolutions.
        convolution: algorithm on the CPU, see :func:`pdd_fast.engines.choose`.
        shape: result of :func:`pdd_fast.networks.convnet.kernel_shape` for ``net`` if the caller
            has it.

    Raises:
        ValueError: the kernels cannot compute ``net``.
    """

    def __init__(
        self,
        net: nn.Module,
        precision: str = "float32",
        convolution: str = "auto",
        shape: ConvNetShape | None = None,
    ) -> None:
        shape = shape or kernel_shape(net)
        if shape is None:
            kind = type(net).__name__
            raise ValueError(
                "net must be a pdd_fast.ConvNet with the layers and parameters of its constructor "
                "and no hooks for engine 'fused', got "
                f"{'one that was changed' if kind == 'ConvNet' else kind}; "
                "use engine='autograd', which is exact for any module"
            )
        self.net, self.shape = net, shape
        self.precision = precisions.check(precision)
        self.convolution = convolution
        self._whole = convnet.ConvNetPasses(shape, convolution)
        self._composed = ComposedPasses(net, shape, precision)

    def _in_one_kernel(self, given: Tensor | PassShape) -> bool:
        return given.device.type == "cpu" and self.precision != "bfloat16" and convnet.available()

    def without_activations(self, saved: Any) -> None:
        """Return None, because the step is recomputed from its arguments alone."""

    def saved_bytes(self, shape: PassShape) -> int:
        """Return the bytes that a step saves."""
        if self._in_one_kernel(shape):
            return self._whole.sizes(shape.batch).saved * shape.dtype.itemsize
        return self._composed.saved_bytes(shape)

    def working_bytes(self, shape: PassShape, *, dual: bool = False, saved: bool = False) -> int:
        """Return the peak number of bytes in use; see :meth:`Engine.working_bytes`."""
        if not self._in_one_kernel(shape):
            return self._composed.working_bytes(shape, dual, saved)
        # A dual pass also returns the images' gradient.
        images = shape.batch * math.prod(shape.image) if dual else 0
        return (
            self._whole.sizes(shape.batch, dual, saved).workspace + images
        ) * shape.dtype.itemsize

    def logits(self, theta: Tensor, images: Tensor) -> Tensor:
        """Return logits [B, classes]."""
        if self._in_one_kernel(theta):
            return self._whole.logits(theta, images)
        return self._composed.logits(theta, images)

    def gradient(
        self, theta: Tensor, images: Tensor, labels: Tensor, keep: bool = False
    ) -> tuple[Tensor, Tensor, Any]:
        """Return losses, gradient and saved activations; see :meth:`Engine.gradient`."""
        if self._in_one_kernel(theta):
            return self._whole.gradient(theta, images, labels, keep)
        return self._composed.gradient(theta, images, labels, keep)

    def gradients(self, theta: Tensor, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Return losses and gradients of K networks; see :meth:`Engine.gradients`."""
        check_side_by_side(theta, images, labels)
        if len(theta) == 1:
            losses, gradient, _ = self.gradient(theta[0], images[0], labels[0])
            return losses[None], gradient[None]
        each = [self.gradient(*one)[:2] for one in zip(theta, images, labels, strict=True)]
        losses, gradients = zip(*each, strict=True)
        return torch.stack(losses), torch.stack(gradients)

    def logits_of(self, theta: Tensor, images: Tensor) -> Tensor:
        """Return logits of K networks; see :meth:`Engine.logits_of`."""
        check_side_by_side(theta)
        if len(theta) == 1:
            return self.logits(theta[0], images)[None]
        return torch.stack([self.logits(one, images) for one in theta])

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
        """Return the derivatives along ``direction``; see :meth:`Engine.dual`."""
        if not self._in_one_kernel(theta):
            return self._composed.dual(theta, images, labels, direction, saved, want_theta, rows)
        slopes, *others = self._whole.dual(
            theta, images, labels, direction, saved, want_theta, rows
        )
        return DualResult(slopes.mean(), *others)
