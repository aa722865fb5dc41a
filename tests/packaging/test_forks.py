"""Programs that the tests run in forks see what a fresh interpreter would show them."""

from __future__ import annotations

import signal
from pathlib import Path

from forks import Forks

STATE = """
import os, signal, sys, threading
import torch
from pdd_fast.runtime.registry import METHODS
from pdd_fast.methods import DistributionMatching, register

print(__name__, os.getcwd(), sorted(os.listdir()), os.environ.get("EXTRA"), sys.argv[1:])
print(threading.active_count(), torch.get_num_threads(), "matplotlib" in sys.modules)
print(signal.getsignal(signal.SIGINT) is signal.default_int_handler, torch.initial_seed())
print(signal.getsignal(signal.SIGTERM) == signal.SIG_DFL, torch.cuda.is_initialized())
print("own" in METHODS, sys.stdin.read() == "")
register("own", DistributionMatching)
torch.manual_seed(7), torch.set_num_threads(3), signal.signal(signal.SIGTERM, signal.SIG_IGN)
os.environ["EXTRA"] = "changed"
os.chdir("/")
"""


def test_a_program_sees_nothing_of_the_one_before(forks: Forks, tmp_path: Path) -> None:
    found = [
        forks.python(STATE, ["a"], folder=tmp_path, environment={"EXTRA": "1"}) for _ in range(2)
    ]
    assert found[0].stdout == found[1].stdout
    assert found[0].stdout.startswith(f"__main__ {tmp_path} [] 1 ['a']\n1 ")
    assert found[0].stdout.splitlines()[1].endswith("False")
    assert found[0].stdout.splitlines()[2].startswith("True ")
    assert found[0].stdout.splitlines()[3:] == ["True False", "False True"]
    assert (found[0].stderr, found[0].returncode) == ("", 0)


def test_a_program_ends_as_in_an_interpreter(forks: Forks, tmp_path: Path) -> None:
    def result(code: str) -> tuple[int, str, str]:
        found = forks.python(code, folder=tmp_path)
        return found.returncode, found.stdout, found.stderr

    assert result("import atexit\natexit.register(print, 'bye')\nraise SystemExit(3)") == (
        3,
        "bye\n",
        "",
    )
    assert result("raise SystemExit('no')") == (1, "", "no\n")
    status, out, err = result("print('before')\n1 / 0")
    assert (status, out) == (1, "before\n")
    assert err.endswith("ZeroDivisionError: division by zero\n")
    assert result("import os, signal\nos.kill(os.getpid(), signal.SIGKILL)")[0] == -signal.SIGKILL
