"""Test `pdd-fast bench`: its choice of cases, its files and answers, and interruptions.

All but two tests make up their measurements.
"""

from __future__ import annotations

import json
import signal
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from bench_command_support import bench, made_up, record_in, seconds
from command import process

from pdd_fast.benchmarks import plot, tables

# ---- interruptions ----


def test_an_interrupted_benchmark_keeps_and_shows_what_it_measured(
    answers: Any, tmp_path: Path
) -> None:
    calls: list[str] = []

    def answer(case: str, name: str) -> dict[str, Any]:
        calls.append(name)
        if len(calls) == 5:
            raise KeyboardInterrupt
        before = tmp_path / "bench.json"
        assert (
            json.loads(before.read_text())["finished"] is False
        )  # written after every measurement
        if len(calls) > 1:
            kept = record_in(tmp_path)["cases"]["unroll-b4-n2-w4-s8"]
            assert sum(len(r.get("samples", ())) for r in kept["results"].values()) == max(
                0, len(calls) - 3
            )
        return made_up(case, name)

    answers(answer)
    outcome = bench(tmp_path, "--case", "unroll-b4-n2-w4-s8", "--case", "stage")
    assert outcome.status == 130
    assert outcome.err.endswith("pdd-fast: interrupted\n")
    record = record_in(tmp_path)
    assert not record["finished"]
    assert list(record["cases"]) == ["unroll-b4-n2-w4-s8"]
    results = record["cases"]["unroll-b4-n2-w4-s8"]["results"]
    assert [len(r.get("samples", ())) for r in results.values()][:4] == [1, 1, 0, 0]
    assert "| not run: the benchmark ended before |" in outcome.out
    assert "| 2.5 s " in outcome.out
    assert (tmp_path / "bench.png").exists()
    assert "(not finished)" in (tmp_path / "bench.md").read_text(encoding="utf-8")
    assert str(tmp_path / "bench.json") in outcome.out


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks for processes in /proc")
def test_a_signal_ends_the_measurement_too(tmp_path: Path) -> None:
    arguments = (
        "--case",
        "stage-i9000",
        "--implementation",
        "ours, direct",
        "--device",
        "cpu",
        "--threads",
        "1",
    )
    with process("bench", *arguments, "--output", tmp_path / "out") as running:
        until = time.monotonic() + 60
        while (
            not (started := children_of(running.pid, "pdd_fast.benchmarks.worker"))
            and time.monotonic() < until
        ):
            time.sleep(0.05)
        running.send_signal(signal.SIGINT)
        _, err = running.communicate(timeout=60)
    assert started
    assert running.returncode == 130
    assert err.endswith("pdd-fast: interrupted\n")
    assert not record_in(tmp_path / "out")["finished"]
    assert all(not Path(f"/proc/{pid}").exists() for pid in started)


def children_of(pid: int, text: str) -> list[int]:
    """The processes that a process has started with ``text`` in their command."""
    found = []
    for entry in Path("/proc").glob("[1-9]*"):
        with suppress(OSError):  # it may have ended by now
            parent = (entry / "stat").read_text().rpartition(")")[2].split()[1]
            if int(parent) == pid and text in (entry / "cmdline").read_text():
                found.append(int(entry.name))
    return found


# ---- wrong calls ----


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (
            ["--suite", "all"],
            "invalid value for '--suite': 'all' is not one of 'quick', 'standard', 'full'; see "
            "pdd-fast bench --help",
        ),
        (
            ["--only", "nothing"],
            "no case in the quick suite matches 'nothing'; pdd-fast bench --list shows the cases",
        ),
        (
            ["--case", "unroll-b5x"],
            "case 'unroll-b5x': 'b5x' is not a part of it; its parts look like b50, n20, w128, "
            "s32, d3 and dsa",
        ),
        (
            ["--only", "stage", "--implementation", "nobody"],
            "no implementation's name contains 'nobody'; they are: ours, "
            "auto; ours, direct; ours, any module; MTT's loop; MTT's loop, channels-last",
        ),
        (
            ["--only", "dsa", "--without", "r"],
            "--implementation and --without must leave an implementation to measure, got none",
        ),
        (["--device", "gpu"], "device must be auto, cpu, cuda or cuda:N, got 'gpu'"),
        (
            ["--rounds", "0"],
            "invalid value for '--rounds': 0 is not in the range x>=1; see pdd-fast bench --help",
        ),
        (
            ["--limit", "0"],
            "invalid value for '--limit': 0.0 is not in the range x>0; see pdd-fast bench --help",
        ),
    ],
)
def test_a_wrong_call_is_answered_in_one_sentence(
    arguments: list[str], sentence: str, tmp_path: Path
) -> None:
    outcome = bench(
        tmp_path / "out", *arguments
    )  # of a flag that is given twice the last one counts
    assert outcome.status == 2
    assert outcome.sentence() == sentence
    assert not (tmp_path / "out").exists()


