"""Base methods: what one is given by a stage of progressive distillation, and what it gives back.

docs/method.md, "Another method", adds one step by step.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

from torch import Tensor

from pdd_fast.data import Split
from pdd_fast.progressive.context import RunContext
from pdd_fast.progressive.union import UnionSet
from pdd_fast.settings import Config
from pdd_fast.storage.trajectories import Trajectory


@dataclass(frozen=True)
class StageProblem:
    """One stage of progressive distillation, everything on the run's device."""

    ctx: RunContext  # configuration, data, network, augmentation, and where draws come from
    stage: int  # 1-based
    rows: Tensor | None  # of bench.train, the real examples that the stage is made from; None: all
    # of the earlier stages, frozen; empty where stages are not conditioned on one another
    union: UnionSet
    trajectories: list[Trajectory]  # none where the method does without
    images: Tensor  # [n, C, H, W] that the stage's start from, of real ones, as they are stored
    # [n], or probabilities [n, classes], which are learned or not as the configuration says
    labels: Tensor

    @property
    def config(self) -> Config:
        return self.ctx.config

    @cached_property
    def real(self) -> Split:
        """The real examples that the stage is made from; a copy where they are not all."""
        train = self.ctx.train
        if self.rows is None:
            return train
        rows = self.rows.to(self.ctx.device)
        return Split(train.images[rows], train.labels[rows])


class BaseMethod(ABC):
    """A way to learn a stage's images, one iteration at a time.

    Everything random in an iteration derives from the run's seed, the stage and the iteration's
    number (``problem.bench.generator(...)``), so that :meth:`state` is all that a continued run
    needs.
    """

    needs_trajectories: ClassVar[bool] = (
        False  # the run then trains experts, and its stages have transitions
    )

    def __init__(self, problem: StageProblem) -> None:
        self.problem = problem

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
        return self.problem.config.inner_lr

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
