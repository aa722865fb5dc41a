"""Helpers of the tests of stages."""

from __future__ import annotations

from typing import Any

import tiny

from pdd_fast.settings import Settings, resolve
from pdd_fast.storage.run import Run


def configuration(**changes: Any) -> Settings:
    return resolve(**(tiny.SETTINGS | changes))


def measured(run: Run) -> list[dict[str, Any]]:
    """metrics.jsonl without what a clock or the allocator says."""
    return [
        {k: v for k, v in row.items() if k not in ("seconds", "memory")}
        for row in run.metrics.read()
    ]
