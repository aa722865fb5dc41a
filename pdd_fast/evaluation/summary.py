"""Means, standard deviations and confidence intervals of accuracies."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

from pdd_fast.storage.evaluation import Pair, Result


def half_width(values: Sequence[float]) -> float | None:
    """Return half the width of the mean's 95% confidence interval (Student's t).

    One value has no interval: None.
    """
    if len(values) < 2:
        return None
    from scipy.stats import t as student  # takes a second to import

    quantile = float(student.ppf(0.975, len(values) - 1))
    return quantile * statistics.stdev(values) / math.sqrt(len(values))


def summarize(
    name: str, labels: str, network: str, seeds: list[int], scores: list[list[float]]
) -> Result:
    """Return the result with means and intervals of ``scores`` (%), one row per repeat."""
    stages = list(zip(*scores, strict=True))
    return Result(
        name=name,
        labels=labels,
        network=network,
        seeds=seeds,
        accuracy=scores,
        mean=[statistics.fmean(column) for column in stages],
        std=[statistics.stdev(column) if len(column) > 1 else 0.0 for column in stages],
        ci95=[half_width(column) for column in stages],
    )


def compare(one: Result, other: Result) -> Pair:
    """Return the paired difference of the final accuracies of two results."""
    differences = [a[-1] - b[-1] for a, b in zip(one.accuracy, other.accuracy, strict=True)]
    return Pair(
        network=one.network,
        of=one.name,
        to=other.name,
        difference=statistics.fmean(differences),
        ci95=half_width(differences),
    )
