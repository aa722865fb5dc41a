"""One iteration of trajectory matching on tensors with fixed addresses, as a CUDA graph needs.

The result has the same bits as ``trajectory_matching_loss(unroll(...))`` differentiated by
autograd. Here the gradient λ_N of the loss is written out, and no step waits for a value from the
device.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from pdd_fast.augmentation.parameters import PackedAugmentParameters
from pdd_fast.engines import Engine, FusedEngine, PassShape
from pdd_fast.functional.adjoint import UnrollSpec, Wanted, adjoint, forward_path, learned_rows
from pdd_fast.functional.unroll import kept_steps
from pdd_fast.networks.parameters import parameter_count
from pdd_fast.ops import _native
from pdd_fast.ops.dsa import DRAWS, NOTHING
from pdd_fast.runtime.errors import require
from pdd_fast.training.cuda_graphs import Backend, Replay, Upload

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
        pairs = [(tensor, torch.zeros_like(tensor)) for tensor in (images.clone(), first, logits)]
        return cls(*(tensor for pair in pairs for tensor in pair))

    @property
    def labels(self) -> Tensor:
        """Learned labels: probabilities [n, classes]."""
        return self.logits.softmax(1)


class MatchingInputs(NamedTuple):
    """Random inputs of an iteration, on the CPU."""

    start: Tensor  # [P] θ_0, or [K, P] of K > 1 trajectories
    target: Tensor  # [P] θ_T, or [K, P]
    # int64 [N, b] or [K, N, b], rows of the frozen images followed by the learned ones
    batches: Tensor
    # of K·N·b images, batch after batch, as PackedAugmentParameters.of returns them
    aug_params: PackedAugmentParameters | None


class MatchingResult(NamedTuple):
    """Result of an iteration."""

    state: MatchingState
    loss: float  # ‖θ_N−θ_T‖²/‖θ_0−θ_T‖² before the update, the mean over K trajectories
    lr: float  # inner learning rate of the new state
    finite: bool  # whether all images and logits of the new state are finite


def can_capture(engine: Engine, device: torch.device) -> bool:
    """Return whether an iteration can be captured as a CUDA graph.

    The autograd engine reads random states, and the plain-torch operators read values from the
    device. Neither can be captured.
    """
    return (
        device.type == "cuda"
        and isinstance(engine, FusedEngine)
        and _native.load("cuda") is not None
    )


class MatchingStep:
    """One iteration of MTT: N inner steps, their adjoint, and an SGD update with momentum.

    The update changes the images, the inner learning rate and, on request, the labels' logits.

    Args:
        engine: Engine of the network, on the device of the images.
        labels: int64 [m + n] or weights [m + n, classes], of the frozen images followed by the
            learned ones.
        frozen_images: [m, C, H, W]; m may be 0. They fix the type and the device.
        steps: N, at least 1.
        batch: b, images of an inner step, at most m + n.
        operations: k, the largest number of operations of an augmentation; 0: no augmentation.
        cutout: Height and width in pixels of the square that the operation cutout blanks.
        memory: As for :func:`pdd_fast.unroll`. The number of steps that save their activations is
            fixed here.
        memory_limit: As for :func:`pdd_fast.unroll`.
        lr_img: Learning rate of the images.
        lr_lr: Learning rate of the inner learning rate.
        lr_label: Learning rate of the labels' logits.
        momentum: Momentum of all three.
        learn_labels: Whether the labels of the learned images are learned. ``labels`` must then be
            weights. Their last n rows are not read, because the state holds them.
        trajectories_per_step: K; an update takes the mean gradient over K trajectories.
        max_grad_norm: Largest norm of the images' gradient; a longer one is scaled down. 0: any.
        graph: Whether to replay a CUDA graph from the second call on
            (:class:`pdd_fast.training.cuda_graphs.Replay`). No effect on the CPU.
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
        *,
        steps: int,
        batch: int,
        operations: int = 0,
        cutout: tuple[int, int] = (0, 0),
        memory: str = "recompute",
        memory_limit: int | None = None,
        lr_img: float = 0.0,
        lr_lr: float = 0.0,
        lr_label: float = 0.0,
        momentum: float = 0.0,
        learn_labels: bool = False,
        trajectories_per_step: int = 1,
        max_grad_norm: float = 0.0,
        graph: bool = False,
        backend: Backend | None = None,
    ) -> None:
        frozen, total = len(frozen_images), len(labels)
        _require(
            frozen_images.dim() == 4,
            "frozen_images",
            "have shape [m, C, H, W]",
            tuple(frozen_images.shape),
        )
        _require(total > frozen, "labels", f"be more than the {frozen} frozen images", total)
        _require(
            labels.device == frozen_images.device,
            "labels",
            f"be on {frozen_images.device}",
            labels.device,
        )
        _require(steps >= 1, "steps", "be at least 1", steps)
        _require(1 <= batch <= total, "batch", f"lie in [1, {total}]", batch)
        _require(operations >= 0, "operations", "be at least 0", operations)
        _require(
            trajectories_per_step >= 1,
            "trajectories_per_step",
            "be at least 1",
            trajectories_per_step,
        )
        _require(max_grad_norm >= 0, "max_grad_norm", "be at least 0", max_grad_norm)
        weights = labels.dim() == 2 and labels.dtype == frozen_images.dtype
        _require(
            weights or not learn_labels,
            "labels",
            f"be {frozen_images.dtype} [m + n, classes] to be learned",
            f"{labels.dtype} {tuple(labels.shape)}",
        )
        device, dtype = frozen_images.device, frozen_images.dtype
        shape = PassShape.of(frozen_images, batch)
        keep = kept_steps("MatchingStep", engine, [shape] * steps, memory, memory_limit)
        parameters = parameter_count(engine.net)
        several = () if trajectories_per_step == 1 else (trajectories_per_step,)
        shapes: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
            "start": ((*several, parameters), dtype),
            "target": ((*several, parameters), dtype),
            "batches": ((*several, steps, batch), torch.int64),
            "lrs": ((3,), dtype),
        }
        if operations:
            shapes["values"] = ((trajectories_per_step * steps, len(DRAWS), batch), torch.float64)
            shapes["operations"] = ((trajectories_per_step * steps, operations, batch), torch.int32)
        self._inputs = Upload(shapes, device)
        fixed = self._inputs.tensors
        batches = fixed["batches"].view(-1, batch).unbind()
        aug_params: list[PackedAugmentParameters | None] = [None] * len(batches)
        if operations:
            aug_params = [
                PackedAugmentParameters(fixed["values"][i], fixed["operations"][i], cutout)
                for i in range(len(batches))
            ]
        specs = [
            UnrollSpec(
                engine,
                batches[first : first + steps],
                aug_params[first : first + steps],
                [None] * steps,
                keep=keep,
            )
            for first in range(0, len(batches), steps)
        ]
        images = frozen_images.new_empty((total, *frozen_images.shape[1:]))
        images[:frozen] = frozen_images
        logits = labels[frozen:] if learn_labels else images.new_empty(0, 0)
        self._buffers = _Buffers(
            specs,
            labels.clone() if learn_labels else labels,
            fixed["start"].view(-1, parameters),
            fixed["target"].view(-1, parameters),
            images,
            frozen,
            _empty_state(images[frozen:], logits),
            _empty_state(images[frozen:], logits),
            images.new_empty(3, dtype=torch.float64),
            fixed["lrs"],
            momentum,
            max_grad_norm,
            learn_labels,
        )
        self._shape, self._operations, self._cutout = (*several, steps, batch), operations, cutout
        self._lrs = torch.tensor([lr_img, lr_lr, lr_label], dtype=torch.float64, device="cpu")
        self._replay = Replay(partial(_iterate, self._buffers), device, graph, backend=backend)
        # The number of frozen rows differs from batch to batch. A graph needs fixed shapes, so it
        # computes the unused gradient of the frozen images too: some 3 % of the operations at
        # width 128. CUDA does so also without a graph, so that both give the same bits.
        self._skips_frozen = frozen > 0 and device.type != "cuda" and not self._replay.captures

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
        self._write(inputs, self._lrs * shorter)
        if self._skips_frozen:
            batches = inputs.batches.view(len(buffers.specs), -1, self._shape[-1])
            buffers.specs = [
                replace(
                    spec,
                    rows=[learned_rows(batch >= buffers.frozen) for batch in own],
                    frozen=buffers.frozen,
                )
                for spec, own in zip(buffers.specs, batches, strict=True)
            ]
        for target, source in zip(buffers.old, state, strict=True):
            target.copy_(source)
        self._replay()
        if meanwhile is not None:
            meanwhile()
        loss, lr, finite = buffers.numbers.tolist()  # the only synchronization of an iteration
        return MatchingResult(
            MatchingState(*(tensor.clone() for tensor in buffers.new)), loss, lr, finite == 1
        )

    def _write(self, inputs: MatchingInputs, lrs: Tensor) -> None:
        """Check ``inputs`` and copy them to their fixed addresses on the device."""
        batch, steps = self._shape[-1], math.prod(self._shape[:-1])
        total = len(self._buffers.images)
        batches = inputs.batches
        _require(batches.dtype == torch.int64, "batches", "be torch.int64", batches.dtype)
        _require(
            tuple(batches.shape) == self._shape,
            "batches",
            f"have shape {self._shape}",
            tuple(batches.shape),
        )
        low, high = int(batches.min()), int(batches.max())
        _require(
            low >= 0 and high < total, "batches", f"hold indices in [0, {total})", f"{low}..{high}"
        )
        sources = {"start": inputs.start, "target": inputs.target, "batches": batches, "lrs": lrs}
        if self._operations:
            aug_params = inputs.aug_params
            if aug_params is None:
                raise ValueError(
                    "MatchingStep: aug_params must be given where operations is not 0, got None"
                )
            k, images = aug_params.operations.shape
            _require(images == steps * batch, "aug_params", f"be of {steps * batch} images", images)
            _require(
                k <= self._operations,
                "aug_params",
                f"apply at most {self._operations} operations",
                k,
            )
            _require(
                aug_params.cutout_size == self._cutout,
                "aug_params",
                f"have cutout_size {self._cutout}",
                aug_params.cutout_size,
            )
            operations = aug_params.operations.new_full((self._operations, images), NOTHING)
            operations[:k] = aug_params.operations
            sources["values"] = aug_params.values.view(len(DRAWS), steps, batch).transpose(0, 1)
            sources["operations"] = operations.view(self._operations, steps, batch).transpose(0, 1)
        else:
            _require(
                inputs.aug_params is None,
                "aug_params",
                "be None where operations is 0",
                inputs.aug_params,
            )
        self._inputs.write(**sources)


