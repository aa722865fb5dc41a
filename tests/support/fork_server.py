"""Run Python programs in forks of one process that has imported torch and the package.

The import takes seconds, a fork milliseconds. `forks.py` starts this file with one end of a socket
pair as standard input and the modules to import as arguments. A request is a JSON object with three
file descriptors. The answers are the process id and then the exit status.

The server computes nothing and opens no device. A fork therefore has no threads, random state,
registered methods or CUDA context of another program. It ends like every interpreter, except that
nothing frees the imported modules, which would take a second.
"""

from __future__ import annotations

import atexit
import gc
import importlib
import json
import os
import runpy
import socket
import sys
import threading
from typing import Any

REQUEST = 1 << 20  # bytes, more than any


def serve(connection: socket.socket) -> dict[str, Any]:
    """Fork for every request until there are no more; return the request in a fork."""
    while True:
        message, streams, *_ = socket.recv_fds(connection, REQUEST, 3)
        if not message:
            os._exit(0)
        child = os.fork()
        if child == 0:
            connection.close()
            for target, stream in enumerate(streams):
                os.dup2(stream, target)
                os.close(stream)
            return json.loads(message)
        for stream in streams:
            os.close(stream)
        connection.sendall(b"%d\n" % child)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        connection.sendall(b"%d\n" % status)


def ended(program: str) -> int:
    """Run a file as __main__ and return its exit status, as an interpreter would."""
    try:
        runpy.run_path(program, run_name="__main__")
    except SystemExit as end:
        if isinstance(end.code, int | None):
            return end.code or 0
        print(end.code, file=sys.stderr)
        return 1
    except BaseException:
        sys.excepthook(*sys.exc_info())
        return 1
    return 0


if __name__ == "__main__":
    for name in sys.argv[1:]:
        importlib.import_module(name)
    gc.freeze()  # the collector does not touch, and so copy, what the forks share
    request = serve(socket.socket(fileno=os.dup(0)))
    os.environ.clear()
    os.environ.update(request["environment"])
    os.chdir(request["folder"])
    sys.argv[1:] = request["arguments"]
    status = ended(request["program"])
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
