"""The errors that a person is meant to read: one sentence saying what is wrong with which value and
what to do.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class PddFastError(Exception):
    """Base of the errors raised on purpose; the command line prints the message and no
    traceback."""

    exit_status = 1


class UsageError(PddFastError, ValueError):
    """The call was wrong: a flag, a configuration value, a missing or unusable file (exit status
    2).
    """

    exit_status = 2


class RunError(PddFastError, RuntimeError):
    """The work failed after it had begun; what was computed is kept (exit status 1)."""


class PddFastWarning(UserWarning):
    """Something worth a sentence that does not stop the work; the command line prints the message
    alone.
    """


def first_line(error: BaseException) -> str:
    """What an error of a library says first, without the full stop that would end our sentence.
    CUDA's errors are a dozen lines of advice after the one that says what happened.
    """
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")


def nearest(name: str, names: Iterable[str]) -> str:
    """What to add to a message about a name that is not one of ``names``: the likely one, or
    nothing.
    """
    close = difflib.get_close_matches(name.lower(), list(names), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def require(operator: str, condition: bool, argument: str, requirement: str, value: object) -> None:
    """Raises ``ValueError("<operator>: <argument> must <requirement>, got <value>")`` unless
    ``condition``.
    """
    if not condition:
        raise ValueError(f"{operator}: {argument} must {requirement}, got {value}")
