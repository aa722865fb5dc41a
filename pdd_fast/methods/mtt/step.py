"""One iteration of trajectory matching as one function on tensors that stay where they are, so that
it can be a graph.

The mathematics is that of ``trajectory_matching_loss(unroll(...))`` differentiated by autograd, and
so are the bits; here λ_N is written down, and nothing on the way asks the device for a number.
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

# Of a class's probability where learning starts. The gradient of a logit is proportional to it:
# from 0 it would stay 0.
_SMALLEST = 1e-6


_require = partial(require, "MatchingStep")


class MatchingState(NamedTuple):
    """What an iteration changes. Never written to: an iteration gives a new one."""

    images: Tensor  # [n, C, H, W]
    images_momentum_buffer: Tensor  # [n, C, H, W]
    lr: Tensor  # [] inner learning rate
    lr_momentum_buffer: Tensor  # []
    logits: (
        Tensor  # [n, classes], whose softmax the labels are; [0, 0] where labels are not learned
    )
    logits_momentum_buffer: Tensor

    @classmethod
    def start(cls, images: Tensor, lr: float, labels: Tensor | None = None) -> MatchingState:
        """At rest at ``images`` [n, C, H, W], ``lr`` and, where they are learned, ``labels`` [n,
        classes], which are probabilities.
        """
        first = torch.tensor(lr, dtype=images.dtype, device=images.device)
        logits = images.new_empty(0, 0) if labels is None else labels.clamp_min(_SMALLEST).log()
        pairs = [(tensor, torch.zeros_like(tensor)) for tensor in (images.clone(), first, logits)]
        return cls(*(tensor for pair in pairs for tensor in pair))

    @property
    def labels(self) -> Tensor:
        """The learned labels: probabilities [n, classes]."""
        return self.logits.softmax(1)


class MatchingInputs(NamedTuple):
    """What an iteration draws; on the CPU."""

    start: Tensor  # [P] θ_0; of K trajectories, K > 1, [K, P]
    target: Tensor  # [P] θ_T, or [K, P]
    batches: (
        Tensor  # int64 [N, b], or [K, N, b], rows of the frozen images followed by the learned ones
    )
    aug_params: (
        PackedAugmentParameters | None
    )  # of K·N·b images, batch after batch, as PackedDraws.of gives them


class MatchingResult(NamedTuple):
    state: MatchingState
    loss: float  # ‖θ_N−θ_T‖²/‖θ_0−θ_T‖², before the update; the mean of K
    lr: float  # the new state's
    finite: bool  # whether all of the new state's images and logits are


def can_capture(engine: Engine, device: torch.device) -> bool:
    """Whether an iteration can be a CUDA graph: autograd's engine asks for random states, the
    plain-torch operators for numbers of the device.
    """
    return (
        device.type == "cuda"
        and isinstance(engine, FusedEngine)
        and _native.load("cuda") is not None
    )


class MatchingStep:
    """One iteration of MTT: N inner steps forward, N back, and an SGD update with momentum of
    images and rate.

    Args:
        engine: of the network, on the device of the images.
        labels: int64 [m + n] or weights [m + n, classes], of the frozen images and then of the
            learned ones.
        frozen_images: [m, C, H, W], m may be 0; their type and device are those of everything else.
        steps: N, at least 1.
        batch: b, images of an inner step, at most m + n.
        operations: k, the most operations that any draw applies; 0: no augmentation.
        cutout: height and width of what the operation cutout blanks, pixels.
        memory, memory_limit: as for :func:`pdd_fast.unroll`; how many steps keep their activations
            is settled here and for good.
        lr_img, lr_lr, lr_label, momentum: of the update; the rates are those of the images, of the
            inner rate and of learned labels' logits.
        learn_labels: the labels of the learned images are learned too. ``labels`` has to be weights
            then, whose last n rows are not read: the state has them.
        trajectories: K, whose mean gradient an update takes.
        clip: largest norm of the images' gradient, which is scaled down to it; 0: any.
        graph: one launch from the second call on (:class:`pdd_fast.training.cuda_graphs.Replay`);
            no effect on CPU.
        backend: how a graph is captured; for tests.

    Raises:
        ValueError, TypeError: an argument does not fit; the message names it, what it must be and
            what it is.
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
        # How many rows of a batch are frozen changes from batch to batch. Where shapes have to
        # stay, frozen images get a gradient too, which nobody reads: some 3 % of the operations at
        # width 128. On CUDA also without a graph, so that both give the same bits.
        self._skips_frozen = frozen > 0 and device.type != "cuda" and not self._replay.captures

    def __call__(
        self,
        state: MatchingState,
        inputs: MatchingInputs,
        meanwhile: Callable[[], None] | None = None,
        shorter: float = 1.0,
    ) -> MatchingResult:
        """The iteration from ``state``, which is left as it is, so that nothing is lost where it is
        interrupted.

        Args:
            meanwhile: what the host does while a GPU is at work.
            shorter: factor of all rates of the update.

        Raises:
            ValueError: an input does not fit what the constructor was told, or an index is out of
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
        loss, lr, finite = buffers.numbers.tolist()  # the only wait of an iteration
        return MatchingResult(
            MatchingState(*(tensor.clone() for tensor in buffers.new)), loss, lr, finite == 1
        )

    def _write(self, inputs: MatchingInputs, lrs: Tensor) -> None:
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
    """What :func:`_iterate` reads and writes."""

    specs: list[UnrollSpec]  # K
    # [m + n] or [m + n, classes]; where they are learned the last n rows are written every time
    labels: Tensor
    start: Tensor  # [K, P]
    target: Tensor  # [K, P]
    images: Tensor  # [m + n, C, H, W], the frozen ones written once
    frozen: int  # m
    old: MatchingState
    new: MatchingState
    numbers: Tensor  # float64 [3], as MatchingResult has them after the state
    lrs: Tensor  # [3], of the images, of the inner rate and of the logits
    momentum: float
    max_grad_norm: float
    learn_labels: bool


def _empty_state(images: Tensor, logits: Tensor) -> MatchingState:
    lr = images.new_empty(())
    return MatchingState(
        *(torch.empty_like(like) for like in (images, images, lr, lr, logits, logits))
    )


@torch.no_grad()
def _iterate(b: _Buffers) -> None:
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
    """Of trajectory k: the loss [], its gradient with respect to the learned images, the sum of the
    slopes [], and the gradient with respect to the logits ([0, 0] where labels are not learned).
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
