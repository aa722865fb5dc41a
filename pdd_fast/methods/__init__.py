"""Methods: what a stage of progressive distillation optimizes."""

from __future__ import annotations

from pdd_fast import settings as config
from pdd_fast.methods.base import BaseMethod, StageProblem
from pdd_fast.methods.dm import DistributionMatching
from pdd_fast.methods.idc import GradientMatching
from pdd_fast.methods.mtt.method import TrajectoryMatching

__all__ = [
    "METHODS",
    "BaseMethod",
    "DistributionMatching",
    "GradientMatching",
    "StageProblem",
    "TrajectoryMatching",
    "register",
]

METHODS: dict[str, type[BaseMethod]] = {
    "mtt": TrajectoryMatching,
    "idc": GradientMatching,
    "dm": DistributionMatching,
}


def register(name: str, method: type[BaseMethod]) -> None:
    """Makes ``method=name`` mean ``method``, in this process.

    Raises:
        ValueError: the name is another method's.
    """
    if METHODS.setdefault(name, method) is not method:
        raise ValueError(
            f"register: name must be new, got {name!r}, which is {METHODS[name].__name__}"
        )
    config.CHOICES["method"] = tuple(METHODS)
