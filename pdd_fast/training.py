"""Plain training: the SGD step that experts, transitions, selection and evaluation share, on flat parameter vectors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pdd_fast.augmentation import DSA, augment
from pdd_fast.engines import Engine


@dataclass
class Student:
    """A network in training: its parameters and their momentum, changed in place."""

    theta: Tensor  # [P]
    velocity: Tensor  # [P]

    @classmethod
    def start(cls, theta: Tensor) -> Student:
        """A student at ``theta``, at rest."""
        return cls(theta.clone(), torch.zeros_like(theta))


@dataclass(frozen=True)
class Sgd:
    """SGD as ``torch.optim.SGD`` defines it, with DSA on every batch and, on request, the rate cut at half time."""

    engine: Engine
    dsa: DSA
    batch: int  # images of a step, at most
    momentum: float = 0.0
    weight_decay: float = 0.0

    def step(self, student: Student, images: Tensor, labels: Tensor, rate: float, generator: torch.Generator) -> None:
        """One step on ``images`` [b, C, H, W], augmented anew, with ``labels`` [b]."""
        draw = self.dsa.sample(len(images), (images.shape[2], images.shape[3]), generator)
        _, gradient, _ = self.engine.gradient(student.theta, augment(images, draw), labels)
        if self.weight_decay:
            gradient.add_(student.theta, alpha=self.weight_decay)
        if self.momentum:
            gradient = student.velocity.mul_(self.momentum).add_(gradient)
        student.theta.add_(gradient, alpha=-rate)

    def epoch(self, student: Student, images: Tensor, labels: Tensor, rate: float, generator: torch.Generator) -> None:
        """Every image once, in random order."""
        for index in self._batches(len(images), generator):
            index = index.to(images.device)
            self.step(student, images.index_select(0, index), labels.index_select(0, index), rate, generator)

    def run(
        self,
        student: Student,
        images: Tensor,
        labels: Tensor,
        rate: float,
        steps: int,
        generator: torch.Generator,
        stops: Sequence[int] = (),
    ) -> list[Tensor]:
        """``steps`` steps, epoch after epoch, at ``rate`` and from half time on at a tenth of it.

        Returns:
            the parameters [P] after each number of steps in ``stops`` (increasing, in [0, ``steps``]).
        """
        seen = [student.theta.clone()] if 0 in stops else []
        done = 0
        while done < steps:
            for index in self._batches(len(images), generator):
                if done == steps:
                    break
                index = index.to(images.device)
                now = rate if done < (steps + 1) // 2 else rate / 10
                self.step(student, images.index_select(0, index), labels.index_select(0, index), now, generator)
                done += 1
                if done in stops:
                    seen.append(student.theta.clone())
        return seen

    def steps_per_epoch(self, images: int) -> int:
        return -(-images // self.batch)

    def _batches(self, count: int, generator: torch.Generator) -> tuple[Tensor, ...]:
        return torch.randperm(count, generator=generator).split(self.batch)


def accuracy(engine: Engine, theta: Tensor, images: Tensor, labels: Tensor, batch: int = 1000) -> float:
    """Percent of ``images`` [n, C, H, W] that the network at ``theta`` puts in the class of ``labels`` [n]."""
    right = torch.zeros((), dtype=torch.int64, device=theta.device)
    for x, y in zip(images.split(batch), labels.split(batch), strict=True):
        right += (engine.logits(theta, x).argmax(1) == y).sum()
    return 100.0 * int(right) / len(images)
