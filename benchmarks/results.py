"""Turn measurements into results: medians, spreads, ratios and the best alternative.

Imports no torch.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from pdd_fast.benchmarks.cases import KINDS, Case
from pdd_fast.benchmarks.implementations import ROOFLINE, Implementation
from pdd_fast.benchmarks.processes import Outcome
from pdd_fast.benchmarks.roofline_counts import best, rooflines

NOT_RUN = {"failed": "not run", "why": "the benchmark ended before"}


def main_part(case: Case) -> str:
    """Return the part that represents the case when only one number is shown."""
    return KINDS[case.kind].parts[-1]


def rounds_of(outcome: Outcome, part: str) -> list[float]:
    """Return one number per round: the median of that process's measurements."""
    return [statistics.median(sample["seconds"][part]) for sample in outcome.samples]


def ratio(outcome: Outcome, base: Outcome, part: str) -> float | None:
    """Return the median over rounds of one implementation's seconds divided by the other's.

    Comparing round by round cancels the machine's drift.
    """
    pairs = list(zip(rounds_of(outcome, part), rounds_of(base, part), strict=False))
    return statistics.median(a / b for a, b in pairs) if pairs else None


def reference(
    implementations: Sequence[Implementation], outcomes: Mapping[str, Outcome], precision: str
) -> Implementation | None:
    """Return the package's implementation that others of a precision are compared with.

    It is the first one that was measured.
    """
    return next(
        (
            c
            for c in implementations
            if c.ours and c.precision == precision and outcomes[c.name].samples
        ),
        None,
    )


def summary(
    case: Case, implementations: Sequence[Implementation], outcomes: Mapping[str, Outcome]
) -> dict[str, Any]:
    """Return a case's record: results per implementation, rooflines, and the best alternatives."""
    rates = outcomes.get(ROOFLINE, Outcome())
    measured = best(rates.samples) if rates.samples else None
    precisions = list(dict.fromkeys(c.precision for c in implementations))
    bounds = {p: rooflines(case, measured, p) for p in precisions} if measured else {}
    results = {}
    for implementation in implementations:
        other = reference(implementations, outcomes, implementation.precision)
        base = outcomes[other.name] if other else None
        bound = bounds.get(implementation.precision, {})
        results[implementation.name] = _result(case, outcomes[implementation.name], base, bound)
    found: dict[str, Any] = {"results": results, "roofline": {"seconds": bounds, "rates": measured}}
    if rates.failed:
        found["roofline"]["failed"] = rates.failed
    if rates.samples:
        found["roofline"]["samples"] = rates.samples
    found["alternatives"] = [
        a for p in precisions if (a := alternative(case, implementations, outcomes, p))
    ]
    return found


def _result(
    case: Case, outcome: Outcome, base: Outcome | None, bound: Mapping[str, Mapping[str, float]]
) -> dict[str, Any]:
    # Measurements made before a failure stay in the record, but they are no result, because the
    # rounds are incomplete.
    if outcome.failed:
        return {**outcome.failed, **({"samples": outcome.samples} if outcome.samples else {})}
    if not outcome.samples:
        return NOT_RUN
    parts = {}
    for part in KINDS[case.kind].parts:
        each = [value for sample in outcome.samples for value in sample["seconds"][part]]
        median = statistics.median(rounds_of(outcome, part))
        parts[part] = {
            "median": median,
            "smallest": min(each),
            "largest": max(each),
            "times_ours": ratio(outcome, base, part) if base else None,
            "over_floor": {
                label: median / seconds for label, seconds in bound.get(part, {}).items()
            },
        }
    found: dict[str, Any] = {"seconds": parts}
    for key in ("peak_bytes", "above_start_bytes"):
        found[key] = max(sample[key] for sample in outcome.samples)
    if all("error" in sample for sample in outcome.samples):
        found["error"] = {
            key: _median([sample["error"][key] for sample in outcome.samples])
            for key in outcome.samples[0]["error"]
        }
    return {**found, "samples": outcome.samples}


def _median(values: Sequence[float | None]) -> float | None:
    return None if None in values else statistics.median(v for v in values if v is not None)


def alternative(
    case: Case,
    implementations: Sequence[Implementation],
    outcomes: Mapping[str, Outcome],
    precision: str,
) -> dict[str, Any] | None:
    """Return the fastest exact baseline of a precision, and the package's default and fastest."""
    part = main_part(case)
    there = {
        c.name: c
        for c in implementations
        if c.precision == precision and outcomes[c.name].samples and not outcomes[c.name].failed
    }

    def fastest(names: Sequence[str]) -> str | None:
        return min(
            names, key=lambda name: statistics.median(rounds_of(outcomes[name], part)), default=None
        )

    baseline = fastest([name for name, c in there.items() if c.exact and not c.ours])
    own = [name for name, c in there.items() if c.ours]
    quickest = fastest(own)
    if baseline is None or quickest is None:
        return None

    def beside(name: str) -> dict[str, Any]:
        memory = [
            max(s["above_start_bytes"] for s in outcomes[n].samples) for n in (name, baseline)
        ]
        return {
            "name": name,
            "seconds": statistics.median(rounds_of(outcomes[name], part)),
            "times_as_fast": ratio(outcomes[baseline], outcomes[name], part),
            "share_of_memory": memory[0] / memory[1] if memory[1] else None,
        }

    missing = [
        c.name
        for c in implementations
        if c.exact and not c.ours and c.precision == precision and c.name not in there
    ]
    return {
        "precision": precision,
        "part": part,
        "baseline": baseline,
        "seconds": statistics.median(rounds_of(outcomes[baseline], part)),
        "without": missing,
        "ours": beside(own[0]),
        "fastest of ours": beside(quickest),
    }
