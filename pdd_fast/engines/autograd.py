"""Engine for any module: exact derivatives by torch's double backward, one step at a time."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pdd_fast.engines import estimates
from pdd_fast.engines.base import DualResult, PassShape, check_side_by_side
from pdd_fast.networks.convnet import kernel_shape
from pdd_fast.networks.kernels import plain_torch
from pdd_fast.networks.parameters import parameter_count, views
from pdd_fast.ops.convnet import ConvNetShape
from pdd_fast.runtime import precision as precisions
from pdd_fast.runtime.errors import require


class _RandomState(NamedTuple):
    """Random state before a step that used random values (dropout), for an identical rerun."""

    cpu: Tensor
    cuda: Tensor | None


class _Graph(NamedTuple):
    """Gradient of a step with its graph."""

    gradient: Tensor
    theta: Tensor
    images: Tensor
    labels: Tensor
    before: _RandomState | None = None  # set if the step used random values and is saved


def _losses(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the cross-entropy of each image [B].

    Raises:
        ValueError: ``logits`` are not [B, classes], or ``labels`` do not fit them. Class indices
            are checked on the CPU only, since a GPU would have to be waited for.
    """
    count, shape = len(labels), tuple(logits.shape)
    require(
        "engine",
        logits.dim() == 2 and len(logits) == count,
        "net",
        f"give logits [{count}, classes]",
        shape,
    )
    if labels.is_floating_point():
        require(
            "engine",
            labels.shape == logits.shape,
            "labels",
            f"have shape {shape}",
            tuple(labels.shape),
        )
    try:
        return F.cross_entropy(logits, labels, reduction="none")
    except IndexError as error:
        low, high = int(labels.min()), int(labels.max())
        raise ValueError(
            f"engine: labels must lie in [0, {shape[1]}), got {low}..{high}"
        ) from error


_CALLS: WeakKeyDictionary[nn.Module, threading.RLock] = WeakKeyDictionary()
_CALLS_LOCK = threading.Lock()


def _only_caller_of(net: nn.Module) -> threading.RLock:
    """Return a lock for the time in which torch replaces the parameters of ``net``.

    Two threads that call one module in this way would see each other's parameters. Only the forward
    passes exclude each other.
    """
    with _CALLS_LOCK:
        return _CALLS.setdefault(net, threading.RLock())


def _random_state(device: torch.device) -> _RandomState:
    return _RandomState(
        torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    )


@contextmanager
def _random_state_of(state: _RandomState | None, device: torch.device) -> Iterator[None]:
    if state is None:
        yield
        return
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.set_rng_state(state.cpu)
        if state.cuda is not None:
            torch.cuda.set_rng_state(state.cuda, device)
        yield


