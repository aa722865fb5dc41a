"""Run every check that needs a machine with a GPU, and write one report.

    python tools/gpu_check.py --out report    # or: make gpu-check OUT=report

The program builds and installs this checkout into the running Python. It runs the tests on the GPU,
the kernels under compute-sanitizer, and the benchmarks. OUT/report.md and OUT/report.json hold the
machine, the versions, the commit and the outcome of every step. They are rewritten after each step,
so that a lost machine costs only the step in progress.

Exit status: 0 if every step passed, 1 if one did not, 2 if there is no GPU or no nvcc, 130 after an
interrupt (make turns each of the last three into its own 2).
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from steps import Report, Step, run_all

ROOT = Path(__file__).resolve().parents[1]
# For machine.py, which works before the package is installed.
sys.path.append(str(ROOT / "benchmarks"))

CUDA_DEFAULT = "/usr/local/cuda"  # as in setup.py
DRIVER = ROOT / "tools" / "sanitizer_driver.py"
# -P: the working directory holds the sources without compiled kernels; the installed package must
# come first.
PYTHON = [sys.executable, "-P"]
COMMAND_LINE = [*PYTHON, "-c", "from pdd_fast.cli.main import main; main()"]
CLEAN = {"racecheck": r"RACECHECK SUMMARY: 0 hazards displayed \(0 errors, 0 warnings\)"}
SEEN = {
    "memcheck": "Invalid __global__ (read|write)",
    "initcheck": "Uninitialized __global__ memory read",
}


def find_tool(name: str) -> str | None:
    """Return the path of a program of the CUDA toolkit.

    The search order is CUDA_HOME, PATH, the toolkit whose nvcc is on PATH, and CUDA_DEFAULT.
    """

    def within(toolkit: Path) -> str | None:
        # compute-sanitizer has its own folder, and not every toolkit links it from bin.
        places = (toolkit / "bin" / name, toolkit / name / name)
        return next(
            (str(path) for path in places if path.is_file() and os.access(path, os.X_OK)), None
        )

    home, nvcc = os.environ.get("CUDA_HOME"), shutil.which("nvcc")
    found = (within(Path(home)) if home else None) or shutil.which(name)
    beside = within(Path(nvcc).resolve().parents[1]) if nvcc else None
    return found or beside or within(Path(CUDA_DEFAULT))


def sanitizer_steps(program: str | None) -> list[Step]:
    """Return steps that run every operator under every tool, and steps with planted errors.

    The planted errors show that the tools detect anything at all. Without torch's memory cache
    every tensor is a separate allocation: memcheck knows its end, and no tensor holds an earlier
    one's values. The filter excludes torch's own kernels, which number in the thousands.
    """
    missing = "" if program else "compute-sanitizer is not on PATH, in CUDA_HOME or beside nvcc"
    environment = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}

    def command(tool: str, *arguments: str) -> list[str]:
        own = ["--kernel-name", "kns=pdd", "--error-exitcode", "9", "--print-limit", "20"]
        padding = ["--padding", "256"] if tool == "memcheck" else []
        return [str(program), "--tool", tool, *own, *padding, *PYTHON, str(DRIVER), *arguments]

    steps = []
    for tool in ("memcheck", "racecheck", "initcheck", "synccheck"):
        says = f"{CLEAN.get(tool, 'ERROR SUMMARY: 0 errors')}\n\\d+ calls"
        steps.append(Step(tool, command(tool), 300, says, missing=missing, environment=environment))
        if tool in SEEN:
            name, planted = f"{tool} sees a planted mistake", command(tool, "--plant", tool)
            steps.append(Step(name, planted, 120, SEEN[tool], True, missing, environment))
    return steps


def benchmark_steps(out: Path) -> list[Step]:
    """Return the benchmark steps.

    Cases dominated by launches run two rounds. Cases that would spend their time compiling run one
    round of five iterations each.
    """

    def step(case: str, limit: float, *arguments: str) -> Step:
        own = [
            "bench",
            "--device",
            "cuda",
            "--case",
            case,
            "--output",
            str(out / f"bench-{case}"),
            *arguments,
        ]
        return Step(f"bench {case}", [*COMMAND_LINE, *own], limit, tables=True)

    once = ("--rounds", "1", "--without", "compiled, float32", "--limit", "200")
    return [
        step("unroll-b20-n50-w128-s32-dsa", 600, "--rounds", "2", "--limit", "200"),
        step("unroll-b100-n30-w128-s32-dsa", 600, *once),
        step("unroll-b256-n20-w128-s32-dsa", 600, *once),
        step("step-b256-w128-s32-dsa", 300, "--rounds", "2", "--limit", "60"),
        step("gradient-matching-b128-r64-k10-w128-s32", 300, "--rounds", "1", "--limit", "200"),
        step("dsa-single-b256", 120, "--rounds", "2", "--limit", "60"),
    ]


def build_step(facts: dict[str, Any]) -> Step:
    """Return the step that builds for this GPU alone, unless PDD_FAST_CUDA_ARCHS names others.

    Six architectures take six times as long.
    """
    environment = {"PDD_FAST_CUDA": "1"}
    if "PDD_FAST_CUDA_ARCHS" not in os.environ:
        environment["PDD_FAST_CUDA_ARCHS"] = str(facts["compute_capability"]).replace(".", "")
    install = ["-m", "pip", "install", "--no-build-isolation", "--no-deps", "--verbose"]
    return Step("build", [*PYTHON, *install, str(ROOT)], 600, environment=environment)


def pytest_step(name: str, which: str, limit: float) -> Step:
    """Return a step that runs the tests that --gpu=``which`` selects."""
    pytest = [
        "-m",
        "pytest",
        "-ra",
        "--color=no",
        "-p",
        "no:cacheprovider",
        "-p",
        "gpu_tests",
        "-m",
    ]
    path = os.pathsep.join(filter(None, [str(ROOT / "tools"), os.environ.get("PYTHONPATH")]))
    command = [*PYTHON, *pytest, "not slow", f"--gpu={which}"]
    return Step(name, command, limit, r"\d+ passed", environment={"PYTHONPATH": path})


def all_steps(args: argparse.Namespace, facts: dict[str, Any]) -> list[Step]:
    """Return the steps in order; each one depends only on earlier ones."""
    env = [*COMMAND_LINE, "env", "--json"]
    return [
        *([] if args.skip_build else [build_step(facts)]),
        Step("build and environment", env, 60, r'"CUDA kernels": \{\s*"library": "loads"'),
        pytest_step("tests on the GPU", "only", 600),
        *sanitizer_steps(find_tool("compute-sanitizer")),
        *benchmark_steps(args.out),
        *([pytest_step("all other tests", "no", 1200)] if args.all_tests else []),
    ]


def chosen(steps: Sequence[Step], only: Sequence[str], skip: Sequence[str]) -> list[Step]:
    """Return the steps that --only and --skip leave.

    A name selects all steps that start with it.
    """
    for name in [*only, *skip]:
        if not any(step.name.startswith(name) for step in steps):
            refuse(
                f"there is no step {name!r}; the steps are: "
                f"{'; '.join(step.name for step in steps)}"
            )
    wanted = [s for s in steps if not only or s.name.startswith(tuple(only))]
    return [s for s in wanted if not s.name.startswith(tuple(skip))] if skip else wanted


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
    nvcc = find_tool("nvcc")
    if nvcc is None and not args.skip_build:
        refuse(
            f"there is no nvcc on PATH, in CUDA_HOME or in {CUDA_DEFAULT}; install the CUDA "
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
        "--out", type=Path, required=True, help="folder of the report, its logs and records"
    )
    parser.add_argument(
        "--budget",
        type=float,
        default=1500,
        metavar="SECONDS",
        help="for everything (default 1500)",
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
    # A terminal or a scheduler sends these when it goes away.
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, interrupt)
    facts = preflight(args)
    os.environ["PDD_FAST_COMMIT"] = facts["commit"]  # the sources do not change from here on
    steps = chosen(all_steps(args, facts), args.only, args.skip)
    args.out.mkdir(parents=True, exist_ok=True)
    # An earlier check may have left records, and a benchmark replaces no record.
    for left in args.out.glob("bench-*/bench.json"):
        left.unlink()
    os.chdir(ROOT)
    report = Report("GPU check", facts, [], args.out)
    try:
        run_all(steps, report, args.budget, lambda line: print(line, flush=True))
    except KeyboardInterrupt:
        print(f"interrupted; what there is: {args.out / 'report.md'}", file=sys.stderr)
        return 130
    print(f"{'green' if report.green else 'NOT green'}: {args.out / 'report.md'}")
    return 0 if report.green else 1


if __name__ == "__main__":
    sys.exit(main())
