"""Base methods: what a stage of progressive distillation optimises."""

from __future__ import annotations

from pdd_fast.matching.base import BaseMethod, StageProblem
from pdd_fast.matching.trajectory import TrajectoryMatching

__all__ = ["METHODS", "BaseMethod", "StageProblem", "TrajectoryMatching"]

METHODS: dict[str, type[BaseMethod]] = {"mtt": TrajectoryMatching}
