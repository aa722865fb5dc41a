"""Run every check that needs a machine with a GPU, and write one report.

    python tools/gpu_check.py --out report    # or: make gpu-check OUT=report
    python tools/gpu_check.py --plan short --dry-run

The program builds and installs this checkout into the running Python. Plan "full" takes half an
hour: it runs the tests on the GPU, the kernels under compute-sanitizer, and the benchmarks. Plan
"short" takes less than ten minutes: smoke tests, where the time goes, ratios to plain PyTorch, and
the tests on eight workers beside memcheck. Plan "cifar10" distills CIFAR-10 in five stages and
evaluates it. OUT/report.md and OUT/report.json hold the machine, the versions, the commit and the
outcome of every step. They are rewritten after each step, so that a lost machine costs only the
step in progress; the log of a step grows as it runs.

A machine without a network gets what it lacks from a folder of wheels: --dry-run names the missing
packages, and --wheels DIR installs them.

Exit status: 0 if every step passed, 1 if one did not, 2 if there is no GPU or no nvcc, 130 after an
interrupt (make turns each of the last three into its own 2).
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import plans
from steps import Report, Step, groups, run_all

ROOT = Path(__file__).resolve().parents[1]
# For machine.py, which works before the package is installed.
sys.path.append(str(ROOT / "benchmarks"))


def chosen(steps: Sequence[Step], only: Sequence[str], skip: Sequence[str]) -> list[Step]:
    """Return the steps that --only and --skip leave.

    A name selects all steps that start with it. A step whose partner is left out runs alone.
    """
    for name in [*only, *skip]:
        if not any(step.name.startswith(name) for step in steps):
            refuse(
                f"there is no step {name!r}; the steps are: "
                f"{'; '.join(step.name for step in steps)}"
            )

    def runs(step: Step) -> bool:
        return step.name.startswith(tuple(only or [""])) and not step.name.startswith(tuple(skip))

    wanted: list[Step] = []
    for group in groups(steps):
        for place, step in enumerate(filter(runs, group)):
            wanted.append(replace(step, beside=place > 0))
    return wanted


def dry_run(steps: Sequence[Step], missing: Sequence[str]) -> str:
    """Return the plan as text: each step, its expected and longest time, and its command."""
    lines = []
    seconds = sum(max(step.expected or step.limit for step in group) for group in groups(steps))
    longest = sum(max(step.limit for step in group) for group in groups(steps))
    for step in steps:
        expected = step.expected or step.limit
        beside = ", beside the step before" if step.beside else ""
        lines.append(f"{step.name}: {expected:.0f} s, at most {step.limit:.0f} s{beside}")
        environment = [f"{name}={value}" for name, value in step.environment.items()]
        lines.append(f"    {shlex.join([*environment, *step.command])}")
        if step.missing:
            lines.append(f"    not here: {step.missing}")
    lines.append(f"in all {seconds / 60:.1f} minutes, at most {longest / 60:.1f}")
    if missing:
        lines.append(f"this Python lacks {', '.join(missing)}; carry wheels and pass --wheels DIR")
    return "\n".join(lines)


def refuse(sentence: str) -> NoReturn:
    """Print an error and exit with status 2."""
    print(f"gpu-check: {sentence}", file=sys.stderr)
    sys.exit(2)


def preflight(args: argparse.Namespace) -> dict[str, Any]:
    """Return facts about the machine; exit with an error if the check cannot run."""
    from machine import ask, said

    facts = ask(with_gpu=True)
    if facts["torch"] is None:
        refuse(
            f"torch does not import in {sys.executable}; install it there, or run another Python"
        )
    if "gpu" not in facts:
        refuse(f"torch {facts['torch']} finds no GPU here; run this where nvidia-smi lists one")
    nvcc, missing = plans.find_tool("nvcc"), plans.missing_packages()
    if missing and args.wheels is None:
        refuse(
            f"this Python lacks {', '.join(missing)}; install them, or pass --wheels DIR with a "
            "folder of their wheels"
        )
    if nvcc is None and not args.skip_build:
        refuse(
            f"there is no nvcc on PATH, in CUDA_HOME or in {plans.CUDA_DEFAULT}; install the CUDA "
            "toolkit, or pass --skip-build"
        )
    # The previous installation is about to be replaced; the benchmarks' records describe what they
    # measured.
    kept = {
        key: value
        for key, value in facts.items()
        if key not in ("instruction_set", "threads", "pdd_fast")
    }
    toolkit = said(nvcc, "--version").partition("release ")[2].partition(",")[0] if nvcc else ""
    return kept | {
        "nvcc": toolkit or "none",
        "sources": version(),
        "begun": time.strftime("%Y-%m-%d %H:%M:%S %z"),
    }


def version() -> str:
    """Return the version of the sources without importing them."""
    text = (ROOT / "pdd_fast" / "_version.py").read_text(encoding="utf-8")
    found = re.search(r'__version__ = "(.+)"', text)
    return f"pdd-fast {found[1]}" if found else "unknown"


def parser() -> argparse.ArgumentParser:
    """Return the argument parser."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=ROOT / "build" / "gpu-check",
        help="folder of the report, its logs and records (default build/gpu-check)",
    )
    parser.add_argument(
        "--plan", choices=plans.PLANS, default="full", help="what to run (default full)"
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="print the plan and its minutes; needs no GPU"
    )
    parser.add_argument(
        "--wheels", type=Path, metavar="DIR", help="install missing packages from this folder"
    )
    parser.add_argument(
        "--data-dir", type=Path, metavar="DIR", help="where CIFAR-10 lies, for plan cifar10"
    )
    parser.add_argument(
        "--budget",
        type=float,
        metavar="SECONDS",
        help="for everything (default: 1500, or 600 for the plans short and cifar10)",
    )
    parser.add_argument(
        "--only",
        action="append",
        default=[],
        metavar="STEP",
        help="only steps that begin so; may repeat",
    )
    parser.add_argument(
        "--skip", action="append", default=[], metavar="STEP", help="leave out steps that begin so"
    )
    parser.add_argument(
        "--skip-build", action="store_true", help="check the pdd_fast that is installed"
    )
    parser.add_argument(
        "--all-tests", action="store_true", help="also run the tests that need no GPU, at the end"
    )
    return parser