@dataclass
class _Buffers:
    """Tensors that :func:`_iterate` reads and writes, at fixed addresses."""

    specs: list[UnrollSpec]  # K
    # [m + n] or [m + n, classes]; if labels are learned, every iteration writes the last n rows
    labels: Tensor
    start: Tensor  # [K, P]
    target: Tensor  # [K, P]
    images: Tensor  # [m + n, C, H, W]; the frozen images are written once
    frozen: int  # m
    old: MatchingState
    new: MatchingState
    numbers: Tensor  # float64 [3]: loss, lr and finite of MatchingResult
    lrs: Tensor  # [3], learning rates of the images, the inner learning rate and the logits
    momentum: float
    max_grad_norm: float
    learn_labels: bool


def _empty_state(images: Tensor, logits: Tensor) -> MatchingState:
    """Return an uninitialized state with the shapes of ``images`` and ``logits``."""
    lr = images.new_empty(())
    return MatchingState(
        *(torch.empty_like(like) for like in (images, images, lr, lr, logits, logits))
    )


@torch.no_grad()
def _iterate(b: _Buffers) -> None:
    """Run one iteration from ``b.old`` to ``b.new``."""
    old, new = b.old, b.new
    b.images[b.frozen :] = old.images
    if b.learn_labels:
        b.labels[b.frozen :] = old.labels
    found = _matched(b, 0)
    if len(b.specs) > 1:
        for k in range(1, len(b.specs)):
            for total, one in zip(found, _matched(b, k), strict=True):
                total.add_(one)
        for total in found:
            total.div_(len(b.specs))
    loss, images_grad, slope, logits_grad = found
    if b.max_grad_norm:
        images_grad = images_grad * (b.max_grad_norm / images_grad.norm()).clamp_max(1)
    new.images_momentum_buffer.copy_(old.images_momentum_buffer * b.momentum + images_grad)
    new.lr_momentum_buffer.copy_(old.lr_momentum_buffer * b.momentum - slope)
    new.logits_momentum_buffer.copy_(old.logits_momentum_buffer * b.momentum + logits_grad)
    new.images.copy_(old.images - b.lrs[0] * new.images_momentum_buffer)
    new.lr.copy_(old.lr - b.lrs[1] * new.lr_momentum_buffer)
    new.logits.copy_(old.logits - b.lrs[2] * new.logits_momentum_buffer)
    b.numbers.copy_(
        torch.stack([loss, new.lr, new.images.isfinite().all() & new.logits.isfinite().all()])
    )


