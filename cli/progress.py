"""Show progress on stderr: bars on a terminal, lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO, cast

from rich.cells import cell_len
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)
from rich.progress import Task as RichTask
from rich.table import Column, Table
from rich.text import Text

from pdd_fast.runtime.progress import Reporter, Task

_LEAST_VALUES_WIDTH = 12  # columns; values are hidden if a bar's line has fewer left


_SPEED_SECONDS = 600.0  # window of a bar's speed; an iteration may take minutes


_PLAIN_SECONDS = 10.0  # between two lines of one task outside a terminal


_NOTEBOOK_SECONDS = 1.0  # between two updates of a notebook's line; each is a browser message


def reporter() -> Reporter:
    """Return the reporter for stderr.

    It shows bars on a terminal, one line per task in a notebook, and occasional lines elsewhere.
    """
    if _is_notebook(sys.stderr):
        return NotebookReporter()
    return BarReporter() if _is_terminal(sys.stderr) else LineReporter()


def _is_notebook(stream: Any) -> bool:
    """Return whether ipykernel (Jupyter, VS Code, Colab) shows the stream below a cell."""
    return any(kind.__module__.partition(".")[0] == "ipykernel" for kind in type(stream).__mro__)


def _is_terminal(stream: Any) -> bool:
    """Return whether the stream is a terminal.

    Streams that other code installed may lack isatty, be closed, or be None.
    """
    try:
        return not _is_notebook(stream) and bool(stream.isatty())
    except (AttributeError, ValueError):
        return False


class _Progress:
    """Stream to stderr that ignores errors: a closed terminal or pipe must not end a run."""

    def __init__(self) -> None:
        self._stream: Any = sys.stderr
        self.encoding = getattr(self._stream, "encoding", None) or "utf-8"

    def write(self, text: str) -> int:
        """Write ``text`` if possible."""
        with suppress(OSError, ValueError, AttributeError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        """Flush the stream if possible."""
        with suppress(OSError, ValueError, AttributeError):
            self._stream.flush()

    def isatty(self) -> bool:
        """Return whether the stream is a terminal."""
        return _is_terminal(self._stream)

    def fileno(self) -> int:
        """Return the stream's file descriptor."""
        return int(self._stream.fileno())


def _values(values: dict[str, Any]) -> str:
    """Return reported values as one line of text."""
    return "  ".join(
        f"{name.replace('_', ' ')} {value:.4g}" if isinstance(value, float) else f"{name} {value}"
        for name, value in values.items()
    )


def _duration(seconds: float) -> str:
    """Return a duration in hours and minutes, minutes and seconds, or seconds."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02} min"
    return f"{minutes} min {seconds:02} s" if minutes else f"{seconds} s"


class _SecondsColumn(TextColumn):
    """Column of the seconds per unit of work."""

    def __init__(self) -> None:
        super().__init__("")

    def render(self, task: RichTask) -> Text:
        """Return the column's text for ``task``."""
        if not task.speed:
            return Text("")
        return Text(f"{1 / task.speed:.3g} s/{task.fields['unit']}", style="dim")


class _FittingProgress(Progress):
    """Progress bars of one line each.

    A narrow terminal hides the less important columns and truncates values.
    """

    def __init__(self, console: Console) -> None:
        self._terminal = console  # rich reads the columns before it sets its own console
        # Columns of the name and of the values.
        self._widths = [Column(no_wrap=True, overflow="ellipsis") for _ in range(2)]
        name, values = (
            TextColumn(text, markup=False, table_column=column)
            for text, column in zip(
                ("{task.description}", "{task.fields[shown]}"), self._widths, strict=True
            )
        )
        self._all = (
            name,
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            _SecondsColumn(),
            TimeRemainingColumn(compact=True),
            values,
        )
        super().__init__(*self._all, console=console, speed_estimate_period=_SPEED_SECONDS)

    def make_tasks_table(self, tasks: Iterable[RichTask]) -> Table:
        """Return the table of ``tasks`` with the columns that fit."""
        tasks = list(tasks)
        self.columns = self._fitting(tasks)
        return super().make_tasks_table(tasks)

    def _fitting(self, tasks: list[RichTask]) -> tuple[ProgressColumn, ...]:
        """Return the columns that fit the terminal."""
        name, bar, count, speed, left, values = self._all
        room = self._terminal.width
        chosen: list[ProgressColumn] = []
        for each in (count, name, left, speed, bar):  # most important first
            width = (
                24 if each is bar else max((cell_len(str(each(task))) for task in tasks), default=0)
            )
            if each is name:  # a name may be truncated; a truncated number would be wrong
                self._widths[0].max_width = width = max(1, min(width, room - 1))
            if width < room:
                chosen.append(each)
                room -= width + 1
        if room >= _LEAST_VALUES_WIDTH:
            self._widths[1].max_width = room
            chosen.append(values)
        return tuple(each for each in self._all if each in chosen)


