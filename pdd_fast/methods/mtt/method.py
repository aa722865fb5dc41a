"""Trajectory matching (MTT; Cazenavette et al., CVPR 2022, arXiv 2203.11932).

The loss is their equation 2, the procedure their algorithm 1.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from contextlib import suppress
from typing import NamedTuple, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from pdd_fast.augmentation.parameters import PackedAugmentParameters
from pdd_fast.engines import PassShape
from pdd_fast.functional.unroll import kept_steps
from pdd_fast.methods.base import BaseMethod, ImageSgdSettings, StageProblem
from pdd_fast.methods.mtt.memory import matching_bytes
from pdd_fast.methods.mtt.step import (
    MatchingInputs,
    MatchingResult,
    MatchingState,
    MatchingStep,
    can_capture,
)
from pdd_fast.runtime import device_memory
from pdd_fast.runtime.choices import Memory
from pdd_fast.runtime.errors import RunError, UsageError
from pdd_fast.settings import Settings

# Iterations between two rollback points. Two are stored, and a rollback takes the older: when
# images stop being finite, those of the last few iterations have usually begun to diverge.
_ANCHOR = 20


class TrajectoryMatchingSettings(ImageSgdSettings):
    """Settings of MTT; defaults are those of PDD for CIFAR-10 at 10 images per class."""

    inner_steps: int = Field(50, ge=1, description="SGD steps that an iteration unrolls, N.")
    expert_epochs: int = Field(
        2, ge=1, description="Epochs of a trajectory from the start to the target."
    )
    max_start_epoch: int = Field(
        5, ge=0, description="Last epoch of a trajectory that an iteration may start from."
    )
    inner_batch: int = Field(
        0, ge=0, description="Images of an inner step; 0: as many as the stage makes."
    )
    trajectories_per_step: int = Field(
        1, ge=1, description="Trajectories of an iteration, whose mean gradient is taken."
    )
    lr_img: float = Field(1000.0, ge=0, description="Learning rate of the images.")
    lr_lr: float = Field(1e-7, ge=0, description="Learning rate of the inner learning rate.")
    lr_label: float = Field(
        10.0, ge=0, description="Learning rate of learned labels, of their logits."
    )
    max_grad_norm: float = Field(
        0.0,
        ge=0,
        description="Largest norm of the images' gradient; a longer one is scaled down; 0: any.",
    )
    ema_decay: float = Field(
        0.0, ge=0, lt=1, description="EMA decay of the images; 0 disables averaging."
    )
    max_rollbacks: int = Field(
        5,
        ge=0,
        description="Maximum number of rollbacks, each halving the step size, before the stage "
        "fails.",
    )
    memory: Memory = Field(
        "recompute",
        description="Activations of inner steps: recompute, cache (keep all), or auto (keep up "
        "to a limit).",
    )
    memory_limit: float = Field(
        0.0,
        ge=0,
        description="Limit of memory=auto, gigabytes (10^9 bytes); 0: half of the device's memory.",
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.memory == "cache" and self.memory_limit:
            raise UsageError(
                "memory_limit must be 0 where memory is cache, which keeps everything, got "
                f"{self.memory_limit:g}; set memory=auto"
            )
        return self

    @property
    def trajectory_epochs(self) -> int:
        """Number of epochs that a trajectory must have."""
        return self.max_start_epoch + self.expert_epochs

    def check_run(self, run: Settings) -> None:
        """Raise UsageError if the run uses multi-formation or its experts train too briefly."""
        super().check_run(run)
        self.require(run, factor=(1,))
        if self.trajectory_epochs > run.expert_train_epochs:
            raise UsageError(
                "expert_train_epochs must be at least max_start_epoch + expert_epochs "
                f"({self.max_start_epoch} + {self.expert_epochs}), got {run.expert_train_epochs}"
            )


class RollbackWarning(UserWarning):
    """Warning that the images were rolled back and the step size halved."""


class _Point(NamedTuple):
    """Learned tensors without their momentum buffers."""

    images: Tensor  # [n, C, H, W]
    lr: Tensor  # []
    logits: Tensor  # [n, classes], or [0, 0]

    @classmethod
    def of(cls, state: MatchingState) -> _Point:
        """Return the learned tensors of ``state``."""
        return cls(state.images, state.lr, state.logits)

    def at_rest(self) -> MatchingState:
        """Return a state with these tensors and zero momentum buffers."""
        return MatchingState(*(t for tensor in self for t in (tensor, torch.zeros_like(tensor))))


class _Progress(NamedTuple):
    """Immutable state of :class:`TrajectoryMatching`."""

    iteration: int
    state: MatchingState
    average: _Point  # EMA over iterations; lr is not averaged and is that of state
    halvings: int  # number of times that the step size was halved
    older: _Point  # rollback point, _ANCHOR to 2 * _ANCHOR iterations old
    newer: _Point  # the next rollback point

    @classmethod
    def start(cls, state: MatchingState) -> _Progress:
        """Return the progress before the first iteration."""
        point = _Point.of(state)
        return cls(0, state, point, 0, point, point)

    def rolled_back(self) -> _Progress:
        """Return the progress at the older point, at rest and with half the step size."""
        return self._replace(
            state=self.older.at_rest(),
            average=self.older,
            halvings=self.halvings + 1,
            newer=self.older,
        )

    def followed_by(self, state: MatchingState, decay: float) -> _Progress:
        """Return the progress after an iteration that returned ``state``, with this EMA decay."""
        iteration, point = self.iteration + 1, _Point.of(state)
        average = point
        if decay:
            images, _, logits = (
                old.lerp(new, 1 - decay) for old, new in zip(self.average, point, strict=True)
            )
            average = _Point(images, state.lr, logits)
        older, newer = self.older, self.newer
        if iteration % _ANCHOR == 0:
            older, newer = newer, point
        return _Progress(iteration, state, average, self.halvings, older, newer)

    def tensors(self) -> dict[str, Tensor]:
        """Return all fields as tensors by name, for a checkpoint."""
        found = {
            "iteration": torch.tensor(self.iteration, device="cpu"),
            "halvings": torch.tensor(self.halvings, device="cpu"),
        }
        found |= self.state._asdict()
        # Without averaging, the average is the state itself and is not stored twice.
        own_average = [] if self.average.images is self.state.images else ["average"]
        for name in (*own_average, "older", "newer"):
            found |= {
                f"{name}_{field}": tensor for field, tensor in getattr(self, name)._asdict().items()
            }
        return found

    @classmethod
    def of_tensors(cls, tensors: dict[str, Tensor]) -> _Progress:
        """Return the progress that :meth:`tensors` described."""
        state = MatchingState(*(tensors[name] for name in MatchingState._fields))

        def point(name: str) -> _Point:
            return _Point(*(tensors[f"{name}_{field}"] for field in _Point._fields))

        average = point("average") if "average_images" in tensors else _Point.of(state)
        return cls(
            int(tensors["iteration"]),
            state,
            average,
            int(tensors["halvings"]),
            point("older"),
            point("newer"),
        )


class TrajectoryMatching(BaseMethod):
    """Method that matches training trajectories.

    SGD with momentum on the matching loss updates the images, the inner learning rate and, if
    labels=learned, the labels.

    Args:
        problem: The stage's inputs.

    Raises:
        UsageError: An iteration would take more memory than the GPU has.
    """

    Settings = TrajectoryMatchingSettings
    needs_trajectories = True

    settings: TrajectoryMatchingSettings

    def __init__(self, problem: StageProblem) -> None:
        super().__init__(problem)
        own, settings = self.settings, problem.settings
        images = problem.images
        self._total = len(problem.union.labels) + len(problem.labels)
        self._batch = min(own.inner_batch or len(problem.labels), self._total)
        device_memory.require(
            images.device, self._bytes(), f"stage {problem.stage}: an iteration", self._lower()
        )
        # Replaced as a whole at the end of an iteration, so that an interrupt never leaves half an
        # update.
        learned = problem.labels if settings.labels == "learned" else None
        self._done = _Progress.start(MatchingState.start(images, settings.inner_lr, learned))
        # An iteration's inputs, prepared while the GPU was busy.
        self._ahead: tuple[int, MatchingInputs] | None = None
        # The number of operations and the cutout size are the same in every sample.
        drawn = problem.dsa.sample(1, self.problem.image_size, torch.Generator())
        self._step = MatchingStep(
            problem.engine,
            torch.cat([problem.union.labels, problem.labels]),
            problem.union.images,
            steps=own.inner_steps,
            batch=self._batch,
            operations=len(drawn.operations),
            cutout=drawn.cutout_size,
            memory=own.memory,
            memory_limit=self._memory_limit(),
            lr_img=self._lr_img,
            lr_lr=own.lr_lr,
            lr_label=own.lr_label,
            momentum=own.momentum,
            learn_labels=learned is not None,
            trajectories_per_step=own.trajectories_per_step,
            max_grad_norm=own.max_grad_norm,
            graph=settings.graph != "off" and can_capture(problem.engine, images.device),
        )

    @property
    def iteration(self) -> int:
        """Number of iterations done."""
        return self._done.iteration

    @property
    def images(self) -> Tensor:
        """Current images of the stage [n, C, H, W], averaged if ``ema_decay`` is not 0."""
        return self._done.average.images

    @property
    def labels(self) -> Tensor:
        """Current labels of the stage, [n] or [n, classes]; learned ones averaged as the images."""
        if self.problem.settings.labels != "learned":
            return self.problem.labels
        return self._done.average.logits.softmax(1)

    @property
    def learning_rate(self) -> float:
        """Learned inner learning rate."""
        return float(self._done.state.lr)

    @property
    def _lr_img(self) -> float:
        return self.settings.lr_img_at(self.problem.stage)

    def _memory_limit(self) -> int | None:
        """Return the limit of saved activations in bytes; None unless memory=auto.

        The default is a share of the device's total memory, not of the memory that is free at the
        moment. Saved and recomputed activations round differently, and a run must give the same
        bits whatever else runs on the device.
        """
        own = self.settings
        if own.memory != "auto":
            return None
        if own.memory_limit:
            return int(min(own.memory_limit * 1e9, 2.0**62))
        return device_memory.total(self.problem.images.device) // 2

    def _bytes(self) -> int:
        """Return the estimated peak number of bytes of an iteration."""
        problem, own = self.problem, self.settings
        shape = PassShape.of(problem.images, self._batch)
        steps = [shape] * own.inner_steps
        return matching_bytes(
            problem.engine,
            shape,
            steps=own.inner_steps,
            kept=kept_steps("matching", problem.engine, steps, own.memory, self._memory_limit()),
            learned=len(problem.labels),
            frozen=len(problem.union.labels),
        )

    def _lower(self) -> str:
        """Return advice that lowers the memory of an iteration, the most effective last."""
        own, settings = self.settings, self.problem.settings
        batch, width = f"inner_batch (now {self._batch})", f"width (now {settings.width})"
        if own.memory == "auto":
            limit = device_memory.format_bytes(self._memory_limit() or 0)
            return f"{batch}, {width} or memory_limit (now {limit}), or set memory=recompute"
        if own.memory == "cache":
            return f"{batch} or {width}, or set memory=recompute"
        return f"{batch} or {width}" + (
            ", or set engine=fused" if settings.engine == "autograd" else ""
        )

    def step(self) -> dict[str, float]:
        """Run one iteration; roll back and halve the step size as often as it diverges.

        Returns:
            Values to report: "loss", "inner_lr", and after a rollback "halvings".

        Raises:
            RunError: The iteration diverged after ``max_rollbacks`` rollbacks.
        """
        done, own = self._done, self.settings
        iteration = done.iteration
        if self._ahead is None or self._ahead[0] != iteration:
            self._ahead = (iteration, self._inputs(iteration))
        inputs, where = self._ahead[1], f"stage {self.problem.stage}, iteration {iteration + 1}"
        meanwhile: Callable[[], None] | None = self._look_ahead
        while True:
            with device_memory.explained(done.state.images.device, where, self._lower()):
                result = self._step(done.state, inputs, meanwhile, 0.5**done.halvings)
            wrong = self._wrong(result)
            if wrong is None:
                break
            if done.halvings == own.max_rollbacks:
                times = (
                    f", after its steps were halved {done.halvings} times" if done.halvings else ""
                )
                raise RunError(f"{where}: {wrong[0]}{times}; start again with a smaller {wrong[1]}")
            done, meanwhile = done.rolled_back(), None
            warnings.warn(
                f"{where}: {wrong[0]}; going on from the images of {_ANCHOR} to {2 * _ANCHOR} "
                f"iterations before, with steps of 1/{2**done.halvings}",
                RollbackWarning,
                stacklevel=2,
            )
        self._done = done.followed_by(result.state, own.ema_decay)
        values = {"loss": result.loss, "inner_lr": result.lr}
        return values | ({"halvings": done.halvings} if done.halvings else {})

    def _look_ahead(self) -> None:
        """Prepare the next iteration's inputs.

        Errors are suppressed: they occur again when the inputs are needed.
        """
        following = self.iteration + 1
        with suppress(Exception):
            self._ahead = (following, self._inputs(following))

    def _inputs(self, iteration: int) -> MatchingInputs:
        """Sample trajectories, batches and augmentation parameters of ``iteration``."""
        problem, own = self.problem, self.settings
        generator, dsa = (problem.generator("matching", problem.stage, iteration), problem.dsa)
        pairs, batches, drawn = [], [], []
        for _ in range(own.trajectories_per_step):
            trajectory = problem.trajectories[self._integer(len(problem.trajectories), generator)]
            first = self._integer(own.max_start_epoch + 1, generator)
            pairs.append(trajectory.pair(first, own.expert_epochs))
            steps = self._batches(generator)
            batches.append(torch.stack(steps))
            if dsa.operations:
                drawn += [
                    dsa.sample(self._batch, self.problem.image_size, generator) for _ in steps
                ]
        aug_params = PackedAugmentParameters.of(drawn) if drawn else None
        if own.trajectories_per_step == 1:
            return MatchingInputs(*pairs[0], batches[0], aug_params)
        starts, targets = (torch.stack(points) for points in zip(*pairs, strict=True))
        return MatchingInputs(starts, targets, torch.stack(batches), aug_params)

    def _wrong(self, result: MatchingResult) -> tuple[str, str] | None:
        """Return how an iteration diverged and the settings to lower; None if it did not."""
        own, settings = self.settings, self.problem.settings
        lr_img, lr_lr = f"lr_img (now {self._lr_img:g})", f"lr_lr (now {own.lr_lr:g})"
        if not math.isfinite(result.loss) or not result.finite:
            lrs = f"{lr_img}, {lr_lr} or inner_lr (now {settings.inner_lr:g})"
            what = "images"
            if settings.labels == "learned":
                lrs, what = f"lr_label (now {own.lr_label:g}), {lrs}", "images or labels"
            return (
                f"the matching loss is {result.loss:g} and the {what} are no longer finite",
                lrs,
            )
        if not result.lr > 0:
            return f"the learned inner rate became {result.lr:g}", lr_lr
        return None

    def _batches(self, generator: torch.Generator) -> list[Tensor]:
        """Sample the N batches of an iteration as rows of the union.

        Every pass over the union has a new random order. The rest that does not fill a batch is
        dropped.
        """
        size, steps = self._batch, self.settings.inner_steps
        batches: list[Tensor] = []
        while len(batches) < steps:
            order = torch.randperm(self._total, generator=generator, device="cpu")
            batches += order[: self._total // size * size].split(size)
        return batches[:steps]

    @staticmethod
    def _integer(bound: int, generator: torch.Generator) -> int:
        """Return a random integer in [0, bound)."""
        return int(torch.randint(bound, (), generator=generator, device="cpu"))

    def state(self) -> dict[str, Tensor]:
        """Return the state on the CPU; see :meth:`BaseMethod.state`."""
        return {name: tensor.cpu() for name, tensor in self._done.tensors().items()}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Restore a state; see :meth:`BaseMethod.load_state`."""
        self._done = _Progress.of_tensors(
            {name: tensor.to(self.images.device) for name, tensor in state.items()}
        )
