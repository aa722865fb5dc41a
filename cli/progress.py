"""Show progress on stderr: bars on a terminal, lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, TextIO, cast

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

if TYPE_CHECKING:
    pass


_LEAST_VALUES_WIDTH = 12  # columns of a bar's line that are left for values, or none are shown


_SPEED_SECONDS = 600.0  # a bar's speed is that of so long; an iteration may take minutes


_PLAIN_SECONDS = 10.0  # between two lines of one task where there is no terminal


_NOTEBOOK_SECONDS = 1.0  # between two states of a notebook's line; each is a message to the browser


def reporter() -> Reporter:
    """Bars on a terminal, one line that changes in a notebook, a line now and then elsewhere."""
    if _is_notebook(sys.stderr):
        return NotebookReporter()
    return BarReporter() if _is_terminal(sys.stderr) else LineReporter()


def _is_notebook(stream: Any) -> bool:
    """Whether a stream is shown below a notebook's cell, by ipykernel (Jupyter, VS Code, Colab)."""
    return any(kind.__module__.partition(".")[0] == "ipykernel" for kind in type(stream).__mro__)


def _is_terminal(stream: Any) -> bool:
    """Streams that others put in place may lack isatty, be closed, or be None."""
    try:
        return not _is_notebook(stream) and bool(stream.isatty())
    except (AttributeError, ValueError):
        return False


class _Progress:
    """stderr, whose failure is not the run's: the terminal may be gone, the pipe's reader too."""

    def __init__(self) -> None:
        self._stream: Any = sys.stderr
        self.encoding = getattr(self._stream, "encoding", None) or "utf-8"

    def write(self, text: str) -> int:
        with suppress(OSError, ValueError, AttributeError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with suppress(OSError, ValueError, AttributeError):
            self._stream.flush()

    def isatty(self) -> bool:
        return _is_terminal(self._stream)

    def fileno(self) -> int:
        return int(self._stream.fileno())


def _values(values: dict[str, Any]) -> str:
    return "  ".join(
        f"{name.replace('_', ' ')} {value:.4g}" if isinstance(value, float) else f"{name} {value}"
        for name, value in values.items()
    )


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02} min"
    return f"{minutes} min {seconds:02} s" if minutes else f"{seconds} s"


class _SecondsColumn(TextColumn):
    """Seconds per unit of work."""

    def __init__(self) -> None:
        super().__init__("")

    def render(self, task: RichTask) -> Text:
        if not task.speed:
            return Text("")
        return Text(f"{1 / task.speed:.3g} s/{task.fields['unit']}", style="dim")


class _FittingProgress(Progress):
    """Bars of one line each: in a narrow terminal the less important columns are left out, and
    values are cut.
    """

    def __init__(self, console: Console) -> None:
        self._terminal = console  # rich asks for the columns before it has set its own
        self._widths = [
            Column(no_wrap=True, overflow="ellipsis") for _ in range(2)
        ]  # of the name and the values
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
        tasks = list(tasks)
        self.columns = self._fitting(tasks)
        return super().make_tasks_table(tasks)

    def _fitting(self, tasks: list[RichTask]) -> tuple[ProgressColumn, ...]:
        """The columns that there is room for."""
        name, bar, count, speed, left, values = self._all
        room = self._terminal.width
        chosen: list[ProgressColumn] = []
        for each in (count, name, left, speed, bar):  # the most important first
            width = (
                24 if each is bar else max((cell_len(str(each(task))) for task in tasks), default=0)
            )
            if each is name:  # a name may be cut; a number would become another one
                self._widths[0].max_width = width = max(1, min(width, room - 1))
            if width < room:
                chosen.append(each)
                room -= width + 1
        if room >= _LEAST_VALUES_WIDTH:
            self._widths[1].max_width = room
            chosen.append(values)
        return tuple(each for each in self._all if each in chosen)


class BarReporter(Reporter):
    """Progress bars by rich."""

    def __init__(self) -> None:
        # Not rich's own way of showing things in a notebook, which needs ipywidgets.
        self._console = Console(file=cast(TextIO, _Progress()), force_jupyter=False)

    @contextmanager
    def task(self, name: str, total: int, unit: str, done: int = 0) -> Iterator[Task]:
        with _FittingProgress(self._console) as progress:
            number = progress.add_task(name, total=total, completed=done, unit=unit, shown="")
            shown: dict[str, Any] = {}

            class Bar(Task):
                def advance(self, count: int = 1, **values: Any) -> None:
                    shown.update(values)
                    progress.update(number, advance=count, shown=_values(shown))

            yield Bar()

    def message(self, text: str) -> None:
        self._console.print(text, highlight=False, markup=False)


class LineReporter(Reporter):
    """Plain lines, without control characters, for files and pipes."""

    _seconds = _PLAIN_SECONDS

    @contextmanager
    def task(self, name: str, total: int, unit: str, done: int = 0) -> Iterator[Task]:
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
        """How far a task is."""
        self.message(text)

    def _end(self) -> None:
        """A task has ended, well or not."""

    def message(self, text: str) -> None:
        print(text, file=_Progress(), flush=True)


class NotebookReporter(LineReporter):
    """A line for each task that is written over as it goes on: a run of hours leaves a dozen lines
    below its cell.
    """

    _seconds = _NOTEBOOK_SECONDS

    def __init__(self) -> None:
        self._width = 0  # of what the open line shows

    def _line(self, text: str) -> None:
        # A shorter text leaves the end of a longer one standing.
        print("\r" + text.ljust(self._width), end="", file=_Progress(), flush=True)
        self._width = len(text)

    def _end(self) -> None:
        if self._width:
            print(file=_Progress(), flush=True)
        self._width = 0

    def message(self, text: str) -> None:
        self._end()
        super().message(text)
