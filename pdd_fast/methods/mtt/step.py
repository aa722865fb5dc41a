"""One iteration of trajectory matching on tensors with fixed addresses, as a CUDA graph needs.

The result has the same bits as ``trajectory_matching_loss(unroll(...))`` differentiated by
autograd. Here the gradient λ_N of the loss is written out, and no step waits for a value from the
device.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from pdd_fast.engines import Engine, PassShape
from pdd_fast.functional.adjoint import UnrollSpec, Wanted, adjoint, forward_path, learned_rows
from pdd_fast.methods.mtt.inputs import InputBuffers, MatchingInputs
from pdd_fast.methods.mtt.settings import MatchingSettings
from pdd_fast.networks.parameters import parameter_count
from pdd_fast.runtime.errors import require
from pdd_fast.runtime.torch_internals import softmax_backward
from pdd_fast.training.cuda_graphs import Backend, Replay

# Smallest initial probability of a class. The gradient of a logit is proportional to the
# probability, so that a probability of 0 would stay 0.
_SMALLEST = 1e-6

_require = partial(require, "MatchingStep")


class MatchingState(NamedTuple):
    """Immutable state of the optimization; every iteration makes a new one."""

    images: Tensor  # [n, C, H, W]
    images_momentum_buffer: Tensor  # [n, C, H, W]
    lr: Tensor  # [] inner learning rate
    lr_momentum_buffer: Tensor  # []
    logits: Tensor  # [n, classes]; the labels are their softmax; [0, 0] if labels are not learned
    logits_momentum_buffer: Tensor

    @classmethod
    def start(cls, images: Tensor, lr: float, labels: Tensor | None = None) -> MatchingState:
        """Return the initial state, with zero momentum buffers.

        Args:
            images: [n, C, H, W].
            lr: The inner learning rate.
            labels: Probabilities [n, classes]; None if labels are not learned.
        """
        first = torch.tensor(lr, dtype=images.dtype, device=images.device)
        logits = images.new_empty(0, 0) if labels is None else labels.clamp_min(_SMALLEST).log()
        return cls.at_rest(images.clone(), first, logits)

    @classmethod
    def at_rest(cls, images: Tensor, lr: Tensor, logits: Tensor) -> MatchingState:
        """Return a state with these tensors and zero momentum buffers."""
        return cls(*(t for own in (images, lr, logits) for t in (own, torch.zeros_like(own))))

    @property
    def labels(self) -> Tensor:
        """Learned labels: probabilities [n, classes]."""
        return self.logits.softmax(1)


class MatchingResult(NamedTuple):
    """Result of an iteration."""

    state: MatchingState
    loss: float  # ‖θ_N−θ_T‖²/‖θ_0−θ_T‖² before the update, the mean over K trajectories
    lr: float  # inner learning rate of the new state
    finite: bool  # whether all images and logits of the new state are finite


class MatchingStep:
    """One iteration of MTT: N inner steps, their adjoint, and an SGD update with momentum.

    The update changes the images, the inner learning rate and, on request, the labels' logits.

    Args:
        engine: Engine of the network, on the device of the images.
        labels: int64 [m + n] or weights [m + n, classes], of the frozen images followed by the
            learned ones. Labels that are learned must be weights; their last n rows are not read,
            because the state holds them.
        frozen_images: [m, C, H, W]; m may be 0. They fix the type and the device.
        settings: Settings of the stage. The number of steps that save their activations is fixed
            here.
        backend: Backend of the capture, for tests.

    Raises:
        ValueError, TypeError: An argument does not fit. The message names the argument, the
            requirement and the value.
    """

    def __init__(
        self,
        engine: Engine,
        labels: Tensor,
        frozen_images: Tensor,
        settings: MatchingSettings,
        *,
        backend: Backend | None = None,
    ) -> None:
        _check(labels, frozen_images, settings)
        frozen, total, learns = len(frozen_images), len(labels), settings.learn_labels
        keep = settings.saved_steps(engine, PassShape.of(frozen_images, settings.batch))
        images = frozen_images.new_empty((total, *frozen_images.shape[1:]))
        images[:frozen] = frozen_images
        logits = labels[frozen:] if learns else images.new_empty(0, 0)
        inputs = InputBuffers(settings, images, parameter_count(engine.net))
        every_row = [None] * settings.steps
        self._buffers = _Buffers(
            settings,
            inputs,
            [
                UnrollSpec(engine, batches, aug_params, every_row, keep=keep)
                for batches, aug_params in zip(inputs.batches, inputs.aug_params, strict=True)
            ],
            labels.clone() if learns else labels,
            images,
            frozen,
            _empty_state(images[frozen:], logits),
            _empty_state(images[frozen:], logits),
            images.new_empty(3, dtype=torch.float64),
        )
        lrs = [settings.lr_img, settings.lr_lr, settings.lr_label]
        self._lrs = torch.tensor(lrs, dtype=torch.float64, device="cpu")
        iterate = partial(_iterate, self._buffers)
        self._replay = Replay(iterate, images.device, settings.graph, backend=backend)
        # The number of frozen rows differs from batch to batch. A graph needs fixed shapes, so it
        # computes the unused gradient of the frozen images too: some 3 % of the operations at
        # width 128. CUDA does so also without a graph, so that both give the same bits.
        self._skips_frozen = (
            frozen > 0 and images.device.type != "cuda" and not self._replay.captures
        )

    def __call__(
        self,
        state: MatchingState,
        inputs: MatchingInputs,
        meanwhile: Callable[[], None] | None = None,
        shorter: float = 1.0,
    ) -> MatchingResult:
        """Run one iteration and return the new state.

        ``state`` is not changed, so that an interrupt loses nothing.

        Args:
            state: The state before the iteration.
            inputs: The random inputs of the iteration.
            meanwhile: Work for the CPU while the GPU computes.
            shorter: Factor of all learning rates of the update.

        Returns:
            The new state, the loss before the update, and checks of the new state.

        Raises:
            ValueError: An input does not fit the constructor's arguments, or an index is out of
                range.
        """
        buffers = self._buffers
        buffers.inputs.write(inputs, self._lrs * shorter)
        if self._skips_frozen:
            buffers.skip_frozen(inputs.batches)
        for target, source in zip(buffers.old, state, strict=True):
            target.copy_(source)
        self._replay()
        if meanwhile is not None:
            meanwhile()
        loss, lr, finite = buffers.numbers.tolist()  # the only synchronization of an iteration
        return MatchingResult(
            MatchingState(*(tensor.clone() for tensor in buffers.new)), loss, lr, finite == 1
        )


def _check(labels: Tensor, frozen_images: Tensor, settings: MatchingSettings) -> None:
    """Raise ValueError if the arguments of :class:`MatchingStep` do not fit one another."""
    shape, device, dtype = tuple(frozen_images.shape), frozen_images.device, frozen_images.dtype
    _require(len(shape) == 4, "frozen_images", "have shape [m, C, H, W]", shape)
    total, frozen, batch = len(labels), len(frozen_images), settings.batch
    _require(total > frozen, "labels", f"be more than the {frozen} frozen images", total)
    _require(labels.device == device, "labels", f"be on {device}", labels.device)
    _require(batch <= total, "batch", f"lie in [1, {total}]", batch)
    _require(
        not settings.learn_labels or (labels.dim() == 2 and labels.dtype == dtype),
        "labels",
        f"be {dtype} [m + n, classes] to be learned",
        f"{labels.dtype} {tuple(labels.shape)}",
    )


@dataclass
class _Buffers:
    """Tensors that :func:`_iterate` reads and writes, at fixed addresses."""

    settings: MatchingSettings
    inputs: InputBuffers
    specs: list[UnrollSpec]  # K
    # [m + n] or [m + n, classes]; if labels are learned, every iteration writes the last n rows
    labels: Tensor
    images: Tensor  # [m + n, C, H, W]; the frozen images are written once
    frozen: int  # m
    old: MatchingState
    new: MatchingState
    numbers: Tensor  # float64 [3]: loss, lr and finite of MatchingResult

    def skip_frozen(self, batches: Tensor) -> None:
        """Compute no gradient of the frozen images of ``batches``, [N, b] or [K, N, b]."""
        self.specs = [
            replace(
                spec, rows=[learned_rows(batch >= self.frozen) for batch in own], frozen=self.frozen
            )
            for spec, own in zip(
                self.specs, batches.view(len(self.specs), -1, batches.shape[-1]), strict=True
            )
        ]


def _empty_state(images: Tensor, logits: Tensor) -> MatchingState:
    """Return an uninitialized state with the shapes of ``images`` and ``logits``."""
    lr = images.new_empty(())
    return MatchingState(
        *(torch.empty_like(like) for like in (images, images, lr, lr, logits, logits))
    )


@torch.no_grad()
def _iterate(b: _Buffers) -> None:
    """Run one iteration from ``b.old`` to ``b.new``."""
    settings, lrs, old, new = b.settings, b.inputs.lrs, b.old, b.new
    b.images[b.frozen :] = old.images
    if settings.learn_labels:
        b.labels[b.frozen :] = old.labels
    found = _matched(b, 0)
    if len(b.specs) > 1:
        for k in range(1, len(b.specs)):
            for total, one in zip(found, _matched(b, k), strict=True):
                total.add_(one)
        for total in found:
            total.div_(len(b.specs))
    loss, images_grad, slope, logits_grad = found
    if settings.max_grad_norm:
        images_grad = images_grad * (settings.max_grad_norm / images_grad.norm()).clamp_max(1)
    new.images_momentum_buffer.copy_(old.images_momentum_buffer * settings.momentum + images_grad)
    new.lr_momentum_buffer.copy_(old.lr_momentum_buffer * settings.momentum - slope)
    new.logits_momentum_buffer.copy_(old.logits_momentum_buffer * settings.momentum + logits_grad)
    new.images.copy_(old.images - lrs[0] * new.images_momentum_buffer)
    new.lr.copy_(old.lr - lrs[1] * new.lr_momentum_buffer)
    new.logits.copy_(old.logits - lrs[2] * new.logits_momentum_buffer)
    b.numbers.copy_(
        torch.stack([loss, new.lr, new.images.isfinite().all() & new.logits.isfinite().all()])
    )


def _matched(b: _Buffers, k: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the loss [] of trajectory k and its derivatives.

    These are the gradient with respect to the learned images, the sum of the slopes [], and the
    gradient with respect to the logits ([0, 0] if labels are not learned).
    """
    spec, start, target = b.specs[k], b.inputs.start[k], b.inputs.target[k]
    alphas = b.old.lr.expand(len(spec.batches))
    path, states = forward_path(spec, start, b.images, b.labels, alphas)
    # ∂L/∂θ_N = 2 (θ_N − θ_T) / ‖θ_0 − θ_T‖², rounded as autograd rounds it: the reciprocal first.
    difference, distance = path[-1] - target, (start - target).square().sum()
    loss = difference.square().sum() / distance
    grad = distance.reciprocal() * (difference * 2)
    wanted = Wanted(theta=False, images=True, labels=b.settings.learn_labels)
    found = adjoint(spec, path, states, b.images, b.labels, alphas, grad, wanted)
    assert found.images is not None
    logits_grad = torch.zeros_like(b.old.logits)
    if found.labels is not None:
        logits_grad = softmax_backward(found.labels[b.frozen :], b.labels[b.frozen :])
    return loss, found.images[b.frozen - spec.frozen :], found.slopes.sum(), logits_grad
