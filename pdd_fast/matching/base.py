"""What a base method is given by a stage, and what it gives back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from pdd_fast.augmentation import DSA
from pdd_fast.config import Config
from pdd_fast.engines import Engine
from pdd_fast.trajectories import Trajectory


@dataclass(frozen=True)
class StageProblem:
    """One stage of progressive distillation, everything on the run's device."""

    config: Config
    stage: int  # 1-based
    engine: Engine
    dsa: DSA
    trajectories: list[Trajectory]
    frozen_images: Tensor  # [m, C, H, W] of the earlier stages
    frozen_labels: Tensor  # [m], or [m, classes]
    initial_images: Tensor  # [n, C, H, W] real images that this stage's start from
    labels: Tensor  # [n], or probabilities [n, classes], which are learned or not as the configuration says


class BaseMethod(Protocol):
    """A way to learn a stage's images, one iteration at a time.

    Everything random in an iteration derives from the run's seed, the stage and the iteration's number, so that
    :meth:`state` is all that a continued run needs.
    """

    def __init__(self, problem: StageProblem) -> None: ...

    @property
    def iteration(self) -> int:
        """Iterations done."""
        ...

    @property
    def images(self) -> Tensor:
        """The stage's images as they are now [n, C, H, W]."""
        ...

    @property
    def labels(self) -> Tensor:
        """Their labels as they are now, [n] or [n, classes]."""
        ...

    @property
    def learning_rate(self) -> float:
        """The rate with which networks are to be trained on the images."""
        ...

    def step(self) -> dict[str, float]:
        """One iteration. Its numbers, "loss" among them. Until it returns, :meth:`state` is that of before.

        Raises:
            RunError: the loss or the learned rate left the range in which going on makes sense.
        """
        ...

    def state(self) -> dict[str, Tensor]:
        """What :meth:`load_state` needs to go on with the same bits."""
        ...

    def load_state(self, state: dict[str, Tensor]) -> None: ...
