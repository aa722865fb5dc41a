"""Progress of a stage of trajectory matching: its state, average and rollback points."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from pdd_fast.methods.mtt.step import MatchingState

# Iterations between two rollback points. Two are stored, and a rollback takes the older: when
# images stop being finite, those of the last few iterations have usually begun to diverge.
ANCHOR = 20


class Point(NamedTuple):
    """Learned tensors without their momentum buffers."""

    images: Tensor  # [n, C, H, W]
    lr: Tensor  # []
    logits: Tensor  # [n, classes], or [0, 0]

    @classmethod
    def of(cls, state: MatchingState) -> Point:
        """Return the learned tensors of ``state``."""
        return cls(state.images, state.lr, state.logits)


class Progress(NamedTuple):
    """Immutable state of :class:`pdd_fast.methods.mtt.method.TrajectoryMatching`."""

    iteration: int
    state: MatchingState
    average: Point  # EMA over iterations; lr is not averaged and is that of state
    halvings: int  # number of times that the step size was halved
    older: Point  # rollback point, ANCHOR to 2 * ANCHOR iterations old
    newer: Point  # the next rollback point

    @classmethod
    def start(cls, state: MatchingState) -> Progress:
        """Return the progress before the first iteration."""
        point = Point.of(state)
        return cls(0, state, point, 0, point, point)

    def rolled_back(self) -> Progress:
        """Return the progress at the older point, at rest and with half the step size."""
        return self._replace(
            state=MatchingState.at_rest(*self.older),
            average=self.older,
            halvings=self.halvings + 1,
            newer=self.older,
        )

    def followed_by(self, state: MatchingState, decay: float) -> Progress:
        """Return the progress after an iteration that returned ``state``, with this EMA decay."""
        iteration, point = self.iteration + 1, Point.of(state)
        average = point
        if decay:
            images, _, logits = (
                old.lerp(new, 1 - decay) for old, new in zip(self.average, point, strict=True)
            )
            average = Point(images, state.lr, logits)
        older, newer = self.older, self.newer
        if iteration % ANCHOR == 0:
            older, newer = newer, point
        return Progress(iteration, state, average, self.halvings, older, newer)

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
    def of_tensors(cls, tensors: dict[str, Tensor]) -> Progress:
        """Return the progress that :meth:`tensors` described."""
        state = MatchingState(*(tensors[name] for name in MatchingState._fields))

        def point(name: str) -> Point:
            return Point(*(tensors[f"{name}_{field}"] for field in Point._fields))

        average = point("average") if "average_images" in tensors else Point.of(state)
        return cls(
            int(tensors["iteration"]),
            state,
            average,
            int(tensors["halvings"]),
            point("older"),
            point("newer"),
        )
