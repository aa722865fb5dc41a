"""Plain training: the SGD that experts, transitions, selection and evaluation share, on flat
parameter vectors.

Networks are trained side by side, K at a time, each on batches and draws of its own, those that it
would have had alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice

import torch
from torch import Tensor

from pdd_fast.augmentation.dsa import DSA
from pdd_fast.engines import Engine
from pdd_fast.training.cuda_graphs import Replay
from pdd_fast.training.step_queue import Drawn, StepQueue, steps_per_queue


@dataclass
class TrainState:
    """K networks in training: their parameters and their momentum, changed in place."""

    theta: Tensor  # [K, P]
    momentum_buffer: Tensor  # [K, P]

    @classmethod
    def start(cls, theta: Tensor) -> TrainState:
        """Students at ``theta`` [K, P], at rest."""
        return cls(theta.clone(), torch.zeros_like(theta))

    def copy(self) -> TrainState:
        return TrainState(self.theta.clone(), self.momentum_buffer.clone())

    def __len__(self) -> int:
        return len(self.theta)


@dataclass(frozen=True)
class Sgd:
    """SGD as ``torch.optim.SGD`` defines it, with DSA on every batch and, on request, the rate cut
    at half time.
    """

    engine: Engine
    dsa: DSA
    batch: int  # images of a step, at most
    momentum: float = 0.0
    weight_decay: float = 0.0
    graph: bool = True  # whether steps may be captured as CUDA graphs; the bits are the same

    def run(
        self,
        train_state: TrainState,
        images: Tensor,
        labels: Tensor,
        lr: float,
        steps: int,
        generators: Sequence[torch.Generator],
        stops: Sequence[int] = (),
        rows: Tensor | None = None,
    ) -> list[Tensor]:
        """``steps`` steps, epoch after epoch, at ``lr`` and from half time on at a tenth of it.

        Args:
            images, labels: [n, C, H, W], and [n] or [n, classes].
            generators: one for each student.
            rows: int64 [K, m] on the CPU, the images that each student is trained on; None: all,
                for every student.

        Returns:
            the parameters [K, P] after each number of steps in ``stops`` (increasing, in [0,
            ``steps``]).
        """
        seen = [train_state.theta.clone()] if 0 in stops else []
        loop = Loop(self, train_state, images, labels, steps, rows)
        for done in loop.advance(self.lrs(lr, steps), generators):
            if done in stops:
                seen.append(train_state.theta.clone())
        return seen

    @staticmethod
    def lrs(lr: float, steps: int) -> list[float]:
        """``lr``, and from half of the ``steps`` on a tenth of it."""
        return [lr if step < (steps + 1) // 2 else lr / 10 for step in range(steps)]

    def steps_per_epoch(self, images: int) -> int:
        return -(-images // self.batch)


class Loop:
    """K students on one set of images, step after step.

    Everything random in a number of steps is drawn before the first of them, and what a step reads
    lies in memory that stays in place. So on CUDA a step is one launch of a graph (two graphs where
    the last batch of an epoch is smaller), and the host, which waits for none of them, draws the
    next steps meanwhile.

    Args:
        images, labels, rows: as for :meth:`Sgd.run`.
        steps: how many are going to be taken at a time, an epoch where 0.
    """

    def __init__(
        self,
        sgd: Sgd,
        train_state: TrainState,
        images: Tensor,
        labels: Tensor,
        steps: int = 0,
        rows: Tensor | None = None,
    ) -> None:
        self._sgd, self._students, self._images, self._labels, self._rows = (
            sgd,
            train_state,
            images,
            labels,
            rows,
        )
        self._count = len(images) if rows is None else rows.shape[1]
        self._full = min(sgd.batch, self._count)
        self._steps_per_epoch = sgd.steps_per_epoch(self._count)
        self._capacity = steps_per_queue(
            steps or self._steps_per_epoch, len(train_state) * self._full
        )
        self._lanes: dict[int, tuple[StepQueue, Replay]] = {}  # by the number of images of a step

    def epoch(self, lr: float, generators: Sequence[torch.Generator]) -> None:
        """Every image once, in an order of its own for every student."""
        for _ in self.advance([lr] * self._steps_per_epoch, generators):
            pass

    def advance(self, lrs: Sequence[float], generators: Sequence[torch.Generator]) -> Iterator[int]:
        """A step at each of ``lrs``, every network from a new epoch on; the number of steps done,
        after each.
        """
        source, done = self._draw(generators), 0
        while done < len(lrs):
            drawn = list(islice(source, min(self._capacity, len(lrs) - done)))
            for size in {step.size for step in drawn}:
                chosen = [i for i, step in enumerate(drawn) if step.size == size]
                self._lane(size)[0].write(
                    [drawn[i] for i in chosen], [lrs[done + i] for i in chosen]
                )
            for step in drawn:
                self._lane(step.size)[1]()
                done += 1
                yield done

    def _draw(self, generators: Sequence[torch.Generator]) -> Iterator[Drawn]:
        """What every network draws, in the order in which it would alone: an epoch's order, then
        batch by batch.
        """
        size = (self._images.shape[2], self._images.shape[3])
        while True:
            orders = [
                torch.randperm(self._count, generator=generator, device="cpu").split(
                    self._sgd.batch
                )
                for generator in generators
            ]
            for batches in zip(*orders, strict=True):
                augmentations = [
                    self._sgd.dsa.sample(len(batch), size, generator)
                    for batch, generator in zip(batches, generators, strict=True)
                ]
                if self._rows is not None:
                    batches = tuple(
                        row[batch] for row, batch in zip(self._rows, batches, strict=True)
                    )
                yield Drawn(torch.stack(batches), augmentations)

    def _lane(self, size: int) -> tuple[StepQueue, Replay]:
        """The tape of steps on ``size`` images a network, and such a step."""
        if size not in self._lanes:
            sgd, theta = self._sgd, self._students.theta
            # An epoch has one smaller batch at most.
            capacity = (
                self._capacity
                if size == self._full
                else -(-self._capacity // self._steps_per_epoch)
            )
            counted = theta.device.type == "cuda"
            queue = StepQueue(
                capacity, len(theta) * size, sgd.dsa, theta.dtype, theta.device, counted
            )
            # Not a method of this object, which holds the Replay: the memory of a graph is to go
            # when its loop does.
            step = partial(
                _step, sgd, theta, self._students.momentum_buffer, self._images, self._labels, queue
            )
            self._lanes[size] = queue, Replay(step, theta.device, enabled=sgd.graph)
        return self._lanes[size]


def sgd_update(
    theta: Tensor, momentum_buffer: Tensor, gradient: Tensor, momentum: float, weight_decay: float
) -> Tensor:
    """What a step of ``torch.optim.SGD`` subtracts, times the rate. Changes ``momentum_buffer`` and
    ``gradient`` in place.
    """
    if weight_decay:
        gradient.add_(theta, alpha=weight_decay)
    return momentum_buffer.mul_(momentum).add_(gradient) if momentum else gradient


def _step(
    sgd: Sgd,
    theta: Tensor,
    momentum_buffer: Tensor,
    images: Tensor,
    labels: Tensor,
    queue: StepQueue,
) -> None:
    index = queue.indices()
    x = queue.augment(images.index_select(0, index)).unflatten(0, (len(theta), -1))
    _, gradient = sgd.engine.gradients(
        theta, x, labels.index_select(0, index).unflatten(0, (len(theta), -1))
    )
    theta.addcmul_(
        sgd_update(theta, momentum_buffer, gradient, sgd.momentum, sgd.weight_decay),
        queue.lr(),
        value=-1,
    )
    queue.advance()


_BATCH = 1000  # images whose logits are made at once


def accuracies(
    engine: Engine, theta: Tensor, images: Tensor, labels: Tensor, batch: int = _BATCH
) -> list[float]:
    """For each of the networks at ``theta`` [K, P] the percent of ``images`` [n, C, H, W] that it
    puts in the class of ``labels`` [n]; ``batch`` images at a time, of all networks together.
    """
    right = torch.zeros(len(theta), dtype=torch.int64, device=theta.device)
    each = max(1, batch // len(theta))
    for x, y in zip(images.split(each), labels.split(each), strict=True):
        right += (engine.logits_of(theta, x).argmax(2) == y).sum(1)
    return [100.0 * count / len(images) for count in right.tolist()]


def logits_in_parts(engine: Engine, theta: Tensor, images: Tensor) -> Tensor:
    """Logits [n, classes] of the network at ``theta`` [P] on any number of ``images`` [n, C, H,
    W]."""
    return torch.cat([engine.logits(theta, part) for part in images.split(_BATCH)])