def interrupt(number: int, frame: FrameType | None) -> NoReturn:
    """Turn a signal into KeyboardInterrupt."""
    raise KeyboardInterrupt


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the check and return the exit status."""
    args = parser().parse_args(arguments)
    args.out = args.out.resolve()
    args.wheels = args.wheels and args.wheels.resolve()
    budget = args.budget or (1500 if args.plan == "full" else 600)
    if args.dry_run:
        steps = plans.PLANS[args.plan](args, {"compute_capability": "9.0"})
        print(dry_run(chosen(steps, args.only, args.skip), plans.missing_packages()))
        return 0
    # A terminal or a scheduler sends these when it goes away.
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, interrupt)
    facts = preflight(args)
    os.environ["PDD_FAST_COMMIT"] = facts["commit"]  # the sources do not change from here on
    steps = chosen(plans.PLANS[args.plan](args, facts), args.only, args.skip)
    args.out.mkdir(parents=True, exist_ok=True)
    # An earlier check may have left records, and a benchmark replaces no record.
    for left in args.out.glob("bench-*/bench.json"):
        left.unlink()
    os.chdir(ROOT)
    report = Report("GPU check", facts, [], args.out)
    try:
        run_all(steps, report, budget, lambda line: print(line, flush=True))
    except KeyboardInterrupt:
        print(f"interrupted; what there is: {args.out / 'report.md'}", file=sys.stderr)
        return 130
    print(f"{'green' if report.green else 'NOT green'}: {args.out / 'report.md'}")
    return 0 if report.green else 1


if __name__ == "__main__":
    sys.exit(main())
