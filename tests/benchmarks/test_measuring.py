"""The benchmarks' baselines compute what they claim to, and what is measured, counted and concluded
is right. No timing is held to anything here. The command is tested in test_bench_command.py."""

from __future__ import annotations

import json
import os
import re
import sys
import warnings
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from pdd_fast.benchmarks import (
    dsa,
    implementations,
    machine,
    measure,
    processes,
    results,
    roofline,
    roofline_counts,
    worker,
)
from pdd_fast.benchmarks import unroll as unroll_benchmark
from pdd_fast.benchmarks.cases import parse
from pdd_fast.benchmarks.measure import Job
from pdd_fast.benchmarks.processes import Outcome
from pdd_fast.ops._native import MissingKernelsWarning


@pytest.fixture
def _in_haste(monkeypatch: pytest.MonkeyPatch) -> None:
    repeated = partial(measure.repeated, budget=0.0)
    few = partial(measure.seconds_per_call, at_least=1e-4)
    monkeypatch.setattr(measure, "repeated", lambda call, device, **more: repeated(call, device))
    monkeypatch.setattr(
        measure, "seconds_per_call", lambda call, device, at_least=0.0: few(call, device)
    )
    monkeypatch.setattr(roofline, "AT_LEAST", 1e-4)


# ---- measuring ----


@pytest.mark.usefixtures("_in_haste")
def test_every_implementation_of_every_kind_can_be_measured(
    device: torch.device, tmp_path: Path
) -> None:
    job = Job(device, tmp_path)
    for name in (
        "unroll-b4-n2-w4-s8-dsa",
        "gradient-matching-b4-r3-k3-w4-s8",
        "step-b4-w4-s8",
        "dsa-multiple-b4-s8",
        "evaluate-w4-e1",
        "stage-n2-i1-w4",
    ):
        case = parse(name)
        if errors := results.KINDS[case.kind].errors:
            worker.work(case, implementations.TRUTH, job)
        for implementation in implementations.implementations(case, device.type):
            if implementation.compiles:  # half a minute each
                continue
            found = worker.work(case, implementation.name, job)
            assert set(found["seconds"]) == set(results.KINDS[case.kind].parts), implementation.name
            assert all(each and min(each) > 0 for each in found["seconds"].values())
            assert found["peak_bytes"] > 0
            assert found["above_start_bytes"] >= 0
            if errors:
                assert tuple(found["error"]) == errors
                # On a GPU convolutions take TF32 unless a flag says otherwise.
                exact = (
                    0.5
                    if implementation.precision == "bfloat16"
                    else 0.05
                    if device.type == "cuda"
                    else 1e-4
                )
                assert (found["error"]["images"] < exact) == implementation.exact, (
                    implementation.name
                )
        json.dumps(found)


@pytest.mark.parametrize("device_type", ["cpu", "cuda"])
def test_the_first_implementation_of_every_precision_is_ours(device_type: str) -> None:
    for name in ("unroll", "gradient-matching", "step", "dsa", "evaluate", "stage"):
        every = implementations.implementations(parse(name), device_type)
        assert len({c.name for c in every}) == len(every) > 1
        assert every[0].ours
        for precision in {c.precision for c in every}:
            assert any(c.ours for c in every if c.precision == precision), (name, precision)


def test_errors_are_of_both_gradients() -> None:
    truth = (torch.tensor([[3.0, 4.0]]).double(), torch.tensor(2.0).double())
    found = unroll_benchmark.errors((torch.tensor([[3.0, -4.0]]), torch.tensor(2.5)), truth)
    assert found == {
        "images": pytest.approx(8 / 5),
        "cosine": pytest.approx(-7 / 25),
        "rate": pytest.approx(0.25),
    }
    lost = unroll_benchmark.errors((torch.tensor([[float("nan"), 4.0]]), torch.tensor(2.0)), truth)
    assert lost == {"images": None, "cosine": None, "rate": 0}


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self/status")
def test_memory_is_what_came_after_the_start() -> None:
    torch.ones(60_000_000)  # freed: it is no part of what comes
    memory = measure.Memory(torch.device("cpu"))
    held = torch.ones(25_000_000)
    found = memory.found()
    assert 95e6 < found["above_start_bytes"] < 200e6
    assert found["peak_bytes"] > found["above_start_bytes"] + held.numel()


