"""Methods: what a stage of progressive distillation optimizes."""

from __future__ import annotations

from pdd_fast.methods.base import BaseMethod, ImageSgdSettings, StageProblem
from pdd_fast.methods.dm import DistributionMatching
from pdd_fast.methods.idc import GradientMatching
from pdd_fast.methods.mtt.method import TrajectoryMatching
from pdd_fast.runtime.registry import METHODS
from pdd_fast.settings import MethodSettings

__all__ = [
    "METHODS",
    "BaseMethod",
    "DistributionMatching",
    "GradientMatching",
    "ImageSgdSettings",
    "MethodSettings",
    "StageProblem",
    "TrajectoryMatching",
    "register",
]


def register(name: str, method: type[BaseMethod]) -> None:
    """Make ``method=name`` mean ``method``, in this process. An installed package names its methods
    by entry points in the group pdd_fast.methods instead.

    Raises:
        ValueError: the name is another method's.
    """
    METHODS.register(name, method)
