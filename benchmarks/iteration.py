"""Seconds, peak memory and gradient error of one matching iteration: ours against every other way to write it.

    python benchmarks/iteration.py --case 20x50 --case 100x30 --output iteration.json

A case is BATCHxSTEPS: the gradient of the trajectory matching loss with respect to that many images and the learning
rate, through that many SGD steps on all of them, with DSA in mode "single". The error is that of the images' gradient
against float64. "Over floor" is the time over what the arithmetic and the bytes take at rates measured here (floor.py),
counted for kept activations (9 F) and for activations made again (11 F). "Times ours" compares with ours of the same
precision. Memory on a GPU is what tensors took, or what was reserved where a CUDA graph holds it; on a CPU it is what
the process took, about 0.4 GB of torch itself included.
"""

from __future__ import annotations

import argparse
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

import measure
import present
import torch
from baselines import Problem
from contenders import PRECISIONS, contenders, error_of, reference, timed, write_truth
from floor import Size, floor, rates
from machine import ask
from measure import Outcome

SCRIPT = Path(__file__)
DEFAULT_CASES = {"cuda": [(20, 50), (100, 30), (256, 20)], "cpu": [(10, 5)]}


def case(text: str) -> tuple[int, int]:
    found = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", text)
    if found is None:
        raise argparse.ArgumentTypeError(f"must be BATCHxSTEPS such as 20x50, got {text!r}")
    return int(found[1]), int(found[2])


# ---- one measurement ----------------------------------------------------------------------------------------------


def one(args: argparse.Namespace) -> dict[str, Any]:
    """What ``--child NAME`` measures."""
    device, size = args.device, size_of(args, args.case[0])
    if args.child == "floor":
        return rates(size, PRECISIONS[device.type], device)
    dtype = torch.float64 if args.child == "float64" else torch.float32
    problem = Problem.draw(size.n, size.steps, size.size, size.width, size.depth, device, dtype)
    if args.child == "float64":
        return write_truth(problem, args.truth)
    gradient, found = timed(contenders(device.type, args.memory)[args.child], problem, args.repeats)
    return found | error_of(gradient, args.truth)


# ---- all of them --------------------------------------------------------------------------------------------------


def size_of(args: argparse.Namespace, case: tuple[int, int]) -> Size:
    return Size(*case, args.size, args.width, args.depth)


def summary(outcomes: dict[str, Outcome], measured: dict[str, Any], size: Size) -> dict[str, Any]:
    """What the record keeps of a case: the measured rates, the floor, and every contender's results."""
    working = [name for name, outcome in outcomes.items() if outcome.samples]
    results: dict[str, Any] = {}
    for name, outcome in outcomes.items():
        base = reference(working, name)
        results[name] = outcome.result(outcomes[base] if base else None)
        if "failed" not in results[name] and "failed" not in measured:
            bound = floor(size, measured, name.rpartition(", ")[2])
            over = {f"{f} F": results[name]["seconds"] / (bound[f"{f} F"] + bound["passes"]) for f in (9, 11)}
            results[name]["over_floor"] = over
    bounds = {p: floor(size, measured, p) for p in measured.get("convolution", {})}
    return {"rates": measured, "floor": bounds, "results": results}


