"""Seconds, peak memory and gradient error of one meta-gradient: ours against the loop that MTT's scripts write.

    python benchmarks/unroll.py --batch 50 --steps 50 --output benchmarks/results/unroll.json

Every engine runs in a process of its own, round after round in turn, so that a slow minute of the machine hits all of
them. Reported are medians over rounds with the smallest and largest beside. The error is that of the images' gradient
against float64 through all steps. iteration.py measures more contenders, with augmentation.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import baselines
import measure
import present
import torch
from baselines import Problem
from contenders import Contender, error_of, timed, unrolled, write_truth
from machine import ask

SCRIPT = Path(__file__)
OURS = "fused, recompute"
ENGINES = {
    OURS: "exact; keeps the parameters of every step",
    "fused, cache": "exact; keeps the activations too",
    "autograd, recompute": "exact for any module; one step's graph at a time",
    "plain autograd": "create_graph=True through all steps, as MTT's scripts do",
    "plain autograd, channels-last": "the same with the better memory format",
}


def contender(name: str) -> Contender:
    if name.startswith("plain"):
        return Contender("float32", ENGINES[name], baselines.plain, channels_last=name.endswith("last"))
    engine, memory = name.split(", ")
    return Contender("float32", ENGINES[name], partial(unrolled, engine=engine, memory=memory))


def one(args: argparse.Namespace) -> dict[str, Any]:
    """What ``--child NAME`` measures."""
    exact = args.child == "float64"
    dtype = torch.float64 if exact else torch.float32
    problem = Problem.draw(
        args.batch, args.steps, args.size, args.width, args.depth, args.device, dtype, augment=False
    )  # fmt: skip
    if exact:
        return write_truth(problem, args.truth)
    gradient, found = timed(contender(args.child), problem)
    return found | error_of(gradient, args.truth)


def show(results: dict[str, Any]) -> str:
    rows = []
    for name, result in results.items():
        if "failed" in result:
            rows.append([name, f"{result['failed']}: {result['why']}", "", "", "", ""])
            continue
        rows.append([
            name, present.duration(result["seconds"]), present.spread(result["seconds_all"]),
            present.number(result["times_ours"]), present.gigabytes(result["peak_bytes"]),
            present.number(result["error"], ".1e"),
        ])  # fmt: skip
    return present.table(["engine", "seconds", "min–max", "times ours", "peak memory", "error"], rows)


def parser() -> present.Parser:
    parser = present.Parser(__doc__)
    parser.add_numbers(
        ("batch", 50, "images, all of them in every step"), ("steps", 50, "N"), ("width", 128, "channels"),
        ("depth", 3, "blocks"), ("size", 32, "pixels of a side"),
    )  # fmt: skip
    parser.add_shared(rounds=3)
    parser.set_defaults(device="cpu")
    return parser


def main() -> None:
    arguments = parser()
    args = arguments.parse_args()
    if measure.is_child(args, one):
        return
    names = present.selected(list(ENGINES), args.only, args.skip, arguments)
    case = {n: getattr(args, n) for n in ("batch", "steps", "width", "depth", "size", "rounds")}
    record: dict[str, Any] = {
        "benchmark": "unroll", "case": case, "machine": ask(args.device.type == "cuda", args.threads),
        "engines": ENGINES, "results": {},
    }  # fmt: skip
    own = [f"--{n}={getattr(args, n)}" for n in ("batch", "steps", "width", "depth", "size", "threads", "device")]
    with tempfile.TemporaryDirectory() as folder:
        own.append(f"--truth={Path(folder) / 'gradient.pt'}")
        exact = measure.run_child(SCRIPT, "float64", own, args.limit)
        if "failed" in exact:
            sys.exit(f"unroll.py: the gradient in float64 that errors are measured against {exact['why']}")

        def keep(outcomes: dict[str, measure.Outcome]) -> None:
            record["results"] = {name: outcome.result(outcomes.get(OURS)) for name, outcome in outcomes.items()}
            present.write_record(args.output, record)

        measure.in_turn(SCRIPT, names, own, args.rounds, args.limit, keep)
    print(show(record["results"]))


if __name__ == "__main__":
    main()
