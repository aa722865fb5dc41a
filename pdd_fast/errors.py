"""The errors that a person is meant to read: one sentence saying what is wrong with which value and what to do."""


class PddFastError(Exception):
    """Base of the errors raised on purpose; the command line prints the message and no traceback."""

    exit_status = 1


class UsageError(PddFastError, ValueError):
    """The call was wrong: a flag, a configuration value, a missing or unusable file (exit status 2)."""

    exit_status = 2


class RunError(PddFastError, RuntimeError):
    """The work failed after it had begun; what was computed is kept (exit status 1)."""
