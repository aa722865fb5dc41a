"""Settings of trajectory matching: those of a run, and those of one stage's iterations."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import torch
from pydantic import Field, model_validator

from pdd_fast.engines import Engine, PassShape
from pdd_fast.functional.unroll import saved_steps
from pdd_fast.methods.base import ImageSgdSettings, StageProblem
from pdd_fast.runtime import device_memory
from pdd_fast.runtime.choices import Memory
from pdd_fast.runtime.errors import UsageError, require
from pdd_fast.settings import Settings
from pdd_fast.training.cuda_graphs import can_capture


@dataclass(frozen=True, kw_only=True)
class MatchingSettings:
    """Settings of :class:`pdd_fast.methods.mtt.step.MatchingStep`, the same for a whole stage.

    Raises:
        ValueError: A number is out of range.
    """

    steps: int  # N, inner steps of an iteration, at least 1
    batch: int  # b, images of an inner step, at least 1
    operations: int = 0  # k, the largest number of operations of an augmentation; 0: none
    # Height and width in pixels of the square that the operation cutout blanks.
    cutout: tuple[int, int] = (0, 0)
    memory: str = "recompute"  # as for pdd_fast.unroll
    memory_limit: int | None = None  # bytes, as for pdd_fast.unroll
    lr_img: float = 0.0  # learning rate of the images
    lr_lr: float = 0.0  # learning rate of the inner learning rate
    lr_label: float = 0.0  # learning rate of the labels' logits
    momentum: float = 0.0  # of all three
    learn_labels: bool = False  # whether the labels of the learned images are learned
    trajectories_per_step: int = 1  # K; an update takes the mean gradient over K trajectories
    # Largest norm of the images' gradient; a longer one is scaled down. 0: no limit.
    max_grad_norm: float = 0.0
    # Whether to replay a CUDA graph from the second iteration on. No effect on the CPU.
    graph: bool = False

    def __post_init__(self) -> None:
        for name, least in (
            ("steps", 1),
            ("batch", 1),
            ("operations", 0),
            ("trajectories_per_step", 1),
            ("max_grad_norm", 0),
        ):
            value = getattr(self, name)
            require("MatchingSettings", value >= least, name, f"be at least {least}", value)

    @property
    def trajectories(self) -> tuple[int, ...]:
        """Leading dimensions of an iteration's inputs: [K], or none of one trajectory."""
        return () if self.trajectories_per_step == 1 else (self.trajectories_per_step,)

    def saved_steps(self, engine: Engine, shape: PassShape) -> int:
        """Return the number of inner steps that save their activations, counted from the last.

        Raises:
            ValueError, TypeError: ``memory`` or ``memory_limit`` is invalid.
        """
        return saved_steps(
            "MatchingSettings", engine, [shape] * self.steps, self.memory, self.memory_limit
        )


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
        description="Largest norm of the images' gradient; a longer one is scaled down; 0: none.",
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

    def of_stage(self, problem: StageProblem) -> MatchingSettings:
        """Return the settings of the iterations of a stage."""
        run, device, learned = problem.settings, problem.images.device, len(problem.labels)
        # The number of operations and the cutout size are the same in every sample.
        sample = problem.dsa.sample(1, problem.image_size, torch.Generator())
        return MatchingSettings(
            steps=self.inner_steps,
            batch=min(self.inner_batch or learned, len(problem.union.labels) + learned),
            operations=len(sample.operations),
            cutout=sample.cutout_size,
            memory=self.memory,
            memory_limit=self._memory_limit(device),
            lr_img=self.lr_img_at(problem.stage),
            lr_lr=self.lr_lr,
            lr_label=self.lr_label,
            momentum=self.momentum,
            learn_labels=run.labels == "learned",
            trajectories_per_step=self.trajectories_per_step,
            max_grad_norm=self.max_grad_norm,
            graph=run.graph != "off" and can_capture(problem.engine, device),
        )

    def _memory_limit(self, device: torch.device) -> int | None:
        """Return the limit of saved activations in bytes; None unless memory=auto.

        The default is a share of the device's total memory, not of the memory that is free at the
        moment. Saved and recomputed activations round differently, and a run must give the same
        bits whatever else runs on the device.
        """
        if self.memory != "auto":
            return None
        if self.memory_limit:
            return int(min(self.memory_limit * 1e9, 2.0**62))
        return device_memory.total(device) // 2