def show(found: dict[str, Any]) -> str:
    """A case as Markdown: the contenders, and the floor that they are held to."""
    rows = []
    for name, result in found["results"].items():
        if "failed" in result:
            rows.append([name, f"{result['failed']}: {result['why']}", "", "", "", "", ""])
            continue
        over = " / ".join(present.number(value) for value in result.get("over_floor", {}).values())
        error = "" if "error" not in result else present.number(result["error"], ".1e") or "not finite"
        rows.append([
            name, present.duration(result["seconds"]), present.spread(result["seconds_all"]),
            present.number(result["times_ours"]), present.gigabytes(result["peak_bytes"]), error, over,
        ])  # fmt: skip
    header = ["contender", "seconds", "min–max", "times ours", "peak memory", "error", "over floor 9 F / 11 F"]
    text = present.table(header, rows)
    if not found["floor"]:
        return f"{text}\n\nno floor: {found['rates']['why']}"
    floors = [
        [p, f"{found['rates']['convolution'][p] / 1e12:.3g} TFLOP/s", *(present.duration(v) for v in bound.values())]
        for p, bound in found["floor"].items()
    ]
    copy = f"{found['rates']['copy'] / 1e9:.4g} GB/s"
    header = ["floor", "convolution rate", "9 F", "11 F", f"passes at {copy}"]
    return f"{text}\n\n{present.table(header, floors)}"


def run_case(args: argparse.Namespace, case: tuple[int, int], names: list[str], record: dict[str, Any]) -> bool:
    """Measures and prints a case; whether all that it stands for was there: the exact gradient, and ours."""
    size, label = size_of(args, case), f"{case[0]}x{case[1]}"
    shared = [f"--{n}={getattr(args, n)}" for n in ("size", "width", "depth", "threads", "repeats", "memory", "device")]
    arguments = [*shared, f"--case={label}"]
    with tempfile.TemporaryDirectory() as folder:
        arguments.append(f"--truth={Path(folder) / 'gradient.pt'}")
        print(f"{label}: the gradient in float64, and this machine's rates", file=sys.stderr, flush=True)
        exact = measure.run_child(SCRIPT, "float64", arguments, args.limit)
        measured = measure.run_child(SCRIPT, "floor", arguments, args.limit)

        def keep(outcomes: dict[str, Outcome]) -> None:
            record["cases"][label] = summary(outcomes, measured, size)
            present.write_record(args.output, record)

        outcomes = measure.in_turn(SCRIPT, names, arguments, args.rounds, args.limit, keep)
    print(f"\n{label}: {case[0]} images, {case[1]} steps, width {size.width}, {size.size}×{size.size}\n", flush=True)
    if "failed" in exact:
        print(f"no errors: the gradient in float64 {exact['why']}\n")
    print(show(record["cases"][label]), flush=True)
    return not any(outcome.failed for name, outcome in outcomes.items() if name.startswith("ours")) and not (
        "failed" in exact or "failed" in measured
    )


def parser() -> present.Parser:
    parser = present.Parser(__doc__)
    parser.add_argument("--case", type=case, action="append", metavar="BATCHxSTEPS",
                        help="may be repeated (default 20x50, 100x30 and 256x20 on a GPU, 10x5 on a CPU)")  # fmt: skip
    parser.add_numbers(
        ("width", 128, "channels"), ("depth", 3, "blocks"), ("size", 32, "pixels of a side"),
        ("repeats", 0, "iterations timed per process; 0: 5 on a GPU, 1 on a CPU"),
    )  # fmt: skip
    parser.add_argument("--memory", choices=("recompute", "cache"), default="recompute", help="of ours")
    parser.add_shared(rounds=3)
    return parser


def main() -> int:
    """1 where ours failed, or the gradient that the errors are measured against; a baseline may fail."""
    arguments = parser()
    args = arguments.parse_args()
    if measure.is_child(args, one):
        return 0
    every = contenders(args.device.type, args.memory)
    names = present.selected(list(every), args.only, args.skip, arguments)
    settings = {n: getattr(args, n) for n in ("width", "depth", "size", "rounds", "memory")}
    record: dict[str, Any] = {
        "benchmark": "iteration", "settings": settings, "machine": ask(args.device.type == "cuda", args.threads),
        "contenders": {name: every[name].note for name in names}, "cases": {},
    }  # fmt: skip
    good = [run_case(args, c, names, record) for c in args.case or DEFAULT_CASES[args.device.type]]
    return 0 if all(good) else 1


if __name__ == "__main__":
    sys.exit(main())
