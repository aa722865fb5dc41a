"""Entry point: find the command, and turn every error into one sentence and an exit status."""

from __future__ import annotations

import difflib
import io
import os
import signal
import sys
import tempfile
import threading
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib import import_module
from typing import Any

import click

from pdd_fast._version import __version__, commit
from pdd_fast.runtime.errors import PddFastError, first_line

COMMANDS = {  # name -> help text; a command's module is imported when the command runs
    "distill": "Distill a dataset in stages, evaluate the result and draw it.",
    "experts": "Train and store expert trajectories.",
    "evaluate": "Train fresh networks on a run's unions and report their test accuracy.",
    "ablate": "Compare numbers of stages, with and without conditioning and filters.",
    "bench": "Measure speed, memory and gradient error against plain PyTorch.",
    "show": "Draw a run's images and accuracy, and print its table.",
    "export": "Write a run's images in the format of MTT's scripts.",
    "config": "Print the settings of a run as TOML, or their JSON Schema.",
    "env": "Show build and environment details and suggest fixes.",
}
_SMALLER = "lower inner_batch, inner_steps, width, union_batch or side_by_side with --set"
# Iterations for which an idle thread of torch's OpenMP library (libgomp) spins before it sleeps,
# about 50 µs. By default it spins for milliseconds on the cores of other processes: two processes
# of the autograd engine on a ResNet-18 took 33.6 s per iteration on two cores, and take 12.1 s with
# this value. One process alone takes 6.4 s with either.
_OPENMP_SPINS = "3000"


