"""Soft labels: what trained networks say of real images."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from pdd_fast.engines import Engine
from pdd_fast.storage.trajectories import Trajectory
from pdd_fast.training.sgd import logits_in_parts


def soft_labels(engine: Engine, experts: Sequence[Trajectory], images: Tensor) -> Tensor:
    """What the ``experts``, each after its last epoch, make of ``images`` [n, C, H, W]: the mean of
    their probabilities [n, classes], of the type and on the device of the images.

    The mean of several is nearer to right than one network's word, and costs next to nothing beside
    training them.

    Raises:
        ValueError: there are no experts.
    """
    total: Tensor | None = None
    for expert in experts:
        theta = expert.checkpoint(expert.epochs).to(images)
        found = logits_in_parts(engine, theta, images).softmax(1)
        total = found if total is None else total.add_(found)
    if total is None:
        raise ValueError("soft_labels: experts must be at least one, got none")
    return total.div_(len(experts))
