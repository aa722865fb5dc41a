"""Plot time and memory of the meta-gradient over N."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pdd_fast.benchmarks.cases import Case, parse
from pdd_fast.evaluation.figures import default_style, new_figure, save_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

OURS, OTHERS = (
    ("#0b6e99", "#3aa6d0", "#084c6b"),
    ("#d9730d", "#6940a5", "#8a8a8a", "#4d7c3a", "#c2185b"),
)


def family(names: list[str]) -> list[str]:
    """Return the largest group of meta-gradients that differ only in N, sorted by N.

    Ties are broken in favor of the first group.
    """
    groups: dict[Case, list[Case]] = {}
    for case in map(parse, names):
        if case.kind == "unroll":
            key = Case(**{**case.__dict__, "steps": 0})
            groups.setdefault(key, []).append(case)
    largest = max(groups.values(), key=len, default=[])
    return [case.name for case in sorted(largest, key=lambda case: case.steps)]


def drawn(cases: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the implementations to plot: the fastest of each way to write the iteration.

    The package's implementations are those of the fused engine with its default convolution, if
    that was measured, one per memory mode. For the others the fastest memory format is chosen, and
    on a GPU the fastest precision except bfloat16, which is a different computation.
    """
    every = {c["name"]: c for found in cases.values() for c in found["implementations"]}
    there = [
        c for c in every.values() if c["precision"] != "bfloat16" and _curve(c["name"], cases)[0]
    ]
    usual = {"engine": "auto", "convolution": "auto", "graph": True}
    default = [
        c for c in there if c["ours"] and all(c["options"].get(k, v) == v for k, v in usual.items())
    ]
    groups: dict[str, list[dict[str, Any]]] = {}
    for implementation in there:
        if implementation["ours"] and default and implementation not in default:
            continue
        way = (
            implementation["name"]
            if implementation["ours"] and not default
            else implementation["options"].get("function")
        )
        groups.setdefault(way or implementation["options"]["memory"], []).append(implementation)

    def at_the_end(implementation: dict[str, Any]) -> tuple[int, float]:
        """Rank by the largest N reached, then by speed."""
        steps, seconds, _ = _curve(implementation["name"], cases)[0][-1]
        return -steps, seconds

    return [min(group, key=at_the_end) for group in groups.values()]


@default_style()
def draw(record: Mapping[str, Any], path: Path) -> bool:
    """Plot a record's largest family of cases; return whether there was anything to plot."""
    cases = {name: record["cases"][name] for name in family(list(record["cases"]))}
    implementations = drawn(cases)
    if not implementations:
        return False
    figure = new_figure(figsize=(9.6, 4.4), dpi=150)
    time, memory = figure.subplots(1, 2)
    colors = {True: cycle(OURS), False: cycle(OTHERS)}
    for implementation in implementations:
        points, lost = _curve(implementation["name"], cases)
        ours = implementation["ours"]
        style: dict[str, Any] = {
            "color": next(colors[ours]),
            "marker": "o" if ours else "s",
            "markersize": 4,
            "linewidth": 2 if ours else 1.2,
            "linestyle": "-" if implementation["exact"] else ":",
            "label": implementation["name"] + (f" (N = {lost[0]}: {lost[1]})" if lost else ""),
        }
        steps, seconds, taken = zip(*points, strict=True)
        time.plot(steps, seconds, **style)
        memory.plot(steps, [value / 1e9 for value in taken], **style)
    _finish(time, "seconds", cases)
    _finish(memory, "memory beyond the start, GB", cases)
    figure.legend(
        *time.get_legend_handles_labels(), frameon=False, fontsize=8, ncols=3, loc="lower center"
    )
    one = parse(next(iter(cases)))
    dsa = ", with DSA" if one.augment else ""
    figure.suptitle(
        f"one meta-gradient: {one.batch} images, width {one.width}, {one.size}×{one.size}{dsa}; "
        f"{_where(record['machine'])}",
        fontsize=10,
        parse_math=False,
    )
    figure.tight_layout(rect=(0, 0.16, 1, 1))
    save_figure(figure, path)
    return True


def _where(machine: Mapping[str, Any]) -> str:
    threads = machine["threads"]
    return str(machine.get("gpu") or f"{machine['cpu']}, {threads} thread{'s' * (threads != 1)}")


def _curve(
    implementation: str, cases: Mapping[str, Any]
) -> tuple[list[tuple[int, float, float]], tuple[int, str] | None]:
    """Return the points of a curve, and the first N without a result.

    A point is N, seconds, and bytes above the start. The first failing N comes with its reason.
    """
    points, lost = [], None
    for name, found in cases.items():
        result = found["results"].get(implementation)
        if result is None or result.get("failed") == "not run":
            continue
        if "failed" in result:
            lost = lost or (parse(name).steps, result["failed"])
            continue
        points.append(
            (
                parse(name).steps,
                result["seconds"]["iteration"]["median"],
                result["above_start_bytes"],
            )
        )
    return points, lost


def _finish(axes: Axes, what: str, cases: Mapping[str, Any]) -> None:
    axes.set_xlabel("N, steps")
    axes.set_xticks([parse(name).steps for name in cases])
    axes.set_ylabel(what)
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.25)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
