"""Format a record as Markdown: the machine, a table per case, and explanatory sentences.

Imports no torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pdd_fast.benchmarks import roofline_counts
from pdd_fast.benchmarks.cases import KINDS, parse
from pdd_fast.benchmarks.formatting import duration, number, size, spread, table


def case_table(name: str, found: Mapping[str, Any]) -> str:
    """Return the table of a case's results."""
    case = parse(name)
    kind, labels = (
        KINDS[case.kind],
        roofline_counts.OF_KIND.get(case.kind, ("copy",) if case.kind == "dsa" else ()),
    )
    several = len(kind.parts) > 1
    header = ["implementation", *(["part"] if several else []), "seconds", "min–max", "times ours"]
    header += ["peak memory", "of it new"]
    header += [_ERRORS[key][0] for key in kind.errors]
    header += [f"over roofline {' / '.join(labels)}"] if labels else []
    rows = []
    for implementation, result in found["results"].items():
        if "failed" in result:
            cells = [
                implementation,
                *([""] if several else []),
                f"{result['failed']}: {result['why']}",
            ]
            rows.append(cells + [""] * (len(header) - len(cells)))
            continue
        for i, (part, seconds) in enumerate(result["seconds"].items()):
            row = [
                implementation if i == 0 else "",
                *([part] if several else []),
                duration(seconds["median"]),
            ]
            row += [
                spread([seconds["smallest"], seconds["largest"]]),
                number(seconds["times_ours"]),
            ]
            row += [
                size(result[key]) if i == 0 else "" for key in ("peak_bytes", "above_start_bytes")
            ]
            row += _errors(kind.errors, result.get("error"))
            if labels:
                row.append(" / ".join(number(value) for value in seconds["over_floor"].values()))
            rows.append(row)
    return table(header, rows)


# Column title and number format.
_ERRORS = {
    "images": ("images' gradient", ".1e"),
    "cosine": ("cosine", ".6f"),
    "rate": ("rate's gradient", ".1e"),
}


def _errors(keys: Sequence[str], error: Mapping[str, float | None] | None) -> list[str]:
    if error is None:
        return [""] * len(keys)
    return [number(error[key], _ERRORS[key][1]) or "not finite" for key in keys]


def roofline_table(name: str, found: Mapping[str, Any]) -> str:
    """Return the table of a case's roofline: rates and seconds; an empty string if it has none."""
    roofline, case = found["roofline"], parse(name)
    if roofline["rates"] is None:
        return f"No roofline: {roofline['failed']['why']}." if "failed" in roofline else ""
    copy = f"{roofline['rates']['copy'] / 1e9:.4g} GB/s"
    if "convolution" not in roofline["rates"]:
        return f"Roofline: bytes at the rate of a copy, {copy}."
    rows = []
    for precision, of_layers in roofline["rates"]["convolution"].items():
        for i, (layer, rates) in enumerate(
            zip(roofline_counts.layers(case), of_layers, strict=True), start=1
        ):
            shape = f"{layer.channels}→{layer.width}, {layer.side}×{layer.side}"
            rows.append(
                [
                    precision,
                    f"{i}: {shape}",
                    *(f"{rates[k] / 1e9:.4g}" for k in roofline_counts.KINDS),
                ]
            )
    text = table(
        ["roofline", "layer", *(f"{kind}, GFLOP/s" for kind in roofline_counts.KINDS)], rows
    )
    sums = [
        f"{label} and {roofline_counts.passes_in_words(label)} at {copy}: {duration(seconds)} in "
        f"{precision}"
        for precision, parts in roofline["seconds"].items()
        for part in parts.values()
        for label, seconds in part.items()
    ]
    return "\n\n".join([text, f"Roofline: {'; '.join(sums)}."] if sums else [text])


def sentences(found: Mapping[str, Any]) -> list[str]:
    """Return sentences about a case that its table cannot express."""
    said = []
    truth = found.get("truth")
    if truth and "failed" in truth:
        said.append(f"No errors: the gradient in float64 {truth['why']}.")
    for other in found["alternatives"]:
        line = (
            f"Best exact alternative in {other['precision']}: {other['baseline']}, "
            f"{duration(other['seconds'])}."
        )
        beside = [other["ours"]]
        if other["fastest of ours"]["name"] != beside[0]["name"]:
            beside.append(other["fastest of ours"])
        for own in beside:
            line += (
                f" {own['name']}: {duration(own['seconds'])}, "
                f"{number(own['times_as_fast'])} times as fast"
            )
            if own["share_of_memory"] is not None:
                line += f" with {number(own['share_of_memory'])} of its new memory"
            line += "."
        if other["without"]:
            line += f" Not measured or without a result: {'; '.join(other['without'])}."
        said.append(line)
    left = found.get("left_out")
    if left:
        said.append(f"Left out: {'; '.join(left)}.")
    return said


def case_text(name: str, found: Mapping[str, Any]) -> str:
    """Return the text of a case for the screen and the report."""
    caption = f"{name}: {parse(name).title}"
    blocks = [caption, case_table(name, found), roofline_table(name, found), *sentences(found)]
    return "\n\n".join(block for block in blocks if block)


def report(record: Mapping[str, Any]) -> str:
    """Return the text of the whole record."""
    finished = "" if record["finished"] else " (not finished)"
    lines = [f"# pdd-fast bench{finished}", ""]
    facts = {**record["machine"], **record["settings"], "began": record["began"]}
    rows = [
        f"| {key.replace('_', ' ')} | {size(value) if 'memory' in key else _plain(value)} |"
        for key, value in facts.items()
        if value not in ((), [], 0)
    ]
    lines += ["| | |", "|---|---|", *rows, ""]
    lines += [
        "Every number is a median over rounds; in each round, every implementation runs in a "
        "process of its own. Min–max covers all timed calls. Times ours compares each round with "
        "our first implementation in the same precision. Peak memory is that of the process, or "
        "of the tensors on a GPU; its new part came after the network and its inputs. Errors are "
        "relative to float64."
    ]
    for name, found in record["cases"].items():
        lines += ["", f"## {case_text(name, found)}"]
        lines += ["", *(f"- {c['name']}: {c['note']}" for c in found["implementations"])]
    return "\n".join(lines) + "\n"


def _plain(value: Any) -> str:
    return "; ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
