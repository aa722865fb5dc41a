"""Test `pdd-fast bench`: its choice of cases, its files and answers, and interruptions.

All but two tests make up their measurements.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from bench_command_support import bench, made_up, record_in
from PIL import Image

from pdd_fast.benchmarks import cases, implementations, roofline_counts
from pdd_fast.benchmarks.cases import SUITES, parse
from pdd_fast.benchmarks.implementations import ROOFLINE, TRUTH
from pdd_fast.runtime.errors import UsageError

# ---- cases ----


@pytest.mark.parametrize("suite", SUITES)
def test_every_case_of_a_suite_is_called_what_it_is(suite: str) -> None:
    listed = SUITES[suite].cases
    assert len(set(listed)) == len(listed) > 5
    for case in listed:
        assert parse(case.name) == case
        assert "{" not in case.title
    assert {case.kind for case in listed} == set(cases.KINDS)


def test_the_full_suite_has_all_that_was_asked_for() -> None:
    full = set(SUITES["full"].cases)
    for batch in (20, 50, 100, 256):
        for steps in (5, 20, 50):
            for width in (32, 64, 128):
                for size in (8, 32, 64):
                    assert parse(f"unroll-b{batch}-n{steps}-w{width}-s{size}") in full
    for operation in ("color", "crop", "cutout", "flip", "scale", "rotate", "single", "multiple"):
        assert {parse(f"dsa-{operation}-b{batch}") for batch in (20, 256)} <= full
    for name in ("evaluate", "stage", "step-b20-w32-s8", "step-b256-w128-s32-dsa"):
        assert parse(name) in full


@pytest.mark.parametrize(
    ("name", "canonical", "expected"),
    [
        (
            "unroll",
            "unroll-b50-n20-w128-s32",
            {"batch": 50, "steps": 20, "depth": 3, "augment": False},
        ),
        ("unroll-s64-b3", "unroll-b3-n20-w128-s64", {"size": 64, "depth": 4}),
        ("unroll-w4-s8-n3-b4-d3-dsa", "unroll-b4-n3-w4-s8-d3-dsa", {"depth": 3, "augment": True}),
        (
            "gradient-matching",
            "gradient-matching-b128-r64-k10-w128-s32",
            {"batch": 128, "real": 64, "classes": 10, "depth": 3},
        ),
        (
            "gradient-matching-s8-k2-r3",
            "gradient-matching-b128-r3-k2-w128-s8",
            {"real": 3, "classes": 2, "depth": 2},
        ),
        ("dsa-flip-b20-s8", "dsa-flip-b20-s8", {"operation": "flip", "size": 8}),
        ("dsa", "dsa-single-b256", {"operation": "single"}),
        ("evaluate-w4-s16-e2", "evaluate-w4-s16-e2", {"epochs": 2, "size": 16}),
        ("stage-w32", "stage", {"width": 32, "steps": 20, "size": 8, "depth": 2}),
    ],
)
def test_a_name_says_what_a_case_is(name: str, canonical: str, expected: dict[str, Any]) -> None:
    case = parse(name)
    assert case.name == canonical
    assert parse(canonical) == case
    assert {key: getattr(case, key) for key in expected} == expected


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        (
            "unrol-b5",
            "a case must begin with one of unroll, gradient-matching, step, dsa, evaluate, stage, "
            "got 'unrol-b5'; did",
        ),
        (
            "unroll-x5",
            "'x5' is not a part of it; its parts look like b50, n20, w128, s32, d3 and dsa",
        ),
        ("gradient-mathcing", "got 'gradient-mathcing'; did you mean 'gradient-matching'"),
        (
            "gradient-matching-n5",
            "'n5' is not a part of it; its parts look like b128, r64, k10, w128, s32, d3",
        ),
        ("gradient-matchings", "a case must begin with one of"),
        ("unroll-b0", "'b0' is not a part of it"),
        ("step-n5", "'n5' is not a part of it"),
        (
            "dsa-twist",
            "'twist' is not a part of it; its parts look like b256, s32, and one of color, crop",
        ),
        ("stage-dsa", "'dsa' is not a part of it"),
        ("unroll-b5-b6", "gives its batch twice"),
        ("unroll-s8-d4", "4 blocks need images of 16 pixels at least, got 8"),
    ],
)
def test_a_name_that_is_none_is_answered(name: str, sentence: str) -> None:
    with pytest.raises(UsageError) as error:
        parse(name)
    assert sentence in str(error.value)


def test_patterns_choose_cases() -> None:
    def names(**how: Any) -> list[str]:
        return [case.name for case in cases.select("quick", **how)]

    every = names()
    assert names(only=["dsa-*"]) == ["dsa-single-b256", "dsa-multiple-b256"]
    assert names(only=["evaluate", "stage"]) == ["evaluate", "stage"]
    assert names(only=["step-b*-dsa"]) == ["step-b20-w32-s32-dsa"]
    assert names(skip=["unroll"]) == [name for name in every if not name.startswith("unroll")]
    assert names(named=["stage", "unroll", "stage"], skip=["none*"] and ["stage"]) == [
        "unroll-b50-n20-w128-s32"
    ]
    with pytest.raises(
        UsageError, match="no case in the quick suite matches 'w128'; pdd-fast bench --list"
    ):
        names(only=["w128"])
    with pytest.raises(UsageError, match="no case named by --case matches 'dsa'"):
        names(named=["stage"], skip=["dsa"])
    with pytest.raises(UsageError, match="leave no case"):
        names(only=["stage"], skip=["st*"])


def test_a_name_means_its_implementation_and_another_text_all_that_contain_it() -> None:
    every = implementations.implementations(parse("unroll"), "cpu")

    def names(*only: str, without: tuple[str, ...] = (), compiles: bool = True) -> list[str]:
        return [c.name for c in implementations.select(every, only, without, compiles)]

    assert names("plain autograd") == ["plain autograd"]
    assert names("plain") == ["plain autograd", "plain autograd, channels-last"]
    assert names("torch.func", "compiled", compiles=False) == ["torch.func", "torch.func, compiled"]
    assert len(names(compiles=False)) == len(every) - 1
    assert "frozen weights" not in names(without=("frozen",))


def test_listing_names_every_case_and_needs_no_torch() -> None:
    program = (
        "import sys; from pdd_fast.cli.main import run; status = run(['bench', '--list']); "
        "sys.exit(status or (9 if 'torch' in sys.modules else 0))"
    )
    found = subprocess.run(
        [sys.executable, "-P", "-c", program], capture_output=True, text=True, check=True
    )
    lines = found.stdout.splitlines()
    for name, suite in SUITES.items():
        assert any(
            line.startswith(f"{name}: {len(suite.cases)} cases, {suite.rounds} rounds")
            for line in lines
        )
    named = {line.split()[0]: line for line in lines if line and ":" not in line.split()[0]}
    assert set(named) == {case.name for suite in SUITES.values() for case in suite.cases}
    assert named["dsa-single-b256"].endswith("(quick, standard, full)")


# ---- what is written and printed ----


def test_the_quick_suite_with_made_up_answers(answers: Any, tmp_path: Path) -> None:
    answers(made_up)
    outcome = bench(tmp_path / "a" / "place")
    assert outcome.status == 0, outcome.err
    record = record_in(tmp_path / "a" / "place")
    assert record["finished"]
    assert list(record["cases"]) == [case.name for case in SUITES["quick"].cases]
    assert {"cpu", "cores", "torch", "python", "pdd_fast", "commit", "threads"} <= record[
        "machine"
    ].keys()
    assert record["settings"]["rounds"] == SUITES["quick"].rounds
    for name, found in record["cases"].items():
        assert all(len(result["samples"]) == 2 for result in found["results"].values()), name
        assert f"{name}: {parse(name).title}" in outcome.out
    text = (tmp_path / "a" / "place" / "bench.md").read_text(encoding="utf-8")
    assert "not finished" not in text
    assert "| cpu | a processor |\n" in text
    facts = text.partition("\n## ")[0]
    assert "| implementation |" not in facts  # which nobody chose
    assert all(f"\n## {name}: " in text for name in record["cases"])
    with Image.open(tmp_path / "a" / "place" / "bench.png") as picture:
        assert picture.width > 800
    files = ("bench.json", "bench.md", "bench.png")
    assert outcome.out.endswith("".join(f"{tmp_path / 'a' / 'place' / name}\n" for name in files))
    assert "9/9" not in outcome.out  # progress is on stderr
    assert "dsa-single-b256: " in outcome.err
    found = record["cases"]["unroll-b20-n5-w32-s32"]
    assert found["left_out"] == ["torch.func, compiled"]
    assert "Left out: torch.func, compiled." in outcome.out


def test_what_a_table_says(answers: Any, tmp_path: Path) -> None:
    answers(made_up)
    outcome = bench(
        tmp_path, "--case", "unroll-b4-n2-w4-s8", "--rounds", "1", "--without", "any module"
    )
    lines = {
        line.split(" | ")[0].strip("| "): line
        for line in outcome.out.splitlines()
        if line.startswith("|")
    }
    cells = [cell.strip() for cell in lines["plain autograd"].strip("|").split("|")]
    assert cells[1:9] == [
        "5.35 s",
        "4.28 s–6.42 s",
        "2.14",
        "600 MB",
        "20 MB",
        "1.0e-06",
        "0.750000",
        "2.0e-07",
    ]
    assert "not finite" in lines["frozen weights"]
    assert "ours, any module" not in lines
    bound = roofline_counts.rooflines(
        parse("unroll-b4-n2-w4-s8"), made_up("unroll-b4-n2-w4-s8", ROOFLINE), "float32"
    )["iteration"]
    assert cells[9] == f"{5.35 / bound['9 F']:.2f} / {5.35 / bound['11 F']:.2f}"
    assert (
        "Best exact alternative in float32: torch.func, 5.25 s. ours, recompute, auto: 2.5 s, "
        "2.10 times as fast with 1.00 of its new memory. ours, cache, auto: 1.25 s, 4.20 times "
        "as fast with 1.00 of its new memory."
    ) in outcome.out


def test_a_baseline_that_fails_is_reported_and_not_hidden(answers: Any, tmp_path: Path) -> None:
    calls: list[str] = []

    def answer(case: str, name: str) -> dict[str, Any]:
        calls.append(name)
        if name == "plain autograd":
            return {"failed": "out of memory", "why": "asked for 2.00 GB more with 12.00 GB taken"}
        return made_up(case, name)

    answers(answer)
    outcome = bench(
        tmp_path, "--case", "unroll-b4-n2-w4-s8", "--case", "unroll-b4-n3-w4-s8", "--rounds", "2"
    )
    assert outcome.status == 0
    assert "| out of memory: asked for 2.00 GB more with 12.00 GB taken |" in outcome.out
    said = (
        "unroll-b4-n2-w4-s8: plain autograd: out of memory: asked for 2.00 GB more with "
        "12.00 GB taken\n"
    )
    assert outcome.err.count(said) == 1
    assert "Not measured or without a result: plain autograd." in outcome.out
    assert calls.count("plain autograd") == 2  # once a case, and not again
    assert (
        record_in(tmp_path)["cases"]["unroll-b4-n2-w4-s8"]["results"]["plain autograd"]["failed"]
        == "out of memory"
    )


def test_when_ours_fails_the_status_is_1_and_the_rest_is_measured(
    answers: Any, tmp_path: Path
) -> None:
    def answer(case: str, name: str) -> dict[str, Any]:
        if name == "ours, direct":
            return {"failed": "failed", "why": "ValueError: of ours", "details": "Traceback ..."}
        return made_up(case, name)

    answers(answer)
    outcome = bench(tmp_path, "--case", "step-b4-w4-s8")
    assert outcome.status == 1
    assert outcome.err.endswith(
        "pdd-fast: unexpected failures: step-b4-w4-s8: ours, direct; "
        f"{tmp_path / 'bench.json'} has the details\n"
    )
    results = record_in(tmp_path)["cases"]["step-b4-w4-s8"]["results"]
    assert results["ours, direct"]["details"] == "Traceback ..."
    assert results["eager PyTorch"]["seconds"]["step"]["times_ours"] > 1


@pytest.mark.parametrize(
    ("failed", "status"),
    [
        ({"failed": "too slow", "why": "took more than 1 s"}, 0),
        ({"failed": "failed", "why": "x"}, 1),
    ],
)
def test_without_the_true_gradient_there_are_no_errors(
    failed: dict[str, str], status: int, answers: Any, tmp_path: Path
) -> None:
    def answer(case: str, name: str) -> dict[str, Any]:
        found = failed if name == TRUTH else made_up(case, name)
        found.pop("error", None)
        return found

    answers(answer)
    outcome = bench(tmp_path, "--case", "unroll-b4-n2-w4-s8", "--implementation", "plain")
    assert outcome.status == status
    assert f"No errors: the gradient in float64 {failed['why']}." in outcome.out
    assert "No roofline" not in outcome.out


def test_as_json(answers: Any, tmp_path: Path) -> None:
    answers(made_up)
    outcome = bench(tmp_path, "--case", "dsa-flip-b4", "--json")
    assert json.loads(outcome.out) == record_in(tmp_path)
    assert not (tmp_path / "bench.png").exists()  # there is no N to draw over
