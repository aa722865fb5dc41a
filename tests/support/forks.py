"""Run Python programs in processes of their own without the seconds of importing torch."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

SERVER = Path(__file__).with_name("fork_server.py")
# For programs that distill. matplotlib is left out: it reads MPLBACKEND when it is imported.
DISTILLING = (
    "torch._dynamo",  # by torch.optim, at the first optimizer
    "scipy.stats",
    "sklearn.datasets",
    "pdd_fast.cli.distill",
    "pdd_fast.cli.evaluate",
)
# Read when a process starts or imports torch, which the server has done.
FIXED = ("MALLOC_MMAP_THRESHOLD_", "MKL_NUM_THREADS", "OMP_NUM_THREADS", "PYTHONSAFEPATH")


class Forks:
    """Client of fork_server.py; it runs one program at a time.

    Args:
        connection: End of a socket pair whose other end the server has.
        environment: Changes of this process's environment, for all programs.
    """

    def __init__(self, connection: socket.socket, environment: Mapping[str, str]) -> None:
        self._connection, self._environment = connection, dict(environment)
        self._answers = connection.makefile("rb")

    @classmethod
    @contextmanager
    def started(
        cls, imports: Sequence[str] = DISTILLING, environment: Mapping[str, str] | None = None
    ) -> Iterator[Forks]:
        """Start a server that imports these modules, and end it after the block."""
        changes = dict(environment or {})
        ours, theirs = socket.socketpair()
        command = [sys.executable, "-P", str(SERVER), *imports]
        with ours, subprocess.Popen(command, stdin=theirs, env=os.environ | changes) as server:
            theirs.close()
            try:
                yield cls(ours, changes)
            finally:
                server.terminate()

    def python(
        self,
        program: str | Path,
        arguments: Sequence[str] = (),
        *,
        folder: Path,
        environment: Mapping[str, str | None] | None = None,
    ) -> subprocess.CompletedProcess[str]:
        """Run a Python file, or code, in ``folder``.

        Args:
            program: The file, or the code as text.
            arguments: The rest of sys.argv.
            folder: Working directory.
            environment: More changes of the environment; None removes a variable.

        Returns:
            Exit status and texts on stdout and stderr.
        """
        changes = dict(environment or {})
        assert not set(changes) & set(FIXED)
        with tempfile.TemporaryDirectory() as own:
            if isinstance(program, str):
                code, program = program, Path(own, "program.py")
                program.write_text(code, encoding="utf-8")
            changed = os.environ | self._environment | changes
            request = {
                "program": str(program),
                "arguments": list(arguments),
                "folder": str(folder),
                "environment": {k: v for k, v in changed.items() if v is not None},
            }
            out, err = Path(own, "stdout"), Path(own, "stderr")
            with open(os.devnull) as stdin, open(out, "w") as stdout, open(err, "w") as stderr:
                streams = [stream.fileno() for stream in (stdin, stdout, stderr)]
                socket.send_fds(self._connection, [json.dumps(request).encode()], streams)
            self._answers.readline()  # the process id
            status = int(self._answers.readline())
            texts = (path.read_text(encoding="utf-8") for path in (out, err))
            return subprocess.CompletedProcess([str(program), *arguments], status, *texts)
