"""Call the command line in this process or in one of its own."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from pdd_fast.cli import main as cli


@dataclass(frozen=True)
class Outcome:
    """Result of a call of the command line."""

    status: int
    out: str
    err: str

    def sentence(self) -> str:
        """The one sentence on stderr, without the program's name."""
        assert self.err.startswith("pdd-fast: "), self.err
        assert self.err.count("\n") == 1, self.err
        return self.err.removeprefix("pdd-fast: ").removesuffix("\n")


def call(*arguments: str | Path) -> Outcome:
    """The command line in this process."""
    with redirect_stdout(io.StringIO()) as out, redirect_stderr(io.StringIO()) as err:
        status = cli.run([str(a) for a in arguments])
    return Outcome(status, out.getvalue(), err.getvalue())


def call_main(*arguments: str | Path, encoding: str = "utf-8") -> Outcome:
    """The entry point in this process, as if stdout and stderr had ``encoding``."""
    streams = [io.TextIOWrapper(io.BytesIO(), encoding=encoding) for _ in range(2)]
    with (
        redirect_stdout(streams[0]),
        redirect_stderr(streams[1]),
        pytest.raises(SystemExit) as exit_,
    ):
        cli.main([str(a) for a in arguments])
    for stream in streams:
        stream.seek(0)
    assert isinstance(exit_.value.code, int)
    return Outcome(exit_.value.code, *(stream.read() for stream in streams))


def process(*arguments: str | Path, **options: Any) -> subprocess.Popen[str]:
    """The command line in a process of its own, one thread of it."""
    # -P: the installed package, not the one in the working directory.
    program = [sys.executable, "-P", "-c", "from pdd_fast.cli.main import main; main()"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | options.pop("env", {})
    return subprocess.Popen(
        [*program, *map(str, arguments)],
        text=True,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        **options,
    )
