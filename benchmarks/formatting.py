"""Format numbers and tables. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence


def size(count: float) -> str:
    """Return a number of bytes in powers of 1000."""
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.3g} MB"


def duration(value: float) -> str:
    """Return seconds in the unit that leaves one to three digits before the decimal point."""
    unit, factor = ("s", 1.0) if value >= 1 else ("ms", 1e3) if value >= 1e-3 else ("µs", 1e6)
    return f"{value * factor:.3g} {unit}"


def spread(values: Sequence[float]) -> str:
    """Return the smallest and the largest duration."""
    return f"{duration(min(values))}–{duration(max(values))}"


def number(value: float | None, form: str = ".2f") -> str:
    """Return the formatted number; an empty string for None."""
    return "" if value is None else format(value, form)


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table whose columns align in a terminal too."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    lines = [
        " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        for row in [header, *rows]
    ]
    return "\n".join(
        f"| {line} |"
        for line in [lines[0], " | ".join("-" * width for width in widths), *lines[1:]]
    )