class LazyGroup(click.Group):
    """Group that imports a command's module only when it is needed, so that --help is fast."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the names of the commands, in the order of --help."""
        return list(COMMANDS)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse the arguments; without any, print the help on stderr and exit with 2."""
        if not args:
            click.echo(ctx.get_help(), err=True)
            ctx.exit(2)
        return super().parse_args(ctx, args)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Return the command that ``args`` name; suggest a similar name if there is none."""
        name = args[0]
        if name not in COMMANDS and not name.startswith("-"):
            close = difflib.get_close_matches(name.lower(), COMMANDS, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"there are {', '.join(COMMANDS)}"
            ctx.fail(f"no such command {name!r}; {hint}")
        return super().resolve_command(ctx, args)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        """Import and return the command ``name``; None if there is none."""
        if name not in COMMANDS:
            return None
        return import_module(f"pdd_fast.cli.{name}").command

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command; an interrupt becomes click.Abort with the interrupt as its cause."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as error:
            # Click would write to stderr. If its terminal is gone, an OSError would replace the
            # interrupt.
            raise click.Abort from error

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the list of commands from ``COMMANDS``, without importing them."""
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(f"{__version__} (commit {commit()})", prog_name="pdd-fast")
def group() -> None:
    """Progressive dataset distillation: a few synthetic images that train a network almost as well
    as the full data.
    """


class _Signaled(KeyboardInterrupt):
    """Signal that asks the process to end, handled like Ctrl-C."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.exit_status = 128 + number  # as in shells


def _raise(number: int, frame: Any) -> None:
    raise _Signaled(number)


@contextmanager
def _signals() -> Iterator[None]:
    """Let SIGTERM, and SIGHUP of a closed terminal, end the block as Ctrl-C does.

    A signal that the caller ignores stays ignored (nohup), and one whose handler is not Python's
    keeps its handler. Only the main thread may set handlers; in other threads nothing changes.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
    previous = {number: signal.getsignal(number) for number in numbers}
    ours = [number for number, handler in previous.items() if handler not in (signal.SIG_IGN, None)]
    try:
        for number in ours:
            signal.signal(number, _raise)
        yield
    finally:
        for number in ours:
            signal.signal(number, previous[number])


@contextmanager
def _warnings() -> Iterator[None]:
    """Show the package's own warnings as sentences, without a line of source.

    Only the main thread replaces warnings.showwarning. If threads did so at the same time, the last
    one to leave would restore the replacement of another.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    show = warnings.showwarning

    def sentence(message: Warning | str, category: type[Warning], *where: Any, **more: Any) -> None:
        if category.__module__.startswith("pdd_fast"):
            _say(f"warning: {message}")
        else:
            show(message, category, *where, **more)

    warnings.showwarning = sentence
    try:
        yield
    finally:
        warnings.showwarning = show


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and exit.

    The exit status is 0 on success, 1 if the work failed, 2 if the call was wrong, and 128 + n if
    signal n ended the process.

    Args:
        arguments: The arguments; None: those of the process.
    """
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # the caller has closed it
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
        elif isinstance(stream, io.TextIOWrapper):
            # An encoding without ± must not end a run of hours when it prints its table.
            stream.reconfigure(errors="replace")
    _share_cores()
    sys.exit(run(arguments))


def _share_cores() -> None:
    """Let torch's idle threads sleep soon, unless the environment says how they wait.

    libgomp reads the environment once, when torch is imported. A process that has imported torch
    keeps its own behavior and its environment.
    """
    if "torch" not in sys.modules and "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", _OPENMP_SPINS)


def run(arguments: list[str] | None = None) -> int:
    """Do what :func:`main` does without leaving the process; return the exit status.

    Any thread may call it. It restores the signal handlers before it returns.
    """
    try:
        with _signals(), _warnings():
            return _run(arguments)
    except _Signaled as error:  # after the work has ended, before the return
        return error.exit_status


def _run(arguments: list[str] | None) -> int:
    """Run the command line; print every error as one sentence and return the exit status."""
    try:
        return group.main(arguments, prog_name="pdd-fast", standalone_mode=False) or 0
    except click.exceptions.Exit as error:
        return error.exit_code
    except click.ClickException as error:
        return _say(_wrong_call(error), error.exit_code)
    except PddFastError as error:
        return _say(str(error), error.exit_status)
    except (KeyboardInterrupt, click.Abort) as error:
        interrupt = error.__cause__ if isinstance(error, click.Abort) and error.__cause__ else error
        with suppress(OSError, ValueError):
            click.echo(err=True)  # the terminal shows ^C
        _say("interrupted" + _hint(interrupt))
        return interrupt.exit_status if isinstance(interrupt, _Signaled) else 128 + signal.SIGINT
    except OSError as error:
        sentence = error.strerror or first_line(error)
        return _say(
            (f"{sentence}: {error.filename}" if error.filename else sentence) + _hint(error)
        )
    except MemoryError:
        return _say(f"out of memory; {_SMALLER}")
    except Exception as error:
        if _is_out_of_memory(error):
            return _say(f"out of memory; {_SMALLER} ({first_line(error)})")
        return _internal(error)


def _is_out_of_memory(error: Exception) -> bool:
    """Return whether a device had no memory left; without torch, none is used."""
    if "torch" not in sys.modules:
        return False
    from pdd_fast.runtime.device_memory import is_out_of_memory

    return is_out_of_memory(error)


def _wrong_call(error: click.ClickException) -> str:
    """Return Click's message, which has up to three sentences and a usage, as one sentence."""
    sentence = error.format_message().rstrip(".")
    context = getattr(error, "ctx", None)
    if isinstance(error, click.NoSuchOption):  # its message differs between releases
        sentence = f"no such option {error.option_name}{_instead(error)}"
    sentence = sentence[:1].lower() + sentence[1:]
    return (
        sentence
        if context is None or sentence.endswith("?")
        else f"{sentence}; see {context.command_path} --help"
    )


def _instead(error: click.NoSuchOption) -> str:
    """Return the option to use instead of an unknown one, as the end of a sentence."""
    from pdd_fast.cli.options import renamed

    known = error.ctx.command.params if error.ctx is not None else []
    if now := renamed(error.option_name, [name for option in known for name in option.opts]):
        return f"; use {now}"
    return f"; did you mean {error.possibilities[0]}?" if error.possibilities else ""


def _hint(error: BaseException) -> str:
    """Return how to continue, if :func:`pdd_fast.cli.distill.begun` noted it on the error."""
    command = getattr(error, "continue_with", None)
    return f"; continue with: {command}" if command else ""


def _say(sentence: str, status: int = 1) -> int:
    """Print a sentence on stderr and return ``status``."""
    # If the terminal is gone or the stream is closed, the status still counts.
    with suppress(OSError, ValueError):
        click.echo(f"pdd-fast: {sentence}", err=True)
    return status


def _internal(error: Exception) -> int:
    """Report an unexpected error, with its traceback in a file; return the exit status."""
    if os.environ.get("PDD_FAST_TRACEBACK") == "1":
        traceback.print_exception(error)
        return 1
    try:
        handle, name = tempfile.mkstemp(prefix="pdd-fast-", suffix=".txt")
        with os.fdopen(handle, "w", encoding="utf-8", errors="backslashreplace") as file:
            traceback.print_exception(error, file=file)
        details = f"the details are in {name}"
    except OSError:
        details = "PDD_FAST_TRACEBACK=1 shows the details"
    return _say(
        f"internal error: {type(error).__name__}: {first_line(error)}; {details}{_hint(error)}"
    )