def test_all_operations_are_among_what_dsa_times() -> None:
    draw = dsa.drawing(True, parse("dsa-single-b2-s8"), torch.device("cpu"))
    images = torch.randn(2, 3, 8, 8)
    assert draw()(images).shape == images.shape
    operations = {
        dsa.drawing(False, parse("dsa-flip-b2-s8"), torch.device("cpu"))().operations
        for _ in range(5)
    }  # type: ignore[attr-defined]
    assert operations == {("flip",)}


# ---- the roofline ----


def test_the_floor_counts_operations_and_bytes() -> None:
    case = parse("unroll-b10-n5-w128-s32")
    layers = roofline_counts.layers(case)
    multiplications = [32 * 32 * 3 * 128, 16 * 16 * 128 * 128, 8 * 8 * 128 * 128]
    assert [layer.operations() for layer in layers] == [10 * 2 * 9 * m for m in multiplications]
    assert [layer.results() for layer in layers] == [10 * 128 * p for p in (1024, 256, 64)]

    # By hand, in multiplications of one image: forward, input gradients and weight gradients at
    # rates of their own.
    first, rest = multiplications[0], sum(multiplications[1:])
    kept = (
        (2 * first + 3 * rest) / 1e9 + (2 * first + 3 * rest) / 2e9 + (2 * first + 3 * rest) / 4e9
    )
    again = kept + (first + rest) / 1e9 + rest / 2e9
    rates = {"forward": 1e9, "input gradient": 2e9, "weight gradient": 4e9}
    found = roofline_counts.rooflines(
        case, {"convolution": {"bfloat16": [rates] * 3}, "copy": 1e8}, "bfloat16"
    )["iteration"]
    bytes_of_one = 10.5 * 10 * 128 * (1024 + 256 + 64) * 2
    for label, seconds in (("9 F", kept), ("11 F", again)):
        assert found[label] == pytest.approx(5 * (10 * 18 * seconds + bytes_of_one / 1e8))
    assert roofline_counts.rooflines(case, {"convolution": {}, "copy": 1e8}, "float32") == {}


def test_counts_of_convolutions_have_the_names_they_should() -> None:
    for label, (_, others) in roofline_counts.COUNTS.items():
        assert f"{sum(others) if label != '11 F' else 11} F" == label
    step = roofline_counts.rooflines(
        parse("step-b10-w128-s32"),
        {"convolution": {"float32": [dict.fromkeys(roofline_counts.KINDS, 1e9)] * 3}, "copy": 1e30},
        "float32",
    )
    first, rest = 32 * 32 * 3 * 128, (16 * 16 + 8 * 8) * 128 * 128
    assert step["step"]["3 F"] == pytest.approx(10 * 18 * (2 * first + 3 * rest) / 1e9)


def test_the_floor_of_gradient_matching_counts_real_and_synthetic_images() -> None:
    case = parse("gradient-matching-b10-r4-k3-w128-s32")
    first, rest = 32 * 32 * 3 * 128, (16 * 16 + 8 * 8) * 128 * 128  # multiplications of one image
    rates = {"forward": 1e9, "input gradient": 2e9, "weight gradient": 4e9}
    synthetic = (2 * first + 3 * rest) / 1e9 + (2 * first + 3 * rest) / 2e9 + (first + rest) / 4e9
    real = (first + rest) / 1e9 + rest / 2e9 + (first + rest) / 4e9
    numbers = 128 * (1024 + 256 + 64) * 4 / 1e8  # seconds of one pass over one image
    found = roofline_counts.rooflines(
        case, {"convolution": {"float32": [rates] * 3}, "copy": 1e8}, "float32"
    )["gradient"]
    expected = 3 * (10 * (18 * synthetic + 10.5 * numbers) + 4 * (18 * real + 3.5 * numbers))
    assert found == {"7 F + 3 F": pytest.approx(expected)}
    assert roofline_counts.passes_in_words("7 F + 3 F") == "10.5 + 3.5 passes"


