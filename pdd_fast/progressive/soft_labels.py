"""Compute soft labels: the experts' mean predictions on real images."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from pdd_fast.engines import Engine
from pdd_fast.storage.trajectories import Trajectory
from pdd_fast.training.sgd import logits_in_parts


def soft_labels(engine: Engine, experts: Sequence[Trajectory], images: Tensor) -> Tensor:
    """Return the mean predicted probabilities of ``experts`` on ``images``.

    Each expert predicts with its parameters after the last epoch. The mean of several experts is
    more accurate than one prediction, and costs little beside training them.

    Args:
        engine: Engine of the network.
        experts: Trajectories of the experts, at least one.
        images: [n, C, H, W].

    Returns:
        Probabilities [n, classes], with the type and device of ``images``.

    Raises:
        ValueError: There are no experts.
    """
    total: Tensor | None = None
    for expert in experts:
        theta = expert.checkpoint(expert.epochs).to(images)
        found = logits_in_parts(engine, theta, images).softmax(1)
        total = found if total is None else total.add_(found)
    if total is None:
        raise ValueError("soft_labels: experts must be at least one, got none")
    return total.div_(len(experts))
