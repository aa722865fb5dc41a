"""Measure a meta-gradient alone, and while a second process computes the same.

    python -P -m pdd_fast.benchmarks.busy --output busy.json

Both processes use torch's default number of threads. "fair" is the time that an ideal scheduler
would give each process: the larger of the time alone, and the processor time of all processes
divided by the number of processors. Processor time alone includes the time that waiting threads
spin. A program that spins therefore reaches a good ratio to "fair" without merit; compare its
"beside / alone" too.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pdd_fast.benchmarks import formatting
from pdd_fast.benchmarks.machine import ask
from pdd_fast.runtime.files import write_json

if TYPE_CHECKING:
    from pdd_fast.benchmarks.baselines import Problem

CASES = {
    "digits": "unroll-b20-n20-w32-s8",
    "width 32, 32x32": "unroll-b20-n5-w32-s32",
    "width 128, 32x32": "unroll-b20-n5-w128-s32",
    "ResNet-18, 32x32": "resnet18",  # 20 images, N = 2, with the autograd engine
}
IMPLEMENTATIONS = ("ours", "ours, cache", "plain autograd")
PROCESSES = 2


def resnet18() -> Problem:
    """Return a problem of two steps on 20 images, without augmentation."""
    import torch

    from pdd_fast.benchmarks.baselines import Problem
    from pdd_fast.networks.parameters import flatten_parameters
    from pdd_fast.networks.zoo import build

    torch.manual_seed(0)
    net = build("resnet18", 3, 10, (32, 32))
    start = flatten_parameters(net)
    target, images = start + 0.01 * torch.randn_like(start), torch.randn(20, 3, 32, 32)
    labels, batches = torch.arange(20) % 10, [torch.randperm(20) for _ in range(2)]
    return Problem(net, start, target, images, labels, torch.tensor(0.01), batches, None, None)


def worker(case: str, implementation: str, seconds: float) -> None:
    """Measure in a worker process and print wall and processor time of one iteration.

    The worker prints "ready", waits for a line on stdin, and iterates for ``seconds``.
    """
    import torch

    from pdd_fast.benchmarks import baselines, cases, unroll

    if case == "resnet18":
        problem, options = resnet18(), {"engine": "autograd"}
    else:
        problem, options = (
            unroll.problem_of(cases.parse(case), torch.device("cpu"), torch.float32),
            {},
        )
    if implementation == "plain autograd":
        iterate = baselines.plain(problem)
    else:
        memory = "cache" if implementation == "ours, cache" else "recompute"
        iterate = unroll.unrolled(problem, memory=memory, **options)
    iterate()
    print("ready", flush=True)
    sys.stdin.readline()
    began, used, count = time.perf_counter(), time.process_time(), 0
    while count < 2 or time.perf_counter() - began < seconds:
        iterate()
        count += 1
    wall, used = time.perf_counter() - began, time.process_time() - used
    print(json.dumps({"wall": wall / count, "cpu": used / count, "iterations": count}), flush=True)
    sys.stdin.readline()


def together(
    case: str, implementation: str, seconds: float, processes: int
) -> list[dict[str, float]]:
    """Return the measurement of each of ``processes`` that start at the same moment."""
    command = [
        sys.executable,
        "-P",
        "-m",
        "pdd_fast.benchmarks.busy",
        "--worker",
        case,
        implementation,
        str(seconds),
    ]
    workers = [
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for _ in range(processes)
    ]
    try:
        for one in workers:
            assert one.stdout
            if one.stdout.readline() != "ready\n":
                raise RuntimeError(f"a worker of {case} failed")
        for one in workers:
            assert one.stdin
            one.stdin.write("go\n")
            one.stdin.flush()
        return [json.loads(one.stdout.readline()) for one in workers if one.stdout]
    finally:
        for one in workers:
            one.kill()
            one.wait()


def measured(name: str, implementation: str, seconds: float) -> dict[str, Any]:
    """Return one row of the table: the times of one process alone and of several at once."""
    case = CASES[name]
    # The time alone is measured before and after, because the machine's speed may drift.
    alone = [together(case, implementation, seconds, 1)[0]]
    beside = together(case, implementation, seconds, PROCESSES)
    alone += together(case, implementation, seconds, 1)
    wall, cpu = (sum(one[key] for one in alone) / len(alone) for key in ("wall", "cpu"))
    fair = max(wall, PROCESSES * cpu / len(os.sched_getaffinity(0)))
    slowest = max(one["wall"] for one in beside)
    return {
        "case": name,
        "implementation": implementation,
        "alone": wall,
        "alone_cpu": cpu,
        "beside": slowest,
        "fair": fair,
        "to_fair": slowest / fair,
        "to_alone": slowest / wall,
        "samples": {"alone": alone, "beside": beside},
    }


def show(rows: list[dict[str, Any]]) -> str:
    """Return the rows as a table."""
    cells = [
        [
            row["case"],
            row["implementation"],
            f"{1e3 * row['alone']:.1f}",
            f"{1e3 * row['beside']:.1f}",
            f"{1e3 * row['fair']:.1f}",
            f"{row['to_alone']:.2f}",
            f"{row['to_fair']:.2f}",
        ]
        for row in rows
    ]
    return formatting.table(
        [
            "case",
            "",
            "alone, ms",
            "beside another, ms",
            "fair, ms",
            "beside / alone",
            "beside / fair",
        ],
        cells,
    )


def main() -> None:
    """Run the program."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--seconds", type=float, default=5.0, help="of every measurement (default 5)"
    )
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument(
        "--implementations", nargs="+", choices=IMPLEMENTATIONS, default=["ours", "plain autograd"]
    )
    parser.add_argument("--output", type=Path, help="where the JSON goes")
    parser.add_argument("--worker", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        worker(args.worker[0], args.worker[1], float(args.worker[2]))
        return
    rows: list[dict[str, Any]] = []
    for name in args.cases:
        for implementation in args.implementations:
            rows.append(measured(name, implementation, args.seconds))
            print(show(rows) if len(rows) == 1 else show(rows).splitlines()[-1], flush=True)
    if args.output:
        write_json(args.output, {"benchmark": "busy", "machine": ask(False), "results": rows})


if __name__ == "__main__":
    main()