def test_the_floor_of_dsa_is_bytes() -> None:
    found = roofline_counts.rooflines(parse("dsa-color-b20"), {"copy": 1e9}, "float32")
    assert found["forward"]["copy"] == pytest.approx(2 * 4 * 20 * 3 * 32 * 32 / 1e9)
    assert found["forward and backward"]["copy"] == pytest.approx(2 * found["forward"]["copy"])


@pytest.mark.usefixtures("_in_haste")
def test_rates_are_measured_of_every_layer_and_kind(device: torch.device, tmp_path: Path) -> None:
    case = parse("step-b2-w4-s8")
    found = worker.work(case, implementations.ROOFLINE, Job(device, tmp_path))
    assert found["copy"] > 1e6
    for layers in found["convolution"].values():
        assert len(layers) == case.depth
        assert all(
            set(rates) == set(roofline_counts.KINDS) and min(rates.values()) > 1e3
            for rates in layers
        )


def test_of_several_measurements_of_the_rates_the_best_count() -> None:
    first = {"copy": 1.0, "convolution": {"float32": [{"forward": 5.0, "input gradient": 1.0}]}}
    second = {"copy": 2.0, "convolution": {"float32": [{"forward": 4.0, "input gradient": 3.0}]}}
    found = roofline_counts.best([first, second])
    assert found == {
        "copy": 2.0,
        "convolution": {"float32": [{"forward": 5.0, "input gradient": 3.0}]},
    }
    assert roofline_counts.best([{"copy": 1.0}]) == {"copy": 1.0}


LIMITED = """
import json
import torch
from pdd_fast.benchmarks import worker, measure
measure.host.free = lambda: 200_000_000
measure.refuse_too_much()
print(json.dumps(worker.answered(lambda: {"there": torch.ones(300_000_000).sum()})))
"""


PROGRAMS = {
    "limit": LIMITED,
    "kill": "import os; os.kill(os.getpid(), 9)",
    "hang": (
        "import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', 'import time; "
        "time.sleep(60)']); time.sleep(60)"
    ),
    "wrong": "raise ValueError('what went wrong')",
    "abort": (
        "import os, sys; print('terminate called after throwing std::bad_alloc', "
        "file=sys.stderr); os.abort()"
    ),
    "silent": "print('a remark')",
}


# ---- one process a measurement ----


@pytest.mark.parametrize(
    ("name", "failed", "why"),
    [
        ("limit", "out of memory", r"asked for 1.20 GB more with \d+ MB taken"),
        ("kill", "out of memory", "was killed"),
        ("abort", "out of memory", "did not say"),
        ("hang", "too slow", "took more than 1 s"),
        ("wrong", "failed", "ValueError: what went wrong"),
        ("silent", "failed", "gave no numbers"),
    ],
)
def test_what_keeps_a_implementation_from_a_result_is_said(
    name: str, failed: str, why: str
) -> None:
    if name == "limit" and not sys.platform.startswith("linux"):
        pytest.skip("only Linux says what there is")
    calls = []

    def run(implementation: str) -> dict[str, Any]:
        calls.append(implementation)
        return processes.run(
            [sys.executable, "-P", "-c", PROGRAMS[implementation]], 1 if name == "hang" else 60
        )

    outcomes = {name: Outcome()}
    assert list(processes.in_turn([name], run, 2, outcomes)) == [name, name]
    assert calls == [name]  # not tried again
    result = outcomes[name].failed
    assert result is not None
    assert result["failed"] == failed
    assert re.search(why, result["why"])
    assert outcomes[name].is_wrong == (failed == "failed")


def test_an_answer_is_the_last_line() -> None:
    program = "print('a remark'); print('{\"seconds\": 2.0}')"
    assert processes.run([sys.executable, "-c", program], 60) == {"seconds": 2.0}


