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
# Read when torch is imported, which the server has done.
FIXED = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "PYTHONSAFEPATH")


class Forks:
    """Client of fork_server.py; it runs one program at a time.

    Args:
        connection: End of a socket pair whose other end the server has.
    """

    def __init__(self, connection: socket.socket) -> None:
        self._connection, self._answers = connection, connection.makefile("rb")

    @classmethod
    @contextmanager
    def started(cls) -> Iterator[Forks]:
        """Start the server, and end it after the block."""
        ours, theirs = socket.socketpair()
        with ours, subprocess.Popen([sys.executable, "-P", str(SERVER)], stdin=theirs) as server:
            theirs.close()
            yield cls(ours)
            server.terminate()

    def python(
        self,
        program: str | Path,
        arguments: Sequence[str] = (),
        *,
        folder: Path,
        environment: Mapping[str, str] | None = None,
    ) -> subprocess.CompletedProcess[str]:
        """Run a Python file, or code, in ``folder``.

        Args:
            program: The file, or the code as text.
            arguments: The rest of sys.argv.
            folder: Working directory.
            environment: Changes of this process's environment.

        Returns:
            Exit status and texts on stdout and stderr.
        """
        changes = dict(environment or {})
        assert not set(changes) & set(FIXED)
        with tempfile.TemporaryDirectory() as own:
            if isinstance(program, str):
                code, program = program, Path(own, "program.py")
                program.write_text(code, encoding="utf-8")
            request = {
                "program": str(program),
                "arguments": list(arguments),
                "folder": str(folder),
                "environment": os.environ | changes,
            }
            out, err = Path(own, "stdout"), Path(own, "stderr")
            with open(os.devnull) as stdin, open(out, "w") as stdout, open(err, "w") as stderr:
                streams = [stream.fileno() for stream in (stdin, stdout, stderr)]
                socket.send_fds(self._connection, [json.dumps(request).encode()], streams)
            self._answers.readline()  # the process id
            status = int(self._answers.readline())
            texts = (path.read_text(encoding="utf-8") for path in (out, err))
            return subprocess.CompletedProcess([str(program), *arguments], status, *texts)
