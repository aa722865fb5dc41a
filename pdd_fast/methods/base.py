"""Interface of methods: what a stage of progressive distillation gives one and gets back.

docs/method.md, "Another method", adds one step by step.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, Protocol

import torch
from pydantic import Field, field_validator
from torch import Tensor

from pdd_fast.augmentation.dsa import DSA
from pdd_fast.data import Normalization, Split
from pdd_fast.data.union_set import UnionSet
from pdd_fast.engines import Engine
from pdd_fast.networks.parameters import initial_parameters
from pdd_fast.runtime import seeds
from pdd_fast.runtime.errors import UsageError
from pdd_fast.runtime.method_settings import MethodSettings
from pdd_fast.runtime.models import numbers
from pdd_fast.settings import Settings
from pdd_fast.storage.trajectories import Trajectory
from pdd_fast.training.sgd import Sgd


class ImageSgdSettings(MethodSettings):
    """Settings of a method that updates its images by SGD with momentum."""

    lr_img: float = Field(1.0, ge=0, description="Learning rate of the images.")
    stage_lr_img: str = Field(
        "",
        description="Learning rate of the images in each stage, as in 1000,500,500; empty: "
        "lr_img in all.",
    )
    momentum: float = Field(
        0.5,
        ge=0,
        lt=1,
        description="Momentum of the images, and of a learned learning rate and learned labels.",
    )

    @field_validator("stage_lr_img")
    @classmethod
    def _check_stage_lr_img(cls, text: str) -> str:
        if text:
            numbers("stage_lr_img", text)
        return text

    def check_run(self, run: Settings) -> None:
        """Raise UsageError unless ``stage_lr_img`` is empty or has a number for every stage."""
        if self.stage_lr_img and len(numbers("stage_lr_img", self.stage_lr_img)) != run.stages:
            raise UsageError(
                f"stage_lr_img must hold a number for each of the stages ({run.stages}), got "
                f"{self.stage_lr_img}"
            )

    def lr_img_at(self, stage: int) -> float:
        """Return the learning rate of the images in ``stage``, counted from 1."""
        if not self.stage_lr_img:
            return self.lr_img
        return numbers("stage_lr_img", self.stage_lr_img)[stage - 1]


class StartNetworks(Protocol):
    """Networks that a stage matches its images on, trained on every earlier union in turn."""

    @property
    def sgd(self) -> Sgd:
        """The SGD that trains them, with CutMix: its labels are weights [n, classes]."""
        ...

    def parameters(self, iteration: int) -> Tensor:
        """Return the parameters [P] of the start network of ``iteration``."""
        ...


@dataclass(frozen=True)
class StageProblem:
    """Inputs of a method in one stage of progressive distillation, on the run's device."""

    stage: int  # 1-based
    settings: Settings  # of the run; BaseMethod.settings holds the method's own
    train: Split  # the run's real training images
    rows: Tensor | None  # rows of train that the stage is distilled from; None: all
    # Frozen images of the earlier stages; empty if conditioning is off.
    union: UnionSet
    trajectories: list[Trajectory]  # empty if the method needs none
    images: Tensor  # [n, C, H, W] initial images of the stage, made of real ones, as stored
    labels: Tensor  # [n], or probabilities [n, classes], which labels=learned optimizes
    engine: Engine  # of the run's network
    dsa: DSA  # the run's augmentation
    normalization: Normalization  # of the images
    num_classes: int
    device: torch.device
    side_by_side: int  # number of networks to train in parallel
    # Makes the stage's start networks from their number (0: a new one for every iteration) and
    # the probability of CutMix.
    start_networks: Callable[[int, float], StartNetworks]

    @cached_property
    def real(self) -> Split:
        """Real images that the stage is distilled from: ``train``, or a copy of its ``rows``."""
        if self.rows is None:
            return self.train
        rows = self.rows.to(self.device)
        return Split(self.train.images[rows], self.train.labels[rows])

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width of an image in pixels."""
        H, W = self.images.shape[2:]
        return H, W

    def generator(self, *purpose: str | int) -> torch.Generator:
        """Return a generator whose values depend only on the run's seed and on ``purpose``."""
        return seeds.generator(self.settings.seed, *purpose)

    def initial_parameters(self, *purpose: str | int) -> Tensor:
        """Return initial parameters [P], which depend only on the run's seed and ``purpose``."""
        seed = seeds.derive(self.settings.seed, *purpose, "parameters")
        return initial_parameters(self.engine.net, seed)


class BaseMethod(ABC):
    """Base class of methods, which learn the images of a stage one iteration at a time.

    Random values of an iteration depend only on the run's seed, the stage and the iteration's
    number (:meth:`StageProblem.generator`). A continued run therefore needs :meth:`state` alone.

    Args:
        problem: The stage's inputs.
    """

    Settings: ClassVar[type[MethodSettings]] = MethodSettings  # class of the method's settings
    # Whether the run trains experts and its stages have transitions.
    needs_trajectories: ClassVar[bool] = False

    settings: MethodSettings  # of this run, an instance of Settings

    def __init__(self, problem: StageProblem) -> None:
        self.problem = problem
        self.settings = problem.settings.method

    @property
    @abstractmethod
    def iteration(self) -> int:
        """Number of iterations done."""

    @property
    @abstractmethod
    def images(self) -> Tensor:
        """Current images of the stage [n, C, H, W], as a distilled set stores them."""

    @property
    def labels(self) -> Tensor:
        """Current labels of the stage, [n] or [n, classes]."""
        return self.problem.labels

    @property
    def learning_rate(self) -> float:
        """Learning rate for training networks on the images."""
        return self.problem.settings.inner_lr

    @abstractmethod
    def step(self) -> dict[str, float]:
        """Run one iteration.

        :meth:`state` changes only when the iteration is complete, so that an interrupt loses
        nothing.

        Returns:
            Values to report, "loss" among them.

        Raises:
            RunError: The method diverged, for example because the loss or the images are not
                finite.
        """

    @abstractmethod
    def state(self) -> dict[str, Tensor]:
        """Return what :meth:`load_state` needs to continue with the same bits, on the CPU."""

    @abstractmethod
    def load_state(self, state: dict[str, Tensor]) -> None:
        """Restore a state that :meth:`state` returned in this process or an earlier one."""
