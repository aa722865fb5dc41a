"""The short plans of tools/gpu_check.py, and their programs at sizes for a CPU."""

from __future__ import annotations

import importlib
import os
import re
import shlex
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
import torch
from gpu_tools import TOOLS, all_steps, gpu_check, module, plans, steps


def test_the_short_plan_fits_ten_minutes_and_eight_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plans, "find_tool", lambda name: f"/cuda/bin/{name}")
    found = all_steps("--plan", "short")
    names = [step.name for step in found]
    assert names == ["build", "smoke", "profile", "ratios", "tests", "memcheck"]
    assert [step.name for step in found if step.beside] == ["memcheck"]
    assert len(names) + len(["report.md", "report.json"]) == 8
    assert sum(step.expected for step in found if not step.beside) < 600
    assert all(0 < step.expected < step.limit for step in found)
    assert {"-n", "8", "--gpu=only"} <= set(found[4].command)


@pytest.mark.parametrize(
    ("only", "skip", "expected"),
    [
        ([], ["tests"], {"ratios": False, "memcheck": False}),
        (["memcheck"], [], {"memcheck": False}),
        (["tests", "memcheck"], [], {"tests": False, "memcheck": True}),
    ],
)
def test_a_step_whose_partner_is_left_out_runs_alone(
    only: list[str], skip: list[str], expected: dict[str, bool]
) -> None:
    found = gpu_check.chosen(all_steps("--plan", "short"), only, skip)
    beside = {step.name: step.beside for step in found}
    assert {name: beside[name] for name in expected} == expected


def test_the_plan_of_cifar10_is_a_command_that_the_command_line_takes(tmp_path: Path) -> None:
    from pdd_fast.cli.distill import command

    (step,) = all_steps("--plan", "cifar10", "--skip-build", "--data-dir", str(tmp_path))
    first, second = step.command[2].split(" && ")
    words = shlex.split(first)
    arguments = words[words.index("distill") + 1 :]
    asked = command.make_context("distill", list(arguments)).params
    assert asked["recipe"] == "cifar10-ipc10"
    assert asked["data_dir"] == str(tmp_path)
    assert "num_experts=10" in arguments
    assert second.startswith(f"cp {asked['run_dir']}/evaluation.json ")


@pytest.mark.parametrize("plan", ["short", "full", "cifar10"])
def test_a_dry_run_prints_the_plan_and_its_minutes_without_a_gpu(
    plan: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert gpu_check.main(["--plan", plan, "--dry-run", "--out", str(tmp_path / "out")]) == 0
    out = capsys.readouterr().out
    assert "build: " in out
    assert re.search(r"^in all \d+\.\d minutes, at most \d+\.\d$", out, re.MULTILINE)
    assert not (tmp_path / "out").exists()


def test_missing_and_old_packages_are_named_and_wheels_bring_them(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    versions = {"setuptools": "69.0"}

    def version(name: str) -> str:
        if name == "pydantic":
            raise metadata.PackageNotFoundError(name)
        return versions.get(name, "999")

    monkeypatch.setattr(plans.metadata, "version", version)
    assert plans.missing_packages() == ["setuptools>=77", "pydantic>=2.7"]
    facts = {"torch": "2.11", "gpu": "H", "commit": "abc"}
    monkeypatch.setattr(importlib.import_module("machine"), "ask", lambda with_gpu: facts)
    with pytest.raises(SystemExit) as ended:
        gpu_check.main(["--out", str(tmp_path / "out")])
    assert ended.value.code == 2
    assert capsys.readouterr().err == (
        "gpu-check: this Python lacks setuptools>=77, pydantic>=2.7; install them, or pass "
        "--wheels DIR with a folder of their wheels\n"
    )
    build = all_steps("--plan", "short", "--wheels", str(tmp_path))[0]
    assert build.command[:2] == ["bash", "-c"]
    first, second = build.command[2].split(" && ")
    assert first.endswith(f"pip install --no-index --no-deps --upgrade {tmp_path}/*.whl")
    assert second.endswith(f"pip install --no-build-isolation --no-deps --verbose {plans.ROOT}")


# ---- the programs of the short plan, at sizes for a CPU ----


def program(name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(TOOLS / name), "--device", "cpu", *arguments]
    environment = os.environ | plans._beside()
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def test_the_smoke_tests_pass_on_a_cpu() -> None:
    result = program("gpu_smoke.py")
    assert result.returncode == 0, result.stdout + result.stderr
    lines = result.stdout.splitlines()
    assert len(lines) == 7
    assert all(" ok " in line for line in lines[:-1])
    assert lines[-1] == "6 of 6 checks passed"


def test_a_smoke_test_that_fails_is_named_and_the_others_still_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    smoke = module("gpu_smoke")

    def wrong(device: torch.device) -> str:
        return str(smoke.require("float32", float("nan"), 1e-4))

    monkeypatch.setattr(
        smoke, "CHECKS", {"first": wrong, "second": smoke.CHECKS["networks in parallel"]}
    )
    assert smoke.main(["--device", "cpu"]) == 1
    first, second, last = capsys.readouterr().out.splitlines()
    assert "FAILED  CheckError: float32 nan, above 1e-04" in first
    assert " ok " in second
    assert last == "1 of 2 checks passed"


def test_the_profile_names_what_is_slow_and_which_way_is_faster() -> None:
    result = program("gpu_profile.py", "--small")
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.count("| ms | share | launches | kernel |") == 3
    assert len(re.findall(r"; the faster is (convolution|product)$", result.stdout, re.M)) == 4
    assert len(re.findall(r"; the faster is (grouped|one by one)$", result.stdout, re.M)) == 2
    report = steps.tables_in(result.stdout)
    assert report.count("\n\n| ms | share | launches | kernel |\n|---|") == 3
    assert len(re.findall(r"^## ", report, re.MULTILINE)) == 4
    assert report.count("; the faster is ") == 6


def test_the_ratios_compare_with_plain_pytorch_by_turns() -> None:
    result = program("gpu_ratios.py", "--small", "--seconds", "1")
    assert result.returncode == 0, result.stdout + result.stderr
    ratios = module("gpu_ratios")
    tables = steps.tables_in(result.stdout)
    for name in (*ratios.UNROLL, *ratios.STEP):
        assert f"{name}: ready after" in result.stdout
        assert re.search(rf"^\| {re.escape(name)} \| [\d.]+ \| ", tables, re.MULTILINE)
    assert "FAILED" not in result.stdout
    assert tables.count("## ") == len(ratios.SMALL) == tables.count("times ours")
