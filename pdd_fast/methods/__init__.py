"""Methods: what a stage of progressive distillation optimizes."""

from __future__ import annotations

from pdd_fast.methods.base import BaseMethod, ImageSgdSettings, StageProblem
from pdd_fast.methods.dm import DistributionMatching
from pdd_fast.methods.idc import GradientMatching
from pdd_fast.methods.mtt.method import TrajectoryMatching
from pdd_fast.runtime.method_settings import MethodSettings
from pdd_fast.runtime.registry import METHODS

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
    """Register ``method`` under ``name`` in this process, for the setting ``method=name``.

    An installed package registers its methods by entry points of the group pdd_fast.methods
    instead.

    Args:
        name: The value of the setting ``method``.
        method: The method's class.

    Raises:
        ValueError: The name belongs to another method.
    """
    METHODS.register(name, method)
