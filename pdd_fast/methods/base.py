"""Base methods: what one is given by a stage of progressive distillation, and what it gives back.

docs/method.md, "Another method", adds one step by step.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
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
from pdd_fast.settings import MethodSettings, Settings, numbers
from pdd_fast.storage.trajectories import Trajectory
from pdd_fast.training.sgd import TrainState


class ImageSgdSettings(MethodSettings):
    """Settings of a method that moves its images by SGD with momentum."""

    lr_img: float = Field(1.0, ge=0, description="Learning rate of the images.")
    stage_lr_img: str = Field(
        "",
        description="Learning rate of the images in each stage, as in 1000,500,500; empty: "
        "lr_img in all.",
    )
    momentum: float = Field(
        0.5, ge=0, lt=1, description="Momentum of the images, and of what is learned beside them."
    )

    @field_validator("stage_lr_img")
    @classmethod
    def _check_stage_lr_img(cls, text: str) -> str:
        if text:
            numbers("stage_lr_img", text)
        return text

    def check_run(self, run: Settings) -> None:
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


class NetworkSgd(Protocol):
    """SGD that trains start networks, side by side, on augmented batches."""

    def weights(self, labels: Tensor) -> Tensor:
        """Return ``labels`` as weights [n, classes]."""
        ...

    def step(
        self,
        train_state: TrainState,
        images: Tensor,
        weights: Tensor,
        rows: Sequence[Tensor],
        lr: float,
        generators: Sequence[torch.Generator],
    ) -> None:
        """Train every network on its own ``rows`` of ``images`` and ``weights``."""
        ...


class StartNetworks(Protocol):
    """Networks that a stage's images are matched on, trained on every earlier union in turn."""

    @property
    def sgd(self) -> NetworkSgd:
        """The SGD that trains them."""
        ...

    def parameters(self, iteration: int) -> Tensor:
        """Return the parameters [P] of the network that ``iteration`` takes."""
        ...


@dataclass(frozen=True)
class StageProblem:
    """One stage of progressive distillation, everything on the run's device."""

    stage: int  # 1-based
    settings: Settings  # the run's; the method's own are BaseMethod.settings
    train: Split  # the run's real examples
    rows: Tensor | None  # of train, the examples that the stage is made from; None: all
    # of the earlier stages, frozen; empty where stages are not conditioned on one another
    union: UnionSet
    trajectories: list[Trajectory]  # none where the method does without
    images: Tensor  # [n, C, H, W] that the stage's start from, of real ones, as they are stored
    labels: Tensor  # [n], or probabilities [n, classes], which are learned where labels=learned
    engine: Engine  # of the run's network
    dsa: DSA  # the run's augmentation
    normalization: Normalization  # of the images
    num_classes: int
    device: torch.device
    side_by_side: int  # networks that are trained at once
    # Makes the stage's start networks, from their number (0: a new one for every iteration) and
    # the probability of CutMix.
    start_networks: Callable[[int, float], StartNetworks]

    @cached_property
    def real(self) -> Split:
        """The real examples that the stage is made from; a copy where they are not all."""
        if self.rows is None:
            return self.train
        rows = self.rows.to(self.device)
        return Split(self.train.images[rows], self.train.labels[rows])

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width of an image, pixels."""
        H, W = self.images.shape[2:]
        return H, W

    def generator(self, *purpose: str | int) -> torch.Generator:
        """Return a generator whose values depend on the run's seed and on ``purpose`` alone."""
        return seeds.generator(self.settings.seed, *purpose)

    def initial_parameters(self, *purpose: str | int) -> Tensor:
        """Return freshly drawn parameters [P] of the network."""
        seed = seeds.derive(self.settings.seed, *purpose, "parameters")
        return initial_parameters(self.engine.net, seed)


class BaseMethod(ABC):
    """A way to learn a stage's images, one iteration at a time.

    Everything random in an iteration derives from the run's seed, the stage and the iteration's
    number (``problem.bench.generator(...)``), so that :meth:`state` is all that a continued run
    needs.
    """

    Settings: ClassVar[type[MethodSettings]] = MethodSettings  # the method's own settings
    # Whether the run trains experts, and its stages have transitions.
    needs_trajectories: ClassVar[bool] = False

    settings: MethodSettings  # those of this run, an instance of Settings

    def __init__(self, problem: StageProblem) -> None:
        self.problem = problem
        self.settings = problem.settings.method

    @property
    @abstractmethod
    def iteration(self) -> int:
        """Iterations done."""

    @property
    @abstractmethod
    def images(self) -> Tensor:
        """The stage's images as they are now [n, C, H, W], as they are stored."""

    @property
    def labels(self) -> Tensor:
        """Their labels as they are now, [n] or [n, classes]."""
        return self.problem.labels

    @property
    def learning_rate(self) -> float:
        """The rate with which networks are to be trained on the images."""
        return self.problem.settings.inner_lr

    @abstractmethod
    def step(self) -> dict[str, float]:
        """One iteration. Its numbers, "loss" among them. Until it returns, :meth:`state` is that of
        before.

        Raises:
            RunError: the loss or the images left the range in which going on makes sense.
        """

    @abstractmethod
    def state(self) -> dict[str, Tensor]:
        """What :meth:`load_state` needs to go on with the same bits, on the CPU."""

    @abstractmethod
    def load_state(self, state: dict[str, Tensor]) -> None:
        """Goes on from what :meth:`state` gave, in this process or an earlier one."""