class AutogradEngine:
    """Engine for any module that maps images to logits.

    Buffers (running statistics) are read once, when the engine is made, and never changed.

    Precision "bfloat16" is torch's autocast. It decides per operation, and also rounds the operands
    of linear layers, which the fused engine computes in float32.

    Args:
        net: the network.
        precision: of convolutions.
        shape: result of :func:`pdd_fast.networks.convnet.kernel_shape` for ``net`` if the caller
            has it.
    """

    def __init__(
        self, net: nn.Module, precision: str = "float32", shape: ConvNetShape | None = None
    ) -> None:
        self.net, self.shape = net, shape or kernel_shape(net)
        self.precision = precisions.check(precision)
        self._parameters = dict(net.named_parameters())
        # A step may be recomputed much later; it then needs the same buffers and the same mode.
        self._buffers = {name: buffer.detach().clone() for name, buffer in net.named_buffers()}
        self._modes = [module.training for module in net.modules()]

    def _logits(self, theta: Tensor, images: Tensor) -> Tensor:
        rounded = precisions.storage(self.precision, theta.dtype) != theta.dtype
        with torch.autocast(theta.device.type, torch.bfloat16, enabled=rounded):
            return self._called(theta, images).to(theta.dtype)

    def _called(self, theta: Tensor, images: Tensor) -> Tensor:
        parameters = dict(
            zip(self._parameters, views(theta, iter(self._parameters.values())), strict=True)
        )
        if self._modes != [module.training for module in self.net.modules()]:
            raise RuntimeError(
                "engine: net must stay in training or in evaluation mode until its steps are "
                "differentiated, got a change between them; call train() or eval() before the "
                "steps, or after the backward pass"
            )
        buffers = {
            name: buffer.to(theta.dtype if buffer.is_floating_point() else buffer.dtype, copy=True)
            for name, buffer in self._buffers.items()
        }
        with plain_torch(), _only_caller_of(self.net):
            return torch.func.functional_call(self.net, parameters | buffers, (images,))

    def _graph(
        self, theta: Tensor, images: Tensor, labels: Tensor, second: bool
    ) -> tuple[Tensor, _Graph]:
        """Return the losses and the gradient, which carries its own graph if ``second``."""
        theta = theta.detach().requires_grad_()
        images = images.detach().requires_grad_(second)
        labels = labels.detach()
        if labels.is_floating_point():
            labels.requires_grad_(second)
        with torch.enable_grad():
            losses = _losses(self._logits(theta, images), labels)
            (gradient,) = torch.autograd.grad(losses.mean(), theta, create_graph=second)
        return losses.detach(), _Graph(gradient, theta, images, labels)

    def gradient(
        self, theta: Tensor, images: Tensor, labels: Tensor, keep: bool = False
    ) -> tuple[Tensor, Tensor, _Graph | _RandomState | None]:
        """Return losses, gradient and saved state; see :meth:`Engine.gradient`."""
        with precisions.computing_in(self.precision, theta.device):
            before = _random_state(theta.device)
            # Copied, because the caller may write to the memory that theta is a view of, while a
            # saved graph lives on.
            losses, graph = self._graph(
                theta.clone() if keep else theta, images, labels, second=keep
            )
            after = _random_state(theta.device)
        unchanged = torch.equal(before.cpu, after.cpu) and (
            before.cuda is None or after.cuda is None or torch.equal(before.cuda, after.cuda)
        )
        drawn = None if unchanged else before
        return losses, graph.gradient.detach(), graph._replace(before=drawn) if keep else drawn

    def without_activations(self, saved: _Graph | _RandomState | None) -> _RandomState | None:
        """Return the random state alone; see :meth:`Engine.without_activations`."""
        return saved.before if isinstance(saved, _Graph) else saved

    def saved_bytes(self, shape: PassShape) -> int:
        """Return the bytes that a step saves; see :meth:`Engine.saved_bytes`.

        For a module that is not a ConvNet, a step on zeros is run and measured. It changes no
        state.
        """
        if self.shape is not None:
            return estimates.saved_bytes(estimates.AUTOGRAD, self.shape, self.precision, shape)
        theta = torch.zeros(parameter_count(self.net), dtype=shape.dtype, device=shape.device)
        images = torch.zeros((shape.batch, *shape.image), dtype=shape.dtype, device=shape.device)
        labels = torch.zeros(shape.batch, dtype=torch.int64, device=shape.device)
        kept: dict[int, int] = {}  # bytes by address

        def note(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        with (
            _random_state_of(_random_state(shape.device), shape.device),
            precisions.computing_in(self.precision, shape.device),
            torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor),
        ):
            _, graph = self._graph(theta, images, labels, second=True)
            for own in (graph.gradient, graph.theta, graph.images):
                note(own)
        return sum(kept.values())

    def working_bytes(self, shape: PassShape, *, dual: bool = False, saved: bool = False) -> int:
        """Return the estimate for a ConvNet, and 0 for other modules."""
        if self.shape is None:
            return 0
        return estimates.working_bytes(
            estimates.AUTOGRAD, self.shape, self.precision, shape, dual, saved
        )

    def gradients(self, theta: Tensor, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Return losses and gradients, computed one network at a time."""
        check_side_by_side(theta, images, labels)
        with precisions.computing_in(self.precision, theta.device):
            found = [
                self._graph(*one, second=False) for one in zip(theta, images, labels, strict=True)
            ]
        return torch.stack([losses for losses, _ in found]), torch.stack(
            [graph.gradient for _, graph in found]
        )

    def dual(
        self,
        theta: Tensor,
        images: Tensor,
        labels: Tensor,
        direction: Tensor,
        saved: _Graph | _RandomState | None,
        want_theta: bool = True,
        rows: Tensor | None = None,
    ) -> DualResult:
        """Return the derivatives along ``direction``; see :meth:`Engine.dual`."""
        with precisions.computing_in(self.precision, theta.device):
            return self._dual(theta, images, labels, direction, saved, want_theta, rows)

    def _dual(
        self,
        theta: Tensor,
        images: Tensor,
        labels: Tensor,
        direction: Tensor,
        saved: _Graph | _RandomState | None,
        want_theta: bool,
        rows: Tensor | None,
    ) -> DualResult:
        if isinstance(saved, _Graph):
            graph = saved
        else:
            with _random_state_of(saved, theta.device):
                _, graph = self._graph(theta, images, labels, second=True)
        want_images = rows is None or rows.numel() > 0
        wanted: dict[str, Tensor] = {}
        if want_theta:
            wanted["theta"] = graph.theta
        if want_images:
            wanted["images"] = graph.images
        if labels.is_floating_point():
            wanted["labels"] = graph.labels
        with torch.enable_grad():
            slope = torch.dot(graph.gradient, direction)
        if wanted and slope.requires_grad:
            found = torch.autograd.grad(
                slope, list(wanted.values()), allow_unused=True, materialize_grads=True
            )
        else:
            found = tuple(torch.zeros_like(tensor) for tensor in wanted.values())
        results = dict(zip(wanted, found, strict=True))
        images_result = results.get("images")
        if images_result is not None and rows is not None:
            images_result = images_result.index_select(0, rows)
        return DualResult(
            slope.detach(), results.get("theta"), images_result, results.get("labels")
        )

    def logits(self, theta: Tensor, images: Tensor) -> Tensor:
        """Return logits [B, classes]."""
        with torch.no_grad(), precisions.computing_in(self.precision, theta.device):
            return self._logits(theta, images)

    def logits_of(self, theta: Tensor, images: Tensor) -> Tensor:
        """Return logits [K, B, classes], computed one network at a time."""
        check_side_by_side(theta)
        return torch.stack([self.logits(one, images) for one in theta])
