"""Plans of gpu_check.py: the steps, in order, of a full check, a short one, and a distillation."""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import sys
import tempfile
import tomllib
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any

from steps import Step

ROOT = Path(__file__).resolve().parents[1]
TOOLS = ROOT / "tools"
CUDA_DEFAULT = "/usr/local/cuda"  # as in setup.py
DRIVER = TOOLS / "sanitizer_driver.py"
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


def build_steps(
    args: argparse.Namespace, facts: dict[str, Any], limit: float = 600, expected: float = 0
) -> list[Step]:
    """Return the step that builds for this GPU alone, unless PDD_FAST_CUDA_ARCHS names others.

    Six architectures take six times as long. With --wheels, packages that are missing or too old
    are installed from that folder before, because a machine may have no network. With --skip-build
    there is no step.
    """
    if args.skip_build:
        return []
    environment = {"PDD_FAST_CUDA": "1"}
    if "PDD_FAST_CUDA_ARCHS" not in os.environ:
        environment["PDD_FAST_CUDA_ARCHS"] = str(facts["compute_capability"]).replace(".", "")
    install = [*PYTHON, "-m", "pip", "install", "--no-build-isolation"]
    command = [*install, "--no-deps", "--verbose", str(ROOT)]
    if args.wheels is not None:
        # Without pip's resolver, which would refuse a torch whose exact pins the machine breaks.
        first = shlex.join(
            [*PYTHON, "-m", "pip", "install", "--no-index", "--no-deps", "--upgrade"]
        )
        script = f"{first} {shlex.quote(str(args.wheels))}/*.whl && {shlex.join(command)}"
        command = ["bash", "-c", script]
    return [Step("build", command, limit, environment=environment, expected=expected)]


def pytest_step(name: str, which: str, limit: float, *arguments: str, expected: float = 0) -> Step:
    """Return a step that runs the tests that --gpu=``which`` selects."""
    pytest = ["-m", "pytest", "-ra", "--color=no", "-p", "no:cacheprovider", "-p", "gpu_tests"]
    command = [*PYTHON, *pytest, "-m", "not slow", f"--gpu={which}", *arguments]
    return Step(name, command, limit, r"\d+ passed", environment=_beside(), expected=expected)


def full(args: argparse.Namespace, facts: dict[str, Any]) -> list[Step]:
    """Return the steps for half an hour; each one depends only on earlier ones."""
    env = [*COMMAND_LINE, "env", "--json"]
    return [
        *build_steps(args, facts),
        Step("build and environment", env, 60, r'"CUDA kernels": \{\s*"library": "loads"'),
        pytest_step("tests on the GPU", "only", 600),
        *sanitizer_steps(find_tool("compute-sanitizer")),
        *benchmark_steps(args.out),
        *([pytest_step("all other tests", "no", 1200)] if args.all_tests else []),
    ]


def short(args: argparse.Namespace, facts: dict[str, Any]) -> list[Step]:
    """Return the steps for ten minutes in all, the most telling first.

    Every step prints what it knows as soon as it knows it, so that a lost machine leaves most of
    its results. With report.md and report.json there are eight files.
    """
    (memcheck, *_) = sanitizer_steps(find_tool("compute-sanitizer"))
    return [
        *build_steps(args, facts, limit=180, expected=75),
        tool("smoke", "gpu_smoke.py", 90, 25, says=r"(\d+) of \1 checks passed"),
        tool("profile", "gpu_profile.py", 120, 50, tables=True),
        tool("ratios", "gpu_ratios.py", 240, 170, "--seconds", "45", tables=True),
        pytest_step("tests", "only", 240, "-n", "8", expected=120),
        replace(memcheck, expected=120, beside=True),
    ]


def cifar10(args: argparse.Namespace, facts: dict[str, Any]) -> list[Step]:
    """Return the steps that distill CIFAR-10 in five stages with a few short experts."""
    settings = {
        "num_experts": 10,
        "expert_train_epochs": 10,
        "iterations": 300,
        "eval_every": 150,
        "expert_epochs": 2,
        "max_start_epoch": 5,
    }
    # Not in OUT, from which a machine may return a few small files only.
    run = Path(tempfile.gettempdir()) / f"gpu-check-{os.getpid()}" / "run"
    command = ["distill", "--recipe", "cifar10-ipc10", "--run-dir", str(run)]
    if args.data_dir is not None:
        command += ["--data-dir", str(args.data_dir.resolve())]
    for name, value in settings.items():
        command += ["--set", f"{name}={value}"]
    brought = " ".join(shlex.quote(str(run / name)) for name in ("evaluation.json", "accuracy.png"))
    script = f"{shlex.join([*COMMAND_LINE, *command])} && cp {brought} {shlex.quote(str(args.out))}"
    step = Step("CIFAR-10", ["bash", "-c", script], 540, "Test accuracy", expected=300)
    return [*build_steps(args, facts, limit=180, expected=75), step]


def missing_packages() -> list[str]:
    """Return the requirements of the build, the package and its tests that this Python lacks."""
    from packaging.requirements import Requirement

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    wanted = [
        *project["build-system"]["requires"],
        *project["project"]["dependencies"],
        *project["project"]["optional-dependencies"]["test"],
    ]
    missing = []
    for text in dict.fromkeys(wanted):
        requirement = Requirement(text)
        try:
            found = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            missing.append(text)
            continue
        if not requirement.specifier.contains(found, prereleases=True):
            missing.append(text)
    return missing


PLANS = {"full": full, "short": short, "cifar10": cifar10}


def tool(
    name: str,
    script: str,
    limit: float,
    expected: float,
    *arguments: str,
    says: str = "",
    tables: bool = False,
) -> Step:
    """Return a step that runs a program of this folder."""
    command = [*PYTHON, str(TOOLS / script), *arguments]
    return Step(name, command, limit, says, environment=_beside(), tables=tables, expected=expected)


def _beside() -> dict[str, str]:
    """Return the environment in which programs find the modules of this folder."""
    path = os.pathsep.join(filter(None, [str(TOOLS), os.environ.get("PYTHONPATH")]))
    return {"PYTHONPATH": path}