def test_a_folder_that_holds_a_benchmark_is_left_alone(answers: Any, tmp_path: Path) -> None:
    (tmp_path / "bench.json").write_text("{}")
    answers(made_up)
    outcome = bench(tmp_path, "--only", "stage")
    assert outcome.status == 2
    assert outcome.sentence() == f"{tmp_path} holds a bench.json already; choose another --output"
    assert (tmp_path / "bench.json").read_text() == "{}"


# ---- the picture ----


def test_the_picture_is_of_the_largest_family() -> None:
    names = [
        "stage",
        "unroll-b4-n5-w4-s8",
        "unroll-b5-n9-w4-s8",
        "unroll-b5-n2-w4-s8",
        "unroll-b5-n3-w4-s8-dsa",
    ]
    assert plot.family(names) == ["unroll-b5-n2-w4-s8", "unroll-b5-n9-w4-s8"]
    assert plot.family(["stage"]) == []


def test_of_each_way_to_write_it_the_picture_shows_the_one_that_gets_furthest(
    answers: Any, tmp_path: Path
) -> None:
    def answer(case: str, name: str) -> dict[str, Any]:
        if name == "plain autograd" and "-n9-" in case:
            return {"failed": "out of memory", "why": "was killed"}
        return made_up(case, name)

    answers(answer)
    bench(tmp_path, "--case", "unroll-b4-n2-w4-s8", "--case", "unroll-b4-n9-w4-s8", "--rounds", "1")
    found = record_in(tmp_path)["cases"]
    assert [c["name"] for c in plot.drawn(found)] == [
        "ours, recompute, auto",
        "ours, cache, auto",
        "plain autograd, channels-last",
        "checkpointed autograd",
        "frozen weights",
        "torch.func",
    ]
    points = [(2, pytest.approx(2.5 * seconds("plain autograd")), 2e7)]
    assert plot._curve("plain autograd", found) == (points, (9, "out of memory"))


# ---- with real measurements ----


def test_from_end_to_end(tmp_path: Path) -> None:
    name = "unroll-b4-n3-w4-s8-dsa"
    chosen = (
        "--implementation",
        "ours, recompute, direct",
    )  # torch alone takes two seconds to load, every time
    with process(
        "bench",
        "--case",
        name,
        *chosen,
        "--rounds",
        "1",
        "--threads",
        "1",
        "--device",
        "cpu",
        "--output",
        tmp_path / "out",
    ) as running:
        out, err = running.communicate(timeout=120)
    assert running.returncode == 0, err
    record = record_in(tmp_path / "out")
    assert record["machine"]["threads"] == 1
    found = record["cases"][name]
    (ours,) = found["results"].values()
    assert ours["error"]["images"] < 1e-5
    assert ours["error"]["rate"] < 1e-5
    assert ours["error"]["cosine"] == pytest.approx(1)
    assert ours["seconds"]["iteration"]["times_ours"] == 1
    assert set(ours["seconds"]["iteration"]["over_floor"]) == {"9 F", "11 F"}
    assert ours["peak_bytes"] > ours["above_start_bytes"] > 1e5
    assert len(found["roofline"]["rates"]["convolution"]["float32"]) == 2
    assert out.count("\n|") >= 6
    assert tables.case_text(name, found) in out
    assert (tmp_path / "out" / "bench.png").stat().st_size > 10_000
