"""Progress as bars and as lines."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from typing import Any

import pytest
from output_support import Clock, Terminal
from rich.console import Console

from pdd_fast.cli import progress


def test_bars_on_a_terminal_and_lines_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stderr", Terminal())
    assert isinstance(progress.reporter(), progress.BarReporter)
    monkeypatch.setattr("sys.stderr", io.StringIO())
    assert isinstance(progress.reporter(), progress.LineReporter)


# ---- lines ----


def test_lines_come_now_and_then_and_at_the_end(
    clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    with progress.LineReporter().task("stage 1/2", total=20, unit="iteration") as task:
        for i in range(20):
            clock.now += 2.0
            task.advance(1, loss=0.5 - i / 100, inner_lr=0.01)
    out, err = capsys.readouterr()
    assert out == ""
    # A line after more than ten seconds: after 12, 24 and 36, then the last one.
    assert err.splitlines() == [
        "stage 1/2: 6/20 iterations  2 s/iteration  12 s, 28 s left  loss 0.45  inner lr 0.01",
        "stage 1/2: 12/20 iterations  2 s/iteration  24 s, 16 s left  loss 0.39  inner lr 0.01",
        "stage 1/2: 18/20 iterations  2 s/iteration  36 s, 4 s left  loss 0.33  inner lr 0.01",
        "stage 1/2: 20/20 iterations  2 s/iteration  40 s  loss 0.31  inner lr 0.01",
    ]


def test_a_slow_unit_gets_a_line_each_and_long_times_are_in_hours(
    clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    with progress.LineReporter().task("experts", total=100, unit="epoch") as task:
        for _ in range(2):
            clock.now += 90.0
            task.advance(1, network=1)
        lines = capsys.readouterr().err.splitlines()
    assert lines == [
        "experts: 1/100 epochs  90 s/epoch  1 min 30 s, 2 h 28 min left  network 1",
        "experts: 2/100 epochs  90 s/epoch  3 min 00 s, 2 h 27 min left  network 1",
    ]


def test_a_continued_task_counts_its_own_time(
    clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    with progress.LineReporter().task("stage 2/2", total=1000, unit="iteration", done=900) as task:
        clock.now += 20.0
        task.advance(10, loss=0.5)
        lines = capsys.readouterr().err.splitlines()
    assert lines == [
        "stage 2/2: 910/1000 iterations  2 s/iteration  20 s, 3 min 00 s left  loss 0.5"
    ]


def test_nothing_is_said_of_the_speed_of_what_has_not_begun(
    clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    with progress.LineReporter().task("stage 1/2", total=5, unit="iteration", done=5) as task:
        clock.now += 20.0
        task.advance(0, accuracy=12.345)
    assert capsys.readouterr().err.splitlines() == ["stage 1/2: 5/5 iterations  accuracy 12.35"] * 2


def test_a_task_that_fails_ends_without_a_last_line(
    clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail() -> None:
        with progress.LineReporter().task("stage 1/2", total=5, unit="iteration") as task:
            task.advance(1)
            raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        fail()
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.4, "0 s"),
        (59.4, "59 s"),
        (59.6, "1 min 00 s"),
        (61, "1 min 01 s"),
        (3599.4, "59 min 59 s"),
        (3600, "1 h 00 min"),
        (90_061, "25 h 01 min"),
    ],
)
def test_durations_are_rounded_to_what_matters(seconds: float, text: str) -> None:
    assert progress._duration(seconds) == text


@pytest.fixture
def bars(clock: Clock) -> tuple[progress.BarReporter, Callable[[], str]]:
    """A reporter with bars, and what its terminal shows."""
    reporter = progress.BarReporter()
    console = Console(
        file=io.StringIO(), record=True, width=200, force_terminal=True, get_time=clock
    )
    reporter._console = console

    def shown() -> str:
        return console.export_text().rstrip().splitlines()[-1]

    return reporter, shown


# ---- bars ----


def test_a_bar_shows_stage_iteration_speed_time_left_and_values(
    bars: tuple[progress.BarReporter, Callable[[], str]], clock: Clock
) -> None:
    reporter, shown = bars
    with reporter.task("stage 2/5", total=1000, unit="iteration", done=100) as task:
        for _ in range(10):
            clock.now += 1.5
            task.advance(1, loss=0.4567, inner_lr=0.0123)
    line = shown()
    assert line.startswith("stage 2/5 ")
    # 890 iterations of 1.5 s are left: 22 minutes 15 seconds.
    assert line.split()[-9:] == [
        "110/1000",
        "1.5",
        "s/iteration",
        "22:15",
        "loss",
        "0.4567",
        "inner",
        "lr",
        "0.0123",
    ]


def test_a_bar_knows_the_speed_of_iterations_that_take_minutes(
    bars: tuple[progress.BarReporter, Callable[[], str]], clock: Clock
) -> None:
    reporter, shown = bars
    with reporter.task("stage 1/5", total=40, unit="iteration") as task:
        for _ in range(10):
            clock.now += 120.0
            task.advance(1, loss=0.5)
    assert shown().split()[-5:] == ["120", "s/iteration", "1:00:00", "loss", "0.5"]


@pytest.mark.parametrize("width", [20, 40, 59, 60, 80, 200])
def test_a_bar_is_one_line_that_fits_and_keeps_the_count(width: int, clock: Clock) -> None:
    reporter = progress.BarReporter()
    stream = io.StringIO()
    reporter._console = Console(
        file=stream, width=width, force_terminal=True, get_time=clock, color_system=None
    )
    with reporter.task("transition to stage 2/5", total=1000, unit="iteration", done=100) as task:
        for _ in range(10):
            clock.now += 1.5
            task.advance(1, loss=0.4567, inner_lr=0.0123, accuracy=56.78)
    shown = (
        re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "\n", stream.getvalue()).replace("\r", "\n").splitlines()
    )
    lines = [line.rstrip() for line in shown if line.strip()]
    assert max(map(len, lines)) <= width
    assert len(re.findall(r"110/1000", lines[-1])) == 1
    assert lines[-1].startswith("transition to stage 2/5" if width >= 40 else "transiti…")
    assert ("1.5 s/iteration" in lines[-1]) == (width >= 59)
    assert ("accuracy 56.78" in lines[-1]) == (width == 200)


def test_messages_are_printed_as_they_are(
    bars: tuple[progress.BarReporter, Callable[[], str]],
) -> None:
    reporter, shown = bars
    reporter.message("runs/[red]digits[/red] holds 5 experts")
    assert shown() == "runs/[red]digits[/red] holds 5 experts"


def test_a_line_message_goes_to_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    progress.LineReporter().message("runs/[red]digits[/red]")
    assert capsys.readouterr() == ("", "runs/[red]digits[/red]\n")


class Gone(io.StringIO):
    """A terminal that was closed, or a pipe without a reader."""

    def write(self, text: str) -> int:
        raise OSError(5, "Input/output error")

    def isatty(self) -> bool:
        return True

    def fileno(self) -> int:
        raise OSError(5, "Input/output error")


@pytest.mark.parametrize(
    "kind", [progress.BarReporter, progress.LineReporter, progress.NotebookReporter]
)
def test_progress_that_cannot_be_shown_is_no_error(
    kind: type[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stderr", Gone())
    reporter = kind()
    with reporter.task("stage 1/2", total=2, unit="iteration") as task:
        task.advance(1, loss=0.5)
        reporter.message("a sentence")
        task.advance(1)
