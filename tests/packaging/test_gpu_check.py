"""tools/gpu_check.py without a GPU: what it says then, and its runner on steps that are made up."""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from gpu_tools import ROOT, TOOLS, all_steps, gpu_check, module, plans, steps


def step(name: str, program: str, limit: float = 60, **more: Any) -> Any:
    return steps.Step(name, [sys.executable, "-I", "-c", program], limit, **more)


def run_all(made_up: Sequence[Any], folder: Path, budget: float = 600) -> Any:
    report = steps.Report("A check", {"gpu": "none", "commit": "abc"}, [], folder)
    steps.run_all(made_up, report, budget)
    return report


def outcomes(folder: Path) -> dict[str, str]:
    record = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    return {found["name"]: found["outcome"] for found in record["steps"]}


def test_the_version_is_that_of_the_sources() -> None:
    assert gpu_check.version() == f"pdd-fast {importlib.import_module('pdd_fast').__version__}"


# ---- without a GPU ----


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_one_sentence_and_status_2(tmp_path: Path) -> None:
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONSAFEPATH"}
    command = [sys.executable, str(TOOLS / "gpu_check.py"), "--out", str(tmp_path / "out")]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert result.stderr == (
        f"gpu-check: torch {torch.__version__} finds no GPU here; run this where "
        f"nvidia-smi lists one\n"
    )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("facts", "sentence"),
    [
        ({"torch": None}, "torch does not import in"),
        ({"torch": "2.11"}, "torch 2.11 finds no GPU here"),
        ({"torch": "2.11", "gpu": "H"}, "there is no nvcc on PATH, in CUDA_HOME or in /no/cuda"),
    ],
)
def test_what_is_missing_is_said(
    facts: dict[str, Any],
    sentence: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(
        importlib.import_module("machine"), "ask", lambda with_gpu: facts | {"commit": "abc"}
    )
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CUDA_HOME", raising=False)
    monkeypatch.setattr(plans, "CUDA_DEFAULT", "/no/cuda")
    monkeypatch.setattr(plans, "missing_packages", list)
    with pytest.raises(SystemExit) as ended:
        gpu_check.main(["--out", str(tmp_path / "out")])
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith(f"gpu-check: {sentence}")
    assert error.count("\n") == 1


def test_make_calls_it() -> None:
    recipe = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert ".PHONY: gpu-check" in recipe
    assert "tools/gpu_check.py --out" in recipe


# ---- what is run ----


def tool(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("#!/bin/sh\n")
    path.chmod(0o755)
    return path


@pytest.mark.parametrize("place", ["bin/compute-sanitizer", "compute-sanitizer/compute-sanitizer"])
@pytest.mark.parametrize("known", ["CUDA_HOME", "PATH", "a link on PATH", "default"])
def test_a_tool_is_found_wherever_toolkits_keep_it(
    place: str, known: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    toolkit, elsewhere = tmp_path / "cuda", tmp_path / "links"
    nvcc, wanted = tool(toolkit / "bin" / "nvcc"), tool(toolkit / place)
    elsewhere.mkdir()
    monkeypatch.delenv("CUDA_HOME", raising=False)
    monkeypatch.setenv("PATH", str(elsewhere))
    monkeypatch.setattr(plans, "CUDA_DEFAULT", str(toolkit if known == "default" else "no"))
    if known == "CUDA_HOME":
        monkeypatch.setenv("CUDA_HOME", str(toolkit))
    elif known == "PATH":
        monkeypatch.setenv("PATH", str(nvcc.parent))
    elif known == "a link on PATH":
        (elsewhere / "nvcc").symlink_to(nvcc)
    assert plans.find_tool("nvcc") is not None
    assert Path(plans.find_tool("compute-sanitizer")).resolve() == wanted
    assert plans.find_tool("ncu") is None


def test_the_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PDD_FAST_CUDA_ARCHS", raising=False)
    monkeypatch.setattr(plans, "find_tool", lambda name: f"/cuda/bin/{name}")
    found = {step.name: step for step in all_steps()}
    assert list(found) == [
        "build",
        "build and environment",
        "tests on the GPU",
        "memcheck",
        "memcheck sees a planted mistake",
        "racecheck",
        "initcheck",
        "initcheck sees a planted mistake",
        "synccheck",
        "bench unroll-b20-n50-w128-s32-dsa",
        "bench unroll-b100-n30-w128-s32-dsa",
        "bench unroll-b256-n20-w128-s32-dsa",
        "bench step-b256-w128-s32-dsa",
        "bench gradient-matching-b128-r64-k10-w128-s32",
        "bench dsa-single-b256",
    ]
    assert found["build"].environment == {"PDD_FAST_CUDA": "1", "PDD_FAST_CUDA_ARCHS": "90"}
    assert found["memcheck"].environment == {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    assert list(found["racecheck"].command[:3]) == [
        "/cuda/bin/compute-sanitizer",
        "--tool",
        "racecheck",
    ]
    assert not any(step.missing for step in found.values())
    assert "build" not in [step.name for step in all_steps("--skip-build")]
    assert all_steps("--all-tests")[-1].name == "all other tests"
    monkeypatch.setenv("PDD_FAST_CUDA_ARCHS", "80,90")  # which the build then finds by itself
    assert all_steps()[0].environment == {"PDD_FAST_CUDA": "1"}


def test_every_program_that_is_run_exists() -> None:
    scripts = [
        part for step in all_steps("--all-tests") for part in step.command if part.endswith(".py")
    ]
    assert len(scripts) == 6
    assert all(Path(script).is_file() for script in scripts)


def test_every_benchmark_is_called_as_it_wants_to_be(tmp_path: Path) -> None:
    from pdd_fast.benchmarks import implementations
    from pdd_fast.benchmarks.cases import parse
    from pdd_fast.cli.bench import command

    for step in plans.benchmark_steps(tmp_path):
        arguments = list(step.command[step.command.index("bench") + 1 :])
        asked = command.make_context("bench", arguments).params
        (name,) = asked["named"]
        assert asked["device"] == "cuda"
        every = implementations.implementations(parse(name), "cuda")
        implementations.check([every], asked["implementation"], asked["without"])
        assert asked["limit"] < step.limit


def test_without_compute_sanitizer_its_steps_are_not_green(tmp_path: Path) -> None:
    found = plans.sanitizer_steps(None)
    report = run_all(found, tmp_path)
    assert len(found) == 6
    assert set(outcomes(tmp_path).values()) == {"not found"}
    assert not report.green
    assert "compute-sanitizer is not on PATH" in (tmp_path / "report.md").read_text()


def test_steps_are_chosen_by_how_their_names_begin(capsys: pytest.CaptureFixture[str]) -> None:
    made_up = [step(name, "") for name in ("build", "iteration 1x1", "iteration 2x2", "memcheck")]
    names = lambda only, skip: [s.name for s in gpu_check.chosen(made_up, only, skip)]  # noqa: E731
    assert names([], []) == ["build", "iteration 1x1", "iteration 2x2", "memcheck"]
    assert names(["iteration", "build"], []) == ["build", "iteration 1x1", "iteration 2x2"]
    assert names(["iteration"], ["iteration 1x1"]) == ["iteration 2x2"]
    with pytest.raises(SystemExit) as ended:
        gpu_check.chosen(made_up, [], ["profile"])
    assert ended.value.code == 2
    said = (
        "gpu-check: there is no step 'profile'; the steps are: build; iteration 1x1; "
        "iteration 2x2; memcheck\n"
    )
    assert capsys.readouterr().err == said


@pytest.mark.parametrize(("option", "on_gpu"), [("only", True), ("no", False)])
def test_tests_that_need_a_gpu_are_told_from_the_rest(option: str, on_gpu: bool) -> None:
    files = [
        str(ROOT / "tests" / name) for name in ("ops/test_ops.py", "packaging/test_gpu_check.py")
    ]
    command = [
        sys.executable,
        "-m",
        "pytest",
        "--collect-only",
        "-p",
        "no:cacheprovider",
        "-p",
        "gpu_tests",
        "-c",
    ]
    command += [str(ROOT / "pyproject.toml"), f"--gpu={option}", *files]
    path = os.pathsep.join([str(TOOLS), os.environ.get("PYTHONPATH", "")])
    result = subprocess.run(
        command, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr
    tests = [line for line in result.stdout.splitlines() if "::" in line]
    assert len(tests) > 10
    assert all(("[cuda" in test) == on_gpu for test in tests)


def test_what_the_sanitizers_run_calls_every_operator_and_sees_wrong_results(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import cases

    driver = module("sanitizer_driver")
    assert {operator.name for operator, _ in driver.calls()} == {
        operator.name for operator in cases.OPERATORS
    }
    monkeypatch.setattr(cases, "OPERATORS", [cases.OPERATORS[-1]])
    assert driver.run(torch.device("cpu")) == len(list(driver.calls())) > 3
    monkeypatch.setattr(cases, "relative_error", lambda found, expected: float("nan"))
    with pytest.raises(ArithmeticError, match="a result is off by nan"):
        driver.run(torch.device("cpu"))


def test_inputs_are_copied_as_they_lie(device: torch.device) -> None:
    tensor = torch.arange(60.0).view(3, 4, 5)[1:, ::2, 1:].expand(2, 2, 4)
    found = module("sanitizer_driver").as_it_lies(tensor, device)
    assert found.stride() == tensor.stride()
    assert torch.equal(found.cpu(), tensor)


# ---- the runner ----


def test_all_green(tmp_path: Path) -> None:
    report = run_all(
        [
            step("One, first", "print('| a | b |\\n|---|---|\\n| 1 | 2 |\\nnoise')", tables=True),
            step("two", "print('7 passed')", says=r"\d passed"),
        ],
        tmp_path,
    )
    assert report.green
    record = json.loads((tmp_path / "report.json").read_text())
    assert record["green"]
    assert record["facts"] == {"gpu": "none", "commit": "abc"}
    assert [found["log"] for found in record["steps"]] == ["one-first.log", "two.log"]
    assert all(found["status"] == 0 and 0 < found["seconds"] < 60 for found in record["steps"])
    assert (tmp_path / "two.log").read_text() == "7 passed\n"
    text = (tmp_path / "report.md").read_text()
    assert text.startswith("# A check: green\n")
    assert "| commit | abc |" in text
    assert "## One, first\n\n| a | b |\n|---|---|\n| 1 | 2 |\n" in text
    assert "noise" not in text


def test_of_a_benchmarks_log_tables_captions_and_conclusions_are_kept() -> None:
    log = (
        "step-b4-w4-s8: 1/5 measurements  4 s/measurement\nstep-b4-w4-s8: PyTorch, compiled: "
        "failed: SomeError\n"
        "step-b4-w4-s8: one training step: 4 images\n\n| a |\n|---|\n\nFloor: 3 F.\n\n"
        "Best exact alternative in float32: x.\n"
    )
    assert steps.tables_in(log) == (
        "step-b4-w4-s8: one training step: 4 images\n\n| a |\n|---|\n\nBest exact alternative in "
        "float32: x.\n"
    )


def test_a_step_that_fails_does_not_stop_the_next(tmp_path: Path) -> None:
    made_up = [
        step("fails", "import sys; print('the reason'); sys.exit(3)"),
        step("says nothing", "", says="0 errors"),
        step("is not there", ""),
        step(
            "means to fail", "import sys; print('seen'); sys.exit(9)", says="seen", any_status=True
        ),
        step(
            "has a setting",
            "import os; assert os.environ['A_SETTING'] == '1'",
            environment={"A_SETTING": "1"},
        ),
    ]
    made_up[2] = steps.Step("is not there", [str(tmp_path / "missing")], 60)
    report = run_all(made_up, tmp_path)
    assert not report.green
    assert list(outcomes(tmp_path).values()) == ["failed", "failed", "failed", "ok", "ok"]
    notes = [result.note for result in report.results]
    assert notes[1] == "its output does not say '0 errors'"
    assert "No such file" in notes[2]
    text = (tmp_path / "report.md").read_text()
    assert text.startswith("# A check: NOT green\n")
    assert "## fails: the end of fails.log\n\n    the reason\n" in text


def test_a_step_that_takes_too_long_is_ended_with_what_it_started(tmp_path: Path) -> None:
    program = (
        "import subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-I', '-c', 'import time; time.sleep(60)'])\n"
        "print(child.pid, flush=True); time.sleep(60)\n"
    )
    report = run_all([step("slow", program, limit=2), step("next", "")], tmp_path)
    assert list(outcomes(tmp_path).values()) == ["timed out", "ok"]
    assert 2 <= report.results[0].seconds < 30
    assert not alive(int((tmp_path / "slow.log").read_text()))


def alive(pid: int) -> bool:
    status = Path(f"/proc/{pid}/stat")
    return status.exists() and status.read_text().rpartition(")")[2].split()[0] != "Z"


def test_when_the_budget_is_over_the_rest_is_not_run(tmp_path: Path) -> None:
    made_up = [step("slow", "import time; time.sleep(60)"), step("next", ""), step("last", "")]
    report = run_all(made_up, tmp_path, budget=2)
    assert list(outcomes(tmp_path).values()) == ["timed out", "not run", "not run"]
    assert {result.note for result in report.results} == {"the 2 seconds were over"}
    assert not report.green


RUNNER = """
import sys
sys.path.append(sys.argv[1])
import gpu_check
from steps import Step
gpu_check.preflight = lambda args: {"commit": "abc"}
second = "import time; print('begun', flush=True); time.sleep(20)"
commands = {"first": "print('done')", "second": second, "third": ""}
gpu_check.plans.PLANS["full"] = lambda args, facts: [
    Step(n, [sys.executable, "-I", "-c", c], 60) for n, c in commands.items()
]
sys.exit(gpu_check.main(sys.argv[2:]))
"""


def begun(log: Path) -> bool:
    return log.exists() and log.read_text() == "begun\n"


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGKILL])
def test_an_interruption_leaves_the_report_so_far(sent: signal.Signals, tmp_path: Path) -> None:
    command = [sys.executable, "-c", RUNNER, str(TOOLS), "--out", str(tmp_path)]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        until = time.monotonic() + 60
        while not begun(tmp_path / "second.log") and time.monotonic() < until:
            time.sleep(0.05)
        process.send_signal(sent)
        process.wait(60)
    lost = sent == signal.SIGKILL  # as when the machine goes
    assert process.returncode == (-sent if lost else 130)
    assert outcomes(tmp_path) == {
        "first": "ok",
        "second": "running" if lost else "interrupted",
        "third": "not run",
    }
    assert "| first | ok |" in (tmp_path / "report.md").read_text()


@pytest.mark.parametrize(("program", "status"), [("", 0), ("raise SystemExit(1)", 1)])
def test_the_exit_status_is_that_of_the_report(
    program: str,
    status: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(gpu_check, "preflight", lambda args: {"commit": "abc"})
    made_up = [step("only", program), step("other", "")]
    monkeypatch.setitem(plans.PLANS, "full", lambda args, facts: made_up)
    monkeypatch.setenv("PDD_FAST_COMMIT", "set again afterwards")
    monkeypatch.chdir(tmp_path)
    assert gpu_check.main(["--out", "here", "--skip", "other"]) == status
    assert outcomes(tmp_path / "here") == {"only": "failed" if status else "ok"}
    said = capsys.readouterr().out
    assert said.endswith(
        f"{'NOT green' if status else 'green'}: {tmp_path / 'here' / 'report.md'}\n"
    )


def test_steps_side_by_side_run_at_the_same_time(tmp_path: Path) -> None:
    """Each waits for the file that the other makes."""

    def waiting(own: str, other: str) -> str:
        return (
            "import pathlib, time\n"
            f"pathlib.Path({str(tmp_path / own)!r}).touch()\n"
            f"while not pathlib.Path({str(tmp_path / other)!r}).exists(): time.sleep(0.02)\n"
            f"print({own!r})\n"
        )

    made_up = [
        step("first", waiting("a", "b")),
        step("second", waiting("b", "a"), beside=True),
        step("third", "print('after both')"),
    ]
    report = run_all(made_up, tmp_path)
    assert outcomes(tmp_path) == {"first": "ok", "second": "ok", "third": "ok"}
    assert report.green
    assert (tmp_path / "second.log").read_text() == "b\n"


def test_a_step_beside_another_ends_with_its_own_limit(tmp_path: Path) -> None:
    slow = step("slow", "import time; time.sleep(60)", limit=1, beside=True)
    report = run_all([step("quick", ""), slow], tmp_path)
    assert outcomes(tmp_path) == {"quick": "ok", "slow": "timed out"}
    assert report.results[1].seconds < 30
