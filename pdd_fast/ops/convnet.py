"""The ConvNet's passes as one call each, on the CPU: forward, backward, gradient, dual (csrc/ops/convnet/params.h).

What :mod:`pdd_fast.engines.composed` puts together from operators and torch's convolutions, in one kernel that keeps a
plane's way through convolution, norm, ReLU and pooling in the cache, works in one buffer from step to step, and shares
the transforms of Winograd's convolutions between a value and its tangent. There is no CUDA kernel: a GPU has no use for
it, and there the composed passes run as one graph.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from pdd_fast.errors import require
from pdd_fast.networks.parameters import parameter_count
from pdd_fast.ops import _native
from pdd_fast.ops._registry import address, require_floating, require_like
from pdd_fast.ops.norm_relu_pool import EPS

if TYPE_CHECKING:
    from pdd_fast.networks.convnet import ConvNet

CONVOLUTIONS = ("auto", "direct", "winograd")  # csrc/ops/convnet/params.h numbers them alike

# Images whose logits are computed at once: a few chunks of every layer for two threads, and a workspace that does not
# grow with a test set.
_LOGITS_AT_ONCE = 128


def available() -> bool:
    """Whether the passes were compiled."""
    return _native.load("cpu") is not None


class _Sizes(NamedTuple):
    """Numbers in the buffers of a pass."""

    workspace: int
    kept: int


class Kept:
    """What one pass keeps for later ones. When nobody holds it any more, its memory serves the next that is kept."""

    def __init__(self, size: int, dtype: torch.dtype, idle: list[Tensor]) -> None:
        self._idle = idle
        self._memory = _taken(idle, size * dtype.itemsize)
        self.numbers = self._memory[: size * dtype.itemsize].view(dtype)

    def __del__(self) -> None:
        memory = getattr(self, "_memory", None)  # None where there was not enough
        if memory is not None:
            self._idle.append(memory)


def _taken(idle: list[Tensor], size: int) -> Tensor:
    """``size`` bytes or more, of ``idle`` where there is enough in one piece: the piece that was used last."""
    for place in reversed(range(len(idle))):
        if idle[place].numel() >= size:
            return idle.pop(place)
    if idle:
        idle.pop()  # pieces grow in size, not in number
    return _buffer(size)


def shape_of(net: ConvNet) -> tuple[int, ...]:
    """in_channels, height, width in pixels, channels, depth, classes."""
    return (net.in_channels, *net.image_size, net.width, net.depth, net.num_classes)


_MOST_SHARED = 8
_SHARED: dict[tuple[int, ...], ConvNetPasses] = {}


def shared(net: ConvNet, convolution: str = "auto") -> ConvNetPasses:
    """The passes of all networks of a shape, so that one call's buffers serve the next: of 25 MB that a step of 50
    images keeps at width 128, mapping them anew takes 25 ms, half of what the step takes."""
    key = (*shape_of(net), CONVOLUTIONS.index(convolution))
    if key not in _SHARED:
        while len(_SHARED) >= _MOST_SHARED:
            _SHARED.pop(next(iter(_SHARED)))
        _SHARED[key] = ConvNetPasses(net, convolution)
    return _SHARED[key]


def free_buffers() -> None:
    """Gives the memory back that passes on the CPU hold between calls: for each shape of network a workspace, and as
    much as was kept at once (most with ``memory="cache"`` of :func:`pdd_fast.unroll`). Later calls take it anew."""
    _SHARED.clear()


def idle_bytes() -> int:
    """What was kept and can be had again, of all :func:`shared` passes."""
    return sum(memory.numel() for passes in _SHARED.values() for memory in passes._idle)


class ConvNetPasses:
    """The passes of networks of one shape. Everything is float32 or float64, all of one type, on the CPU.

    Args:
        net: gives the shape; it is not kept.
        convolution: of the blocks after the first: "direct", "winograd" (F(4×4, 3×3); rounding errors four times as
            large), or "auto", whichever is faster for a block's shape.
    """

    def __init__(self, net: ConvNet, convolution: str = "auto") -> None:
        self._net_shape = shape_of(net)
        self._parameters = parameter_count(net)
        self._convolution = CONVOLUTIONS.index(convolution)
        self._workspace = torch.empty(0, dtype=torch.uint8)
        self._idle: list[Tensor] = []  # what was kept, and is not any more
        self._lock = threading.Lock()

    def sizes(self, batch: int, dual: bool = False, kept: bool = False) -> _Sizes:
        """What a pass on ``batch`` images works in and keeps, in numbers of its type."""
        shape = [batch, *self._net_shape]
        return _Sizes(
            *_native.loaded("cpu").convnet_sizes(shape, self._convolution, dual, kept, torch.get_num_threads())
        )

    def logits(self, theta: Tensor, images: Tensor) -> Tensor:
        """Logits [B, classes] of ``images`` [B, C, H, W] at ``theta`` [P]."""
        parts = [self.forward(theta, part)[0] for part in images.split(_LOGITS_AT_ONCE)]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def forward(self, theta: Tensor, images: Tensor, keep: bool = False) -> tuple[Tensor, Kept | None]:
        """Logits [B, classes], and what :meth:`backward` goes on from if ``keep``."""
        logits = theta.new_empty(len(images), self._net_shape[-1])
        kept = self._new_kept(theta, len(images)) if keep else None
        with self._arguments(theta, images, kept=keep) as arguments:
            _native.call("convnet_forward", theta, arguments, _address_of(kept), address(logits))
        return logits, kept

    def backward(
        self, theta: Tensor, images: Tensor, kept: Kept, grad_logits: Tensor, want_images: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Gradients with respect to theta [P] and, if wanted, the images [B, C, H, W].

        Args:
            kept: from :meth:`forward`; of any number of calls, one at a time.
            grad_logits: [B, classes].
        """
        require_like("convnet", "grad_logits", grad_logits, theta, (len(images), self._net_shape[-1]))
        self._check_kept(theta, len(images), kept)
        grad_theta, grad_logits = torch.empty_like(theta), grad_logits.contiguous()
        grad_images = theta.new_empty(images.shape) if want_images else None
        with self._arguments(theta, images, kept=True) as arguments:
            _native.call(
                "convnet_backward", theta, arguments,
                _address_of(kept), address(grad_logits), address(grad_theta), address(grad_images),
            )  # fmt: skip
        return grad_theta, grad_images

    def gradient(
        self, theta: Tensor, images: Tensor, labels: Tensor, keep: bool = False
    ) -> tuple[Tensor, Tensor, Kept | None]:
        """Losses [B], the gradient of their mean [P], and what :meth:`dual` goes on from if ``keep``."""
        losses, grad_theta = theta.new_empty(len(images)), torch.empty_like(theta)
        kept = self._new_kept(theta, len(images)) if keep else None
        hard, soft = self._labels(theta, len(images), labels)
        with self._arguments(theta, images, kept=keep) as arguments:
            _native.call(
                "convnet_gradient", theta, arguments,
                address(hard), address(soft), _address_of(kept), address(losses), address(grad_theta),
            )  # fmt: skip
        return losses, grad_theta, kept

    def dual(
        self,
        theta: Tensor,
        images: Tensor,
        labels: Tensor,
        direction: Tensor,
        kept: Kept | None,
        want_theta: bool,
        rows: Tensor | None,
    ) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
        """Tangents along ``direction`` [P] of the losses [B], of the gradient [P], of the gradient with respect to the
        images of ``rows`` (None: all) and of that with respect to soft labels [B, classes]; None where not wanted.

        Args:
            kept: from :meth:`gradient` at the same point; None: its values are made again.
        """
        require_like("convnet", "direction", direction, theta, (self._parameters,))
        batch, direction = len(images), direction.contiguous()
        hard, soft = self._labels(theta, batch, labels)
        if kept is not None:
            self._check_kept(theta, batch, kept)
        losses = theta.new_empty(batch)
        theta_tangent = torch.empty_like(theta) if want_theta else None
        labels_tangent = None if soft is None else torch.empty_like(soft)
        wanted, images_tangent = None, None
        if rows is None:
            wanted = torch.ones(batch, dtype=torch.bool)
        elif len(rows):
            wanted = torch.zeros(batch, dtype=torch.bool).index_fill_(0, rows, True)
        if wanted is not None:
            images_tangent = theta.new_empty(images.shape)
        with self._arguments(theta, images, dual=True, kept=kept is not None) as arguments:
            _native.call(
                "convnet_dual", theta, arguments,
                address(hard), address(soft), _address_of(kept), address(direction), address(wanted),
                address(losses), address(theta_tangent), address(images_tangent), address(labels_tangent),
            )  # fmt: skip
        if rows is not None and images_tangent is not None:
            images_tangent = images_tangent.index_select(0, rows)
        return losses, theta_tangent, images_tangent, labels_tangent

    def _new_kept(self, theta: Tensor, batch: int) -> Kept:
        return Kept(self.sizes(batch).kept, theta.dtype, self._idle)

    def _check_kept(self, theta: Tensor, batch: int, kept: Kept) -> None:
        require_like("convnet", "kept", kept.numbers, theta, (self.sizes(batch).kept,))

    def _labels(self, theta: Tensor, batch: int, labels: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Class indices or weights, whichever they are."""
        hard = labels.dtype == torch.int64
        shape = (batch,) if hard else (batch, self._net_shape[-1])
        require_like("convnet", "labels", labels, theta, shape, labels.dtype if hard else None)
        labels = labels.contiguous()
        return (labels, None) if hard else (None, labels)

    @contextmanager
    def _arguments(self, theta: Tensor, images: Tensor, dual: bool = False, kept: bool = False) -> Iterator[object]:
        """What every pass takes; the workspace is this pass's until the end."""
        batch, shape = len(images), self._net_shape
        require_floating("convnet", "theta", theta)
        require("convnet", theta.device.type == "cpu", "theta", "be on cpu", theta.device)
        require(
            "convnet",
            tuple(theta.shape) == (self._parameters,), "theta", f"have shape ({self._parameters},)", tuple(theta.shape),
        )  # fmt: skip
        require_like("convnet", "images", images, theta, (batch, *shape[:3]))
        require("convnet", batch > 0, "images", "not be empty", tuple(images.shape))
        size = self.sizes(batch, dual, kept).workspace * theta.element_size()
        # Another thread may be in a pass: then this one has a workspace of its own.
        mine = self._lock.acquire(blocking=False)
        try:
            workspace = self._workspace if mine else _buffer(size)
            if workspace.numel() < size:
                self._workspace = torch.empty(0, dtype=torch.uint8)  # before the larger one: not both at once
                workspace = self._workspace = _buffer(size)
            theta = theta.contiguous()
            yield _native.loaded("cpu").ConvNetArguments(
                [batch, *shape], self._convolution, EPS, address(theta), address(images), images.stride(),
                address(workspace),
            )  # fmt: skip
        finally:
            if mine:
                self._lock.release()


def _address_of(kept: Kept | None) -> int:
    return 0 if kept is None else address(kept.numbers)


def _buffer(size: int) -> Tensor:
    """``size`` uninitialised bytes, in large pages where the system has them."""
    buffer = torch.empty(size, dtype=torch.uint8)
    _native.loaded("cpu").advise_large_pages(address(buffer), buffer.nbytes)
    return buffer
