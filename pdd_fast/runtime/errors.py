"""Errors for people: one sentence that says what is wrong with which value and what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class PddFastError(Exception):
    """Base of intentional errors; the command line prints the message without a traceback."""

    exit_status = 1


class UsageError(PddFastError, ValueError):
    """Error for a wrong flag or setting, or an unusable file (exit status 2)."""

    exit_status = 2


class RunError(PddFastError, RuntimeError):
    """Error for work that failed after it began; results so far are saved (exit status 1)."""


class PddFastWarning(UserWarning):
    """Warning that does not stop the work; the command line prints the message alone."""


def first_line(error: BaseException) -> str:
    """Return the first line of a library's error, without its full stop.

    CUDA adds a dozen lines of advice after the line that says what happened.
    """
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")


def nearest(name: str, names: Iterable[str]) -> str:
    """Return "; did you mean ...?" for the name closest to ``name``, or "" if none is close."""
    close = difflib.get_close_matches(name.lower(), list(names), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def require(operator: str, condition: bool, argument: str, requirement: str, value: object) -> None:
    """Raise ValueError unless ``condition`` holds.

    The message is "<operator>: <argument> must <requirement>, got <value>".

    Args:
        operator: function that the argument belongs to.
        condition: whether the argument is valid.
        argument: name of the argument.
        requirement: completes "must ...".
        value: the value that was given.
    """
    if not condition:
        raise ValueError(f"{operator}: {argument} must {requirement}, got {value}")
