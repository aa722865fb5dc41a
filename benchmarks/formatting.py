"""Numbers for people, and tables. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence


def size(count: float) -> str:
    """Bytes in powers of 1000."""
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.3g} MB"


def duration(value: float) -> str:
    """Seconds in the unit that leaves one to three digits before the point."""
    unit, factor = ("s", 1.0) if value >= 1 else ("ms", 1e3) if value >= 1e-3 else ("µs", 1e6)
    return f"{value * factor:.3g} {unit}"


def spread(values: Sequence[float]) -> str:
    return f"{duration(min(values))}–{duration(max(values))}"


def number(value: float | None, form: str = ".2f") -> str:
    return "" if value is None else format(value, form)


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table whose columns line up in a terminal too."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    lines = [
        " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        for row in [header, *rows]
    ]
    return "\n".join(
        f"| {line} |"
        for line in [lines[0], " | ".join("-" * width for width in widths), *lines[1:]]
    )