def test_a_process_that_is_asked_says_what_it_cannot_do() -> None:
    def slower() -> dict[str, Any]:
        warnings.warn("there are no kernels", MissingKernelsWarning, stacklevel=1)
        return {}

    assert worker.answered(slower) == {"failed": "not available", "why": "there are no kernels"}
    found = worker.answered(lambda: {"x": torch.empty(2**62, dtype=torch.uint8)})
    assert found["failed"] == "out of memory"
    assert re.match(r"asked for 46116860\d+.\d+ GB more with ", found["why"])
    with pytest.raises(ValueError, match="what went wrong"):
        worker.answered(lambda: exec("raise ValueError('what went wrong')"))  # type: ignore[func-returns-value]


def test_a_signal_has_a_name() -> None:
    found = processes.run([sys.executable, "-c", "import os; os.kill(os.getpid(), 11)"], 60)
    assert (found["failed"], found["why"]) == ("failed", "was ended by SIGSEGV")


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has"),
            "asked for 2.00 GiB",
        ),
        (
            RuntimeError(
                "DefaultCPUAllocator: can't allocate memory: you tried to allocate 12000000 bytes."
            ),
            "12 MB",
        ),
        (RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), "did not say"),
        (RuntimeError("std::bad_alloc"), "did not say"),
        (MemoryError(), "did not say"),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), None),
    ],
)
def test_running_out_of_memory_is_told_from_other_errors(
    error: Exception, said: str | None
) -> None:
    found = measure.out_of_memory(error)
    assert found is None if said is None else said in found


def timed(*rounds: list[float], memory: int = 100, **more: Any) -> Outcome:
    return Outcome(
        [
            {"seconds": {"step": each}, "peak_bytes": memory, "above_start_bytes": memory, **more}
            for each in rounds
        ]
    )


# ---- results ----


def test_ratios_are_medians_over_rounds_and_all_iterations_make_the_spread() -> None:
    case = parse("step-b4-w4-s8")
    own, direct, eager, *_ = implementations.implementations(case, "cpu")
    outcomes = {
        own.name: timed([1.0], [2.0], [4.0], memory=20),
        direct.name: Outcome(
            failed={"failed": "failed", "why": "it did"}, samples=timed([1.0]).samples
        ),
        eager.name: timed([3.0, 4.0, 3.0], [4.0, 5.0, 4.0], [4.0, 5.0, 4.0], memory=50),
    }
    found = results.summary(case, [own, direct, eager], outcomes)["results"]
    seconds = found[eager.name]["seconds"]["step"]
    assert (seconds["median"], seconds["smallest"], seconds["largest"]) == (4.0, 3.0, 5.0)
    assert seconds["times_ours"] == 2.0
    assert seconds["over_floor"] == {}
    assert found[own.name]["seconds"]["step"]["times_ours"] == 1.0
    assert found[eager.name]["peak_bytes"] == 50
    assert found[direct.name]["failed"] == "failed"
    assert found[direct.name]["samples"]
    assert "seconds" not in found[direct.name]


def test_the_best_alternative_is_the_fastest_exact_baseline() -> None:
    case = parse("unroll-b4-n2-w4-s8")
    every = {c.name: c for c in implementations.implementations(case, "cpu")}
    names = [
        "ours, recompute, auto",
        "ours, cache, auto",
        "plain autograd",
        "checkpointed autograd",
        "frozen weights",
    ]
    chosen = [every[name] for name in names]
    seconds = dict(zip(names, (2.0, 1.0, 5.0, 4.0, 0.5), strict=True))
    outcomes = {
        name: Outcome(
            [{"seconds": {"iteration": [s]}, "peak_bytes": 9, "above_start_bytes": int(10 * s)}]
        )
        for name, s in seconds.items()
    }
    outcomes["plain autograd"] = Outcome(failed={"failed": "out of memory", "why": "asked"})
    (found,) = results.summary(case, chosen, outcomes)["alternatives"]
    assert (found["baseline"], found["seconds"]) == ("checkpointed autograd", 4.0)
    assert found["without"] == ["plain autograd"]
    assert found["ours"] == {
        "name": "ours, recompute, auto",
        "seconds": 2.0,
        "times_as_fast": 2.0,
        "share_of_memory": 0.5,
    }
    assert found["fastest of ours"]["name"] == "ours, cache, auto"
    assert found["fastest of ours"]["times_as_fast"] == 4.0