class BarReporter(Reporter):
    """Reporter that shows progress bars."""

    def __init__(self) -> None:
        # rich's own notebook output needs ipywidgets.
        self._console = Console(file=cast(TextIO, _Progress()), force_jupyter=False)

    @contextmanager
    def task(self, name: str, total: int, unit: str, done: int = 0) -> Iterator[Task]:
        """Yield a task that is shown as a bar."""
        with _FittingProgress(self._console) as progress:
            number = progress.add_task(name, total=total, completed=done, unit=unit, shown="")
            shown: dict[str, Any] = {}

            class Bar(Task):
                def advance(self, count: int = 1, **values: Any) -> None:
                    shown.update(values)
                    progress.update(number, advance=count, shown=_values(shown))

            yield Bar()

    def message(self, text: str) -> None:
        """Print a message above the bars."""
        self._console.print(text, highlight=False, markup=False)


class LineReporter(Reporter):
    """Reporter that prints plain lines without control characters, for files and pipes."""

    _seconds = _PLAIN_SECONDS

    @contextmanager
    def task(self, name: str, total: int, unit: str, done: int = 0) -> Iterator[Task]:
        """Yield a task whose progress is printed every few seconds and at its end."""
        began, seconds_apart = time.monotonic(), self._seconds
        last = began
        state: dict[str, Any] = {"done": done}
        shown: dict[str, Any] = {}

        def line() -> None:
            seconds = time.monotonic() - began
            now = state["done"]
            parts = [f"{name}: {now}/{total} {unit}s"]
            if now > done:
                each = seconds / (now - done)
                parts.append(f"{each:.3g} s/{unit}")
                parts.append(
                    _duration(seconds)
                    + (f", {_duration(each * (total - now))} left" if now < total else "")
                )
            self._line("  ".join(parts + ([_values(shown)] if shown else [])))

        class Lines(Task):
            def advance(self, count: int = 1, **values: Any) -> None:
                nonlocal last
                state["done"] += count
                shown.update(values)
                if time.monotonic() - last > seconds_apart:
                    last = time.monotonic()
                    line()

        try:
            yield Lines()
            line()
        finally:
            self._end()

    def _line(self, text: str) -> None:
        """Show the progress of a task."""
        self.message(text)

    def _end(self) -> None:
        """Handle the end of a task, successful or not."""

    def message(self, text: str) -> None:
        """Print a message."""
        print(text, file=_Progress(), flush=True)


class NotebookReporter(LineReporter):
    """Reporter that overwrites one line per task.

    A run of hours therefore leaves a dozen lines below its cell.
    """

    _seconds = _NOTEBOOK_SECONDS

    def __init__(self) -> None:
        self._width = 0  # characters on the open line

    def _line(self, text: str) -> None:
        # A shorter text would leave the end of a longer one visible.
        print("\r" + text.ljust(self._width), end="", file=_Progress(), flush=True)
        self._width = len(text)

    def _end(self) -> None:
        if self._width:
            print(file=_Progress(), flush=True)
        self._width = 0

    def message(self, text: str) -> None:
        """Print a message on a new line."""
        self._end()
        super().message(text)
