"""The entry point: finds commands, and turns every error into one sentence and an exit status."""

from __future__ import annotations

import os
import signal
import sys
import tempfile
import traceback
from importlib import import_module
from pathlib import Path
from typing import Any

import click

from pdd_fast._version import __version__
from pdd_fast.errors import PddFastError

COMMANDS = {  # name -> what --help says; a command's module is imported when the command is run
    "distill": "Distil a data set in stages, judge it, draw it.",
    "experts": "Train and store expert trajectories.",
    "evaluate": "Train fresh networks on a run's unions and report their test accuracy.",
    "show": "Draw a run's images and accuracy, and print its table.",
    "env": "What was built, what was found, what to do about it.",
}
INTERRUPTED, TERMINATED = 130, 143  # what shells expect after SIGINT and SIGTERM


class LazyGroup(click.Group):
    """Imports a command's module only when it is needed, so that --help answers at once."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in COMMANDS:
            return None
        return import_module(f"pdd_fast.cli.{name}").command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="pdd-fast")
def group() -> None:
    """Progressive dataset distillation: a few synthetic images that train a network almost as well as the full data."""


class _Terminated(KeyboardInterrupt):
    """SIGTERM, on the same way out as Ctrl-C."""


def _terminate(signum: int, frame: Any) -> None:
    raise _Terminated


def main(arguments: list[str] | None = None) -> None:
    """Runs the command line and exits: 0 done, 1 the work failed, 2 the call was wrong, 130 or 143 interrupted."""
    signal.signal(signal.SIGTERM, _terminate)
    sys.exit(run(arguments))


def run(arguments: list[str] | None = None) -> int:
    """:func:`main` without leaving the process; the exit status."""
    try:
        return group.main(arguments, prog_name="pdd-fast", standalone_mode=False) or 0
    except click.exceptions.Exit as error:
        return error.exit_code
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except PddFastError as error:
        return _say(str(error), error.exit_status)
    except (KeyboardInterrupt, click.Abort) as error:
        hint = getattr(error, "continue_with", None) or getattr(error.__cause__, "continue_with", None)
        _say("interrupted" + (f"; continue with: {hint}" if hint else ""))
        return TERMINATED if isinstance(error, _Terminated) or isinstance(error.__cause__, _Terminated) else INTERRUPTED
    except OSError as error:
        return _say(f"{error.strerror or error}: {error.filename}" if error.filename else str(error))
    except MemoryError:
        return _say("out of memory; lower inner_batch, inner_steps, width or union_batch with --set")
    except Exception as error:
        if "out of memory" in str(error).lower():
            return _say(
                f"out of memory; lower inner_batch, inner_steps, width or union_batch with --set ({_line(error)})"
            )
        return _internal(error)


def _line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _say(sentence: str, status: int = 1) -> int:
    click.echo(f"pdd-fast: {sentence}", err=True)
    return status


def _internal(error: Exception) -> int:
    if os.environ.get("PDD_FAST_TRACEBACK") == "1":
        traceback.print_exc()
        return 1
    handle, name = tempfile.mkstemp(prefix="pdd-fast-", suffix=".txt")
    with os.fdopen(handle, "w") as file:
        traceback.print_exc(file=file)
    return _say(f"internal error: {type(error).__name__}: {_line(error)}; the details are in {Path(name)}")
