"""Results as tables and as lines."""

from __future__ import annotations

import io
import re
from typing import Any

import pytest
from evaluations import complete
from output_support import Clock, Terminal

from pdd_fast.cli import output, progress


def evaluation(stages: int = 2, repeats: int = 2) -> dict[str, Any]:
    """The parts of an evaluation that its table shows."""
    return {
        "protocol": {"data": "digits", "images_per_class": list(range(1, stages + 1))},
        "stages": stages,
        "steps": [100 * (s + 1) for s in range(stages)],
        "results": [
            {
                "name": name,
                "labels": "hard",
                "network": "ConvNet",
                "seeds": list(range(repeats)),
                "mean": [50.0 + n + 10 * s for s in range(stages)],
                "std": [1.5 * s for s in range(stages)],
            }
            for n, name in enumerate(("pdd", "random", "last-union"))
        ],
    }


class OutStream(io.TextIOBase):
    """As ipykernel's: neither a terminal nor a TextIOWrapper, without a buffer; what it was given,
    as a browser shows it.
    """

    __module__ = "ipykernel.iostream"
    encoding = "UTF-8"
    terminal = False

    def __init__(self) -> None:
        self.text = ""

    def write(self, text: str) -> int:
        self.text += text
        return len(text)

    def isatty(self) -> bool:
        return self.terminal

    def shown(self) -> list[str]:
        """A carriage return lets what follows overwrite the line."""
        lines = []
        for line in self.text.split("\n"):
            cells: list[str] = []
            for part in line.split("\r"):
                cells[: len(part)] = part
            lines.append("".join(cells).rstrip())
        return lines


class ColabStream(OutStream):
    """A subclass elsewhere, which takes itself for a terminal."""

    __module__ = "google.colab._kernel"
    terminal = True


# ---- notebooks ----


