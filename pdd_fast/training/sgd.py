"""Plain training: the SGD of experts, transitions, selection and evaluation.

It works on flat parameter vectors and trains K networks in step. Each network sees the batches
and augmentation parameters that it would see alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice

import torch
from torch import Tensor

from pdd_fast.augmentation.cutmix import CutMix, CutMixParameters
from pdd_fast.augmentation.dsa import DSA
from pdd_fast.engines import Engine
from pdd_fast.training.cuda_graphs import Replay, can_capture
from pdd_fast.training.step_queue import Drawn, StepQueue, steps_per_queue


@dataclass
class TrainState:
    """Parameters and momentum buffers of K networks in training, changed in place."""

    theta: Tensor  # [K, P]
    momentum_buffer: Tensor  # [K, P]

    @classmethod
    def start(cls, theta: Tensor) -> TrainState:
        """Return the state at ``theta`` [K, P], with momentum buffers of zeros."""
        return cls(theta.clone(), torch.zeros_like(theta))

    def copy(self) -> TrainState:
        """Return a copy with tensors of its own."""
        return TrainState(self.theta.clone(), self.momentum_buffer.clone())

    def __len__(self) -> int:
        return len(self.theta)


@dataclass(frozen=True)
class Sgd:
    """SGD as defined by ``torch.optim.SGD``, with DSA on every batch, and then CutMix."""

    engine: Engine
    dsa: DSA
    batch: int  # maximum number of images of a step
    momentum: float = 0.0
    weight_decay: float = 0.0
    graph: bool = True  # whether steps may be captured as CUDA graphs; same bits
    cutmix: CutMix | None = None  # needs labels that are weights [n, classes]

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
        """Run ``steps`` steps, epoch after epoch, at ``lr`` and at a tenth of it from half time on.

        Args:
            train_state: K networks, changed in place.
            images: [n, C, H, W].
            labels: [n] or [n, classes].
            lr: initial learning rate.
            steps: number of steps.
            generators: one for each network.
            stops: increasing step counts in [0, ``steps``] after which parameters are returned.
            rows: int64 [K, m] on the CPU, the images that each network trains on. None: all images
                for every network.

        Returns:
            The parameters [K, P] after each number of steps in ``stops``.
        """
        seen = [train_state.theta.clone()] if 0 in stops else []
        loop = Loop(self, train_state, images, labels, steps, rows)
        for done in loop.advance(self.lrs(lr, steps), generators):
            if done in stops:
                seen.append(train_state.theta.clone())
        return seen

    @staticmethod
    def lrs(lr: float, steps: int) -> list[float]:
        """Return the learning rate of every step: ``lr``, and a tenth of it from half time on."""
        return [lr if step < (steps + 1) // 2 else lr / 10 for step in range(steps)]

    def steps_per_epoch(self, images: int) -> int:
        """Return the number of steps in an epoch of ``images`` images."""
        return -(-images // self.batch)


class Loop:
    """Training loop of K networks on one set of images.

    All random values of a group of steps are drawn before its first step, and the inputs of a step
    are in memory that stays in place. On CUDA, a step is therefore one launch of a graph (two
    graphs if the last batch of an epoch is smaller). The host waits for no step and draws the next
    ones meanwhile.

    Args:
        sgd: settings of the steps.
        train_state: K networks, changed in place.
        images: as for :meth:`Sgd.run`.
        labels: as for :meth:`Sgd.run`.
        steps: number of steps per call of :meth:`advance`; 0: an epoch.
        rows: as for :meth:`Sgd.run`.
        epoch_images: number of images of an epoch, a new random subset each time. None: all.
    """

    def __init__(
        self,
        sgd: Sgd,
        train_state: TrainState,
        images: Tensor,
        labels: Tensor,
        steps: int = 0,
        rows: Tensor | None = None,
        epoch_images: int | None = None,
    ) -> None:
        self._sgd, self._train_state = sgd, train_state
        self._images, self._labels, self._rows = images, labels, rows
        self._count = len(images) if rows is None else rows.shape[1]
        self._epoch_images = min(epoch_images or self._count, self._count)
        self._full = min(sgd.batch, self._epoch_images)
        self._steps_per_epoch = sgd.steps_per_epoch(self._epoch_images)
        self._capacity = steps_per_queue(
            steps or self._steps_per_epoch, len(train_state) * self._full
        )
        self._lanes: dict[int, tuple[StepQueue, Replay]] = {}  # by the number of images of a step

    def epoch(self, lr: float, generators: Sequence[torch.Generator]) -> None:
        """Train on every image once, in an order of its own for every network."""
        self.train([lr] * self._steps_per_epoch, generators)

    def train(self, lrs: Sequence[float], generators: Sequence[torch.Generator]) -> None:
        """Take a step at each of ``lrs``; see :meth:`advance`."""
        for _ in self.advance(lrs, generators):
            pass

    def advance(self, lrs: Sequence[float], generators: Sequence[torch.Generator]) -> Iterator[int]:
        """Take a step at each of ``lrs`` and yield the number of steps done after each.

        Every network starts a new epoch.
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
        """Yield the random values of every step, as each network would draw them alone.

        Every generator draws the order of an epoch, and then batch by batch its augmentation
        parameters and those of CutMix.
        """
        sgd, size = self._sgd, (self._images.shape[2], self._images.shape[3])
        while True:
            orders = [
                torch.randperm(self._count, generator=generator, device="cpu")[
                    : self._epoch_images
                ].split(sgd.batch)
                for generator in generators
            ]
            for batches in zip(*orders, strict=True):
                batch = len(batches[0])
                augmentations = [sgd.dsa.sample(batch, size, generator) for generator in generators]
                cutmix = None
                if sgd.cutmix is not None:
                    cutmix = CutMixParameters.cat(
                        [sgd.cutmix.sample(batch, size, generator) for generator in generators]
                    )
                if self._rows is not None:
                    batches = tuple(row[own] for row, own in zip(self._rows, batches, strict=True))
                yield Drawn(torch.stack(batches), augmentations, cutmix)

    def _lane(self, size: int) -> tuple[StepQueue, Replay]:
        """Return the queue of steps on ``size`` images per network, and the step function."""
        if size not in self._lanes:
            sgd, theta = self._sgd, self._train_state.theta
            # An epoch has at most one smaller batch.
            capacity = (
                self._capacity
                if size == self._full
                else -(-self._capacity // self._steps_per_epoch)
            )
            counted = theta.device.type == "cuda"
            queue = StepQueue(
                capacity, len(theta), size, sgd.dsa, sgd.cutmix, theta.dtype, theta.device, counted
            )
            # Not a method of this object, which holds the Replay: the memory of a graph must be
            # freed with its loop.
            step = partial(
                _step,
                sgd,
                theta,
                self._train_state.momentum_buffer,
                self._images,
                self._labels,
                queue,
            )
            enabled = sgd.graph and can_capture(sgd.engine, theta.device)
            self._lanes[size] = queue, Replay(step, theta.device, enabled=enabled)
        return self._lanes[size]


def sgd_update(
    theta: Tensor, momentum_buffer: Tensor, gradient: Tensor, momentum: float, weight_decay: float
) -> Tensor:
    """Return the update of ``torch.optim.SGD`` before it is scaled by the learning rate.

    ``momentum_buffer`` and ``gradient`` are changed in place.
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
    networks = len(theta)
    x, y = queue.mix(
        queue.augment(images.index_select(0, index)).unflatten(0, (networks, -1)),
        labels.index_select(0, index).unflatten(0, (networks, -1)),
    )
    _, gradient = sgd.engine.gradients(theta, x, y)
    theta.addcmul_(
        sgd_update(theta, momentum_buffer, gradient, sgd.momentum, sgd.weight_decay),
        queue.lr(),
        value=-1,
    )
    queue.advance()


_BATCH = 1000  # images whose logits are computed at once


def accuracies(
    engine: Engine, theta: Tensor, images: Tensor, labels: Tensor, batch: int = _BATCH
) -> list[float]:
    """Return the top-1 accuracy (%) of each network.

    Args:
        engine: engine of the networks.
        theta: [K, P].
        images: [n, C, H, W].
        labels: class indices [n].
        batch: images per pass.
    """
    right = torch.zeros(len(theta), dtype=torch.int64, device=theta.device)
    for x, y in zip(images.split(batch), labels.split(batch), strict=True):
        right += (engine.logits_of(theta, x).argmax(2) == y).sum(1)
    return [100.0 * count / len(images) for count in right.tolist()]


def logits_in_parts(engine: Engine, theta: Tensor, images: Tensor) -> Tensor:
    """Return logits [n, classes] on any number of images.

    Args:
        engine: engine of the network.
        theta: [P].
        images: [n, C, H, W].
    """
    return torch.cat([engine.logits(theta, part) for part in images.split(_BATCH)])
