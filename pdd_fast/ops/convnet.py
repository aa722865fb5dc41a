"""The ConvNet's passes on the CPU as one call each: forward, backward, gradient, dual.

One kernel (csrc/ops/convnet/params.h) does what :mod:`pdd_fast.engines.composed` composes from
operators and torch's convolutions. It keeps a plane in the cache through convolution, norm, ReLU
and pooling, reuses one buffer from step to step, and shares Winograd's transforms between a value
and its tangent. There is no CUDA kernel, because on a GPU the composed passes run as one graph.
"""

from __future__ import annotations

import os
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from pdd_fast.ops import _native
from pdd_fast.ops._buffers import Buffer, BufferPool
from pdd_fast.ops._registry import require_floating, require_like
from pdd_fast.ops._threads import threads
from pdd_fast.ops.norm_relu_pool import EPS
from pdd_fast.runtime.choices import CONVOLUTIONS as CONVOLUTIONS
from pdd_fast.runtime.errors import require

# Number of images whose logits are computed at once: a few chunks of every layer for two threads,
# and a workspace that does not grow with a test set.
_LOGITS_AT_ONCE = 128


def available() -> bool:
    """Return whether the passes were compiled."""
    return _native.load("cpu") is not None


class _Sizes(NamedTuple):
    """Elements in the buffers of a pass."""

    workspace: int
    saved: int


class ConvNetShape(NamedTuple):
    """Shape of the network that the passes compute.

    The order is that of csrc/ops/convnet/params.h after the batch.
    """

    in_channels: int
    height: int  # of an image, pixels
    width: int  # of an image, pixels
    channels: int  # of every convolution
    depth: int  # blocks
    num_classes: int

    @property
    def image(self) -> tuple[int, int, int]:
        """Shape [C, H, W] of an image."""
        return self.in_channels, self.height, self.width

    @property
    def features(self) -> int:
        """Number of inputs of the linear layer."""
        return self.channels * (self.height >> self.depth) * (self.width >> self.depth)

    @property
    def parameters(self) -> int:
        """P, the number of elements in all parameters."""
        blocks = sum(9 * inputs * self.channels + 3 * self.channels for inputs in self.block_inputs)
        return blocks + (self.features + 1) * self.num_classes

    @property
    def block_inputs(self) -> list[int]:
        """Input channels of the convolution of each block."""
        return [self.in_channels, *[self.channels] * (self.depth - 1)]


# One pool for workspaces and one for saved activations, shared by networks of all shapes.
_WORKSPACES, _SAVED = BufferPool(), BufferPool()
if hasattr(os, "register_at_fork"):
    for _pool in (_WORKSPACES, _SAVED):
        os.register_at_fork(after_in_child=_pool.unlock)


def free_buffers() -> None:
    """Free the memory that passes on the CPU hold between calls.

    It consists of workspaces and of as many saved activations as were in use at once.
    ``memory="cache"`` of :func:`pdd_fast.unroll` holds the most. Later calls allocate again.

    Example:
        >>> import pdd_fast
        >>> pdd_fast.free_buffers()
    """
    _WORKSPACES.free()
    _SAVED.free()


def idle_bytes() -> int:
    """Return the bytes of released saved activations, which the next pass reuses."""
    return _SAVED.idle_bytes()


@lru_cache(maxsize=64)
def _sizes(
    shape: ConvNetShape, convolution: int, batch: int, dual: bool, saved: bool, threads: int
) -> _Sizes:
    return _Sizes(
        *_native.loaded("cpu").convnet_sizes([batch, *shape], convolution, dual, saved, threads)
    )