@pytest.mark.parametrize("kind", [OutStream, ColabStream])
def test_a_notebook_gets_one_line_a_task(
    kind: type[OutStream], clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = kind()
    monkeypatch.setattr("sys.stderr", stream)
    reporter = progress.reporter()
    assert isinstance(reporter, progress.NotebookReporter)
    with reporter.task("stage 1/2", total=3000, unit="iteration") as task:
        for i in range(3000):
            clock.now += 2.0
            task.advance(1, loss=1.25 if i < 2999 else 1.0)
    reporter.message("in between")

    def fail() -> None:
        with reporter.task("stage 2/2", total=3000, unit="iteration") as task:
            clock.now += 2.0
            task.advance(1)
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    reporter.message("at last")
    assert stream.shown() == [
        "stage 1/2: 3000/3000 iterations  2 s/iteration  1 h 40 min  loss 1",
        "in between",
        "stage 2/2: 1/3000 iterations  2 s/iteration  2 s, 1 h 39 min left",
        "at last",
        "",
    ]


def test_a_table_in_a_notebook_is_text_on_stdout(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = ColabStream()
    monkeypatch.setattr("sys.stdout", stream)
    output.print_evaluation(complete(evaluation()))
    assert "│     2 │   2 │   200 │ 60.0 ± 1.5 │ 61.0 ± 1.5 │ 62.0 ± 1.5 │" in stream.shown()
    assert "\x1b" not in stream.text


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("│┃").replace("┃", "│").split("│")]


# ---- results ----


def test_the_table_has_a_row_a_stage_and_a_column_a_result(
    capsys: pytest.CaptureFixture[str],
) -> None:
    output.print_evaluation(complete(evaluation()))
    out, err = capsys.readouterr()
    assert err == ""
    lines = out.splitlines()
    assert lines[0] == "Test accuracy on digits, percent, mean ± std over 2 fresh networks"
    rows = [cells(line) for line in lines if line[0] in "│┃"]
    assert rows == [
        ["stage", "ipc", "steps", "pdd", "random", "last-union"],
        ["1", "1", "100", "50.0 ± 0.0", "51.0 ± 0.0", ""],  # not trained on one image a class
        ["2", "2", "200", "60.0 ± 1.5", "61.0 ± 1.5", "62.0 ± 1.5"],
    ]


def test_one_network_is_not_called_networks(capsys: pytest.CaptureFixture[str]) -> None:
    output.print_evaluation(complete(evaluation(repeats=1)))
    assert capsys.readouterr().out.splitlines()[0].endswith(" over 1 fresh network")


def test_every_kind_of_network_has_a_table_and_differences_follow_it(
    capsys: pytest.CaptureFixture[str],
) -> None:
    content = evaluation()
    other = [result | {"network": "MLP", "mean": [12.5, 25.0]} for result in content["results"][:2]]
    content["results"] += other
    content["paired"] = [
        {"network": "ConvNet", "of": "pdd", "to": "random", "difference": -1.26, "ci95": 0.5},
        {"network": "MLP", "of": "pdd", "to": "random", "difference": 2.0, "ci95": None},
    ]
    output.print_evaluation(complete(content))
    lines = capsys.readouterr().out.splitlines()
    heads = [i for i, line in enumerate(lines) if line.startswith("Test accuracy")]
    assert [lines[i].rpartition("networks")[2] for i in heads] == [" (ConvNet)", " (MLP)"]
    assert cells(lines[heads[0] + 5])[-1] == "62.0 ± 1.5"
    assert cells(lines[-2]) == ["2", "2", "200", "25.0 ± 1.5", "25.0 ± 1.5"]
    assert [line for line in lines if "−" in line] == ["pdd − random in the end: -1.3 ± 0.5 (95 %)"]
    assert lines.index("pdd − random in the end: -1.3 ± 0.5 (95 %)") == heads[1] - 1


def test_soft_and_hard_labels_have_tables_of_their_own(capsys: pytest.CaptureFixture[str]) -> None:
    content = evaluation()
    for name, labels in zip(
        ("pdd", "random", "last-union"), ("learned", "hard", "soft"), strict=True
    ):
        next(result for result in content["results"] if result["name"] == name)["labels"] = labels
    content["paired"] = [
        {"network": "ConvNet", "of": "pdd", "to": "last-union", "difference": 1.0, "ci95": 0.5}
    ]
    output.print_evaluation(complete(content))
    lines = capsys.readouterr().out.splitlines()
    heads = [i for i, line in enumerate(lines) if line.startswith("Test accuracy")]
    assert [lines[i].rpartition("networks")[2] for i in heads] == [
        " (soft labels)",
        " (hard labels)",
    ]
    assert [cells(lines[i + 2])[3:] for i in heads] == [["pdd", "last-union"], ["random"]]
    assert lines[heads[1] - 1].startswith("pdd − last-union in the end: +1.0")


@pytest.mark.parametrize("terminal", [False, True])
def test_any_number_of_stages_fits_into_80_columns(
    terminal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = Terminal() if terminal else io.StringIO()
    monkeypatch.setattr("sys.stdout", stream)
    monkeypatch.setenv("COLUMNS", "80")
    content = evaluation(stages=100)
    content["results"] = [
        {
            "name": name,
            "labels": "hard",
            "network": "ConvNet",
            "seeds": [0, 1],
            "mean": [99.9] * 100,
            "std": [10.5] * 100,
        }
        for name in ("pdd", "random", "last-union", "one-stage")
    ]
    content["steps"] = [100_000] * 100
    output.print_evaluation(complete(content))
    lines = re.sub(r"\x1b\[[0-9;]*m", "", stream.getvalue()).splitlines()
    assert max(map(len, lines)) <= 80
    assert len(lines) == 1 + 4 + 100
    assert cells(lines[-2]) == ["100", "100", "100000", *["99.9 ± 10.5"] * 4]


@pytest.mark.parametrize("terminal", [False, True])
@pytest.mark.parametrize("width", [30, 40, 59])
def test_a_table_becomes_rows_in_fewer_than_60_columns(
    width: int, terminal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = Terminal() if terminal else io.StringIO()
    monkeypatch.setattr("sys.stdout", stream)
    monkeypatch.setenv("COLUMNS", str(width))
    content = evaluation()
    content["paired"] = [
        {"network": "ConvNet", "of": "pdd", "to": "last-union", "difference": 1.0, "ci95": 0.5}
    ]
    output.print_evaluation(complete(content))
    lines = stream.getvalue().splitlines()
    assert max(map(len, lines)) <= width
    assert " ".join(" ".join(lines[:-1]).split()).startswith(
        "Test accuracy on digits, percent, mean ± std over 2 fresh "
    )
    start = lines.index("stage 1, ipc 1, steps 100")
    assert lines[start : start + 7] == [
        "stage 1, ipc 1, steps 100",
        "  pdd         50.0 ± 0.0",
        "  random      51.0 ± 0.0",
        "stage 2, ipc 2, steps 200",
        "  pdd         60.0 ± 1.5",
        "  random      61.0 ± 1.5",
        "  last-union  62.0 ± 1.5",
    ]
    assert (
        " ".join(" ".join(lines[start + 7 :]).split())
        == "pdd − last-union in the end: +1.0 ± 0.5 (95 %)"
    )


@pytest.mark.parametrize("width", [64, 80])
def test_a_table_that_fits_stays_a_table(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = Terminal()
    monkeypatch.setattr("sys.stdout", stream)
    monkeypatch.setenv("COLUMNS", str(width))
    output.print_evaluation(complete(evaluation()))
    assert any(
        cells(line)[-1] == "62.0 ± 1.5"
        for line in re.sub(r"\x1b\[[0-9;]*m", "", stream.getvalue()).splitlines()
    )


@pytest.mark.parametrize("width", [40, 60, 80])
def test_an_ablation_of_many_seeds_becomes_rows_instead_of_broken_cells(
    width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = Terminal()
    monkeypatch.setattr("sys.stdout", stream)
    monkeypatch.setenv("COLUMNS", str(width))
    names = ["1 stage", "5 stages, no conditioning, forgetting filter", "random"]
    results = [
        {"name": name, "accuracy": [50.0 + s for s in range(9)], "mean": 54.0, "ci95": 2.1}
        for name in names
    ]
    output.print_ablation(
        {"data": "digits", "steps": 100, "seeds": list(range(9)), "results": results}
    )
    lines = stream.getvalue().splitlines()
    assert max(map(len, lines)) <= width
    assert lines.count("  accuracy  54.0 ± 2.1") == 3
    assert lines.count("  seed 8    58.0") == 3
    assert lines[lines.index("random") + 1] == "  accuracy  54.0 ± 2.1"


def test_json_is_one_line_of_ascii(capsys: pytest.CaptureFixture[str]) -> None:
    output.print_json({"name": "Ångström ±", "values": [1.5, None]})
    assert capsys.readouterr() == (
        '{"name": "\\u00c5ngstr\\u00f6m \\u00b1", "values": [1.5, null]}\n',
        "",
    )


def test_facts_are_aligned_in_sections(capsys: pytest.CaptureFixture[str]) -> None:
    output.print_facts({"torch": {"version": "2", "built for CUDA": "no"}, "empty": {}})
    assert capsys.readouterr().out == "torch\n  version         2\n  built for CUDA  no\nempty\n"