def _matched(b: _Buffers, k: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the loss [] of trajectory k and its derivatives.

    These are the gradient with respect to the learned images, the sum of the slopes [], and the
    gradient with respect to the logits ([0, 0] if labels are not learned).
    """
    spec, start, target = b.specs[k], b.start[k], b.target[k]
    alphas = b.old.lr.expand(len(spec.batches))
    path, kept = forward_path(spec, start, b.images, b.labels, alphas)
    # ∂L/∂θ_N = 2 (θ_N − θ_T) / ‖θ_0 − θ_T‖², rounded as autograd rounds it: the reciprocal first.
    difference, distance = path[-1] - target, (start - target).square().sum()
    loss = difference.square().sum() / distance
    grad = distance.reciprocal() * (difference * 2)
    wanted = Wanted(theta=False, images=True, labels=b.learn_labels)
    found = adjoint(spec, path, kept, b.images, b.labels, alphas, grad, wanted)
    assert found.images is not None
    logits_grad = torch.zeros_like(b.old.logits)
    if found.labels is not None:
        learned = b.labels[b.frozen :]
        logits_grad = torch._softmax_backward_data(
            found.labels[b.frozen :], learned, 1, learned.dtype
        )
    return loss, found.images[b.frozen - spec.frozen :], found.slopes.sum(), logits_grad
