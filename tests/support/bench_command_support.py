"""Helpers of the tests of bench command."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from command import Outcome, call

from pdd_fast.benchmarks import cases, roofline_counts
from pdd_fast.benchmarks.cases import parse
from pdd_fast.benchmarks.implementations import ROOFLINE, TRUTH

MACHINE = {
    "cpu": "a processor",
    "cores": 2,
    "torch": "2",
    "python": "3",
    "pdd_fast": "0",
    "commit": "abc",
}


Answer = Callable[[str, str], dict[str, Any]]  # to a case's name and an implementation's


def seconds(name: str) -> float:
    """Made up: ours 1, what keeps more 0.5, the others 2 and on."""
    if name.startswith("ours"):
        return 0.5 if "cache" in name else 1.0
    return 2.0 + len(name) / 100


def made_up(case_name: str, name: str) -> dict[str, Any]:
    case = parse(case_name)
    if name == ROOFLINE:
        rates = [dict.fromkeys(roofline_counts.KINDS, 1e9)] * case.depth
        return {"copy": 1e10, **({} if case.kind == "dsa" else {"convolution": {"float32": rates}})}
    if name == TRUTH:
        return {"by": "nobody"}
    factor = max(1, case.steps) * seconds(name)
    found = {
        "seconds": {part: [factor, factor * 1.5] for part in cases.KINDS[case.kind].parts},
        "peak_bytes": 600_000_000,
        "above_start_bytes": 10_000_000 * max(1, case.steps),
    }
    errors: dict[str, float | None] = {"images": 1e-6, "cosine": 0.75, "rate": 2e-7}
    if name == "frozen weights":
        errors = dict.fromkeys(errors)  # not finite
    kept = {key: errors[key] for key in cases.KINDS[case.kind].errors}
    return found | ({"error": kept} if kept else {})


def bench(folder: Path, *arguments: str) -> Outcome:
    return call("bench", "--device", "cpu", "--output", folder, *arguments)


def record_in(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "bench.json").read_text(encoding="utf-8"))