class ConvNetPasses:
    """Passes of networks of one shape, on the CPU, with tensors all float32 or all float64.

    Args:
        shape: shape of the network.
        convolution: algorithm of all blocks after the first: "direct", "winograd" (F(4×4, 3×3);
            four times the rounding error), or "auto", which chooses the faster one for a block's
            shape.
    """

    def __init__(self, shape: ConvNetShape, convolution: str = "auto") -> None:
        self.shape = shape
        # Counted once: every pass checks it, and counting takes 2 µs.
        self._parameters = shape.parameters
        self._convolution = CONVOLUTIONS.index(convolution)

    def sizes(self, batch: int, dual: bool = False, saved: bool = False) -> _Sizes:
        """Return the elements that a pass on ``batch`` images needs as workspace and saves."""
        return _sizes(self.shape, self._convolution, batch, dual, saved, threads())

    def logits(self, theta: Tensor, images: Tensor) -> Tensor:
        """Return logits [B, classes] of ``images`` [B, C, H, W] at ``theta`` [P]."""
        parts = [self.forward(theta, part)[0] for part in images.split(_LOGITS_AT_ONCE)]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def forward(
        self, theta: Tensor, images: Tensor, keep: bool = False
    ) -> tuple[Tensor, Buffer | None]:
        """Return logits [B, classes], and the activations for :meth:`backward` if ``keep``."""
        logits = theta.new_empty(len(images), self.shape.num_classes)
        saved = self._new_saved(theta, len(images)) if keep else None
        self._run("forward", theta, images, saved, logits)
        return logits, saved

    def backward(
        self, theta: Tensor, images: Tensor, saved: Buffer, grad_logits: Tensor, want_images: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Return gradients with respect to theta [P] and, if wanted, the images [B, C, H, W].

        Args:
            theta: [P].
            images: [B, C, H, W].
            saved: from :meth:`forward`. It serves any number of calls, one at a time.
            grad_logits: [B, classes].
            want_images: whether the images' gradient is wanted.
        """
        require_like(
            "convnet", "grad_logits", grad_logits, theta, (len(images), self.shape.num_classes)
        )
        self._check_saved(theta, len(images), saved)
        grad_theta, grad_images = (
            theta.new_empty(theta.shape),
            theta.new_empty(images.shape) if want_images else None,
        )
        with saved.lock:  # The pass writes the gradients of activations beside them.
            self._run(
                "backward", theta, images, saved, _plain(grad_logits), grad_theta, grad_images
            )
        return grad_theta, grad_images

    def gradient(
        self, theta: Tensor, images: Tensor, labels: Tensor, keep: bool = False
    ) -> tuple[Tensor, Tensor, Buffer | None]:
        """Return losses [B], the gradient of their mean [P], and the activations if ``keep``.

        :meth:`dual` takes the activations.
        """
        losses, grad_theta = theta.new_empty(len(images)), theta.new_empty(theta.shape)
        saved = self._new_saved(theta, len(images)) if keep else None
        hard, soft = self._labels(theta, len(images), labels)
        self._run("gradient", theta, images, saved, hard, soft, losses, grad_theta)
        return losses, grad_theta, saved

    def dual(
        self,
        theta: Tensor,
        images: Tensor,
        labels: Tensor,
        direction: Tensor,
        saved: Buffer | None,
        want_theta: bool,
        rows: Tensor | None,
    ) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
        """Return the tangents of the losses and gradients along ``direction``.

        Args:
            theta: [P].
            images: [B, C, H, W].
            labels: int64 [B] or weights [B, classes].
            direction: [P].
            saved: from :meth:`gradient` at the same point. None: its values are recomputed.
            want_theta: whether the tangent of the gradient is wanted.
            rows: int64 indices of the images whose gradient's tangent is wanted; None: all.

        Returns:
            Tangents of the losses [B], of the gradient [P], of the gradient with respect to the
            images of ``rows``, and of the gradient with respect to soft labels [B, classes].
            Tangents that are not wanted are None.
        """
        require_like("convnet", "direction", direction, theta, (self._parameters,))
        batch = len(images)
        hard, soft = self._labels(theta, batch, labels)
        if saved is not None:
            self._check_saved(theta, batch, saved)
        losses = theta.new_empty(batch)
        theta_tangent = theta.new_empty(theta.shape) if want_theta else None
        labels_tangent = None if soft is None else soft.new_empty(soft.shape)
        wanted, images_tangent = None, None
        if rows is None or len(rows):
            images_tangent = theta.new_empty(images.shape)
            if rows is not None:
                wanted = torch.zeros(batch, dtype=torch.bool, device="cpu").index_fill_(
                    0, rows, True
                )
        self._run(
            "dual",
            theta,
            images,
            saved,
            hard,
            soft,
            _plain(direction),
            wanted,
            losses,
            theta_tangent,
            images_tangent,
            labels_tangent,
        )
        if rows is not None and images_tangent is not None:
            images_tangent = images_tangent.index_select(0, rows)
        return losses, theta_tangent, images_tangent, labels_tangent

    def _new_saved(self, theta: Tensor, batch: int) -> Buffer:
        return _SAVED.buffer(self.sizes(batch).saved, theta.dtype)

    def _check_saved(self, theta: Tensor, batch: int, saved: Buffer) -> None:
        require_like("convnet", "saved", saved.tensor, theta, (self.sizes(batch).saved,))

    def _labels(
        self, theta: Tensor, batch: int, labels: Tensor
    ) -> tuple[Tensor | None, Tensor | None]:
        """Return (class indices, None) or (None, weights)."""
        hard = labels.dtype == torch.int64
        shape = (batch,) if hard else (batch, self.shape.num_classes)
        require_like("convnet", "labels", labels, theta, shape, labels.dtype if hard else None)
        labels = _plain(labels)
        return (labels, None) if hard else (None, labels)

    def _run(
        self,
        name: str,
        theta: Tensor,
        images: Tensor,
        saved: Buffer | None,
        *arguments: Tensor | None,
    ) -> None:
        """Run pass ``name`` on the common arguments and on ``arguments``.

        Args:
            name: "forward", "backward", "gradient" or "dual".
            theta: [P].
            images: [B, C, H, W].
            saved: memory that the pass writes to or continues from.
            arguments: further arguments of the pass.
        """
        batch = len(images)
        require_floating("convnet", "theta", theta)
        require("convnet", theta.device.type == "cpu", "theta", "be on cpu", theta.device)
        expected = (self._parameters,)
        require(
            "convnet",
            tuple(theta.shape) == expected,
            "theta",
            f"have shape {expected}",
            tuple(theta.shape),
        )
        require_like("convnet", "images", images, theta, (batch, *self.shape.image))
        require("convnet", batch > 0, "images", "not be empty", tuple(images.shape))
        workspace = _WORKSPACES.buffer(
            self.sizes(batch, name == "dual", saved is not None).workspace, theta.dtype
        )
        theta, images = _plain(theta), images.resolve_neg()
        common = _native.loaded("cpu").ConvNetArguments(
            [batch, *self.shape],
            self._convolution,
            EPS,
            _native.address(theta, theta.device),
            _native.address(images, theta.device),
            images.stride(),
            *_piece(workspace),
            *_piece(saved),
        )
        _native.call(f"convnet_{name}", theta, common, *arguments)


def _piece(buffer: Buffer | None) -> tuple[int, int]:
    """Return a buffer's address and size, which the binding compares with the pass's needs."""
    return (0, 0) if buffer is None else (buffer.address, buffer.elements)


def _plain(tensor: Tensor) -> Tensor:
    """Return ``tensor`` as a kernel reads it: contiguous, without torch's negative bit."""
    return tensor.contiguous().resolve_neg()