def test_ours_of_the_same_precision_is_compared_with() -> None:
    case = parse("step-b4-w4-s8")
    every = implementations.implementations(case, "cuda")
    outcomes = {c.name: timed([1.0 if c.precision == "float32" else 0.5]) for c in every}
    found = results.summary(case, every, outcomes)
    assert {r["seconds"]["step"]["times_ours"] for r in found["results"].values()} == {1.0}
    assert [a["precision"] for a in found["alternatives"]] == ["float32", "tf32"]


def test_over_the_floor_is_over_the_sum() -> None:
    case = parse("step-b10-w8-s8")
    own = implementations.implementations(case, "cpu")[0]
    rates = {
        "copy": 1e9,
        "convolution": {"float32": [dict.fromkeys(roofline_counts.KINDS, 1e9)] * case.depth},
    }
    bound = roofline_counts.rooflines(case, rates, "float32")["step"]["3 F"]
    outcomes = {implementations.ROOFLINE: Outcome([rates]), own.name: timed([3 * bound])}
    found = results.summary(case, [own], outcomes)
    assert found["results"][own.name]["seconds"]["step"]["over_floor"] == {"3 F": pytest.approx(3)}
    assert found["roofline"]["rates"] == rates


def test_rounds_go_through_all_implementations_in_turn() -> None:
    calls: list[str] = []

    def run(name: str) -> dict[str, Any]:
        calls.append(name)
        return {"n": len(calls)}

    outcomes = {"a": Outcome(), "b": Outcome()}
    list(processes.in_turn(["a", "b"], run, 2, outcomes))
    assert calls == ["a", "b", "a", "b"]
    assert [sample["n"] for sample in outcomes["b"].samples] == [2, 4]


# ---- the machine ----


def test_the_commit_is_given_found_or_unknown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PDD_FAST_COMMIT", "abc123")
    assert machine.commit() == "abc123"
    monkeypatch.delenv("PDD_FAST_COMMIT")
    inside = tmp_path / "copy"
    inside.mkdir()
    monkeypatch.setattr(machine, "ROOT", inside)
    monkeypatch.setattr(machine, "installed_from", dict)
    assert machine.commit() == "unknown"
    if machine.said("git", "init", str(tmp_path)):  # of another repository
        assert machine.commit() == "unknown"
        who = ["-c", "user.name=a", "-c", "user.email=a@b"]
        machine.said("git", "-C", str(tmp_path), *who, "commit", "--allow-empty", "-m", "first")
        origin = {"url": tmp_path.as_uri()}
        monkeypatch.setattr(machine, "installed_from", lambda: origin)
        assert re.fullmatch(
            r"[0-9a-f]{7,} \(the folder that was installed from, now\)", machine.commit()
        )
    monkeypatch.setattr(
        machine, "installed_from", lambda: {"url": "x", "vcs_info": {"commit_id": "def456"}}
    )
    assert machine.commit() == "def456"


def test_a_machine_is_described_without_being_asked_for_more() -> None:
    found = machine.ask(with_gpu=False, threads=3)
    assert {"cpu", "cores", "memory", "torch", "python", "pdd_fast", "commit"} <= found.keys()
    assert found["threads"] == 3
    assert found["memory"] > 1e8
    assert os.cpu_count() == found["cores"]


def test_a_case_can_be_changed_and_named_again() -> None:
    case = parse("unroll-b4-n2-w4-s8")
    assert replace(case, steps=7).name == "unroll-b4-n7-w4-s8"
