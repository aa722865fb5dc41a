"""Locks on file systems that have none: one process at a time, and nobody kept out by a process
that is gone.
"""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import tiny

from pdd_fast.cli.main import run as command
from pdd_fast.runtime import locks
from pdd_fast.runtime.errors import UsageError
from pdd_fast.runtime.locks import OWNER, locked

pytestmark = pytest.mark.skipif(
    locks.fcntl is None, reason="directories are locked on POSIX systems only"
)

HOLD = """
import errno, os, sys, time, warnings
from pathlib import Path
from pdd_fast.runtime import locks
from pdd_fast.runtime.errors import UsageError

def refuse(*_):
    raise OSError(errno.ENOLCK, "No locks available")

warnings.simplefilter("ignore")
locks.fcntl.flock = refuse
folder = Path(sys.argv[1])
"""
WAIT = """
with locks.locked(folder):
    print("locked", flush=True)
    sys.stdin.read()
"""
# Takes the lock so many times; the marker would be there already if another process had it too.
TAKE_TURNS = """
done = 0
while done < int(sys.argv[2]):
    try:
        with locks.locked(folder):
            os.close(os.open(folder / "inside", os.O_CREAT | os.O_EXCL))
            time.sleep(0.002)
            os.unlink(folder / "inside")
            done += 1
    except UsageError:
        time.sleep(0.001)
"""


@pytest.fixture
def without_locks(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(file: object, operation: int) -> None:
        raise OSError(errno.ENOTSUP, "Operation not supported")

    monkeypatch.setattr(locks.fcntl, "flock", refuse)


def owners(folder: Path) -> list[int]:
    """The numbers of the processes whose files are there."""
    found = [locks._Owner.of_name(path.name) for path in folder.iterdir()]
    return [owner.pid for owner in found if owner is not None]


def holder(folder: Path) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-P", "-c", HOLD + WAIT, str(folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "locked\n"
    return process


@pytest.mark.parametrize("number", [errno.ENOTSUP, errno.ENOLCK, errno.EPERM, errno.ENOSYS])
@pytest.mark.filterwarnings("ignore:the file system")
def test_a_file_takes_the_place_of_a_lock_and_goes_with_the_block(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(file: object, operation: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(locks.fcntl, "flock", refuse)
    said = (
        rf"the file system of {tmp_path} has no locks \({os.strerror(number)}\): "
        rf"{OWNER}-\* in it keeps other"
    )
    with ExitStack() as inside:
        with pytest.warns(UserWarning, match=said):
            inside.enter_context(locked(tmp_path))
        assert owners(tmp_path) == [os.getpid()]
        with (
            pytest.raises(UsageError, match=f"is in use by another process, {os.getpid()}; "),
            locked(tmp_path),
        ):
            pass
        assert owners(tmp_path) == [os.getpid()]
    assert owners(tmp_path) == []


@pytest.mark.filterwarnings("ignore:the file system")
def test_a_block_that_fails_keeps_nobody_out(tmp_path: Path, without_locks: None) -> None:
    with pytest.raises(KeyError), locked(tmp_path):
        raise KeyError
    assert owners(tmp_path) == []


@pytest.mark.filterwarnings("ignore:the file system")
def test_another_process_is_kept_out_until_it_is_gone_however_it_went(
    tmp_path: Path, without_locks: None
) -> None:
    process = holder(tmp_path)
    try:
        with (
            pytest.raises(UsageError, match=f"is in use by another process, {process.pid}; "),
            locked(tmp_path),
        ):
            pass
        os.kill(process.pid, signal.SIGKILL)
        while not os.waitid(
            os.P_PID, process.pid, os.WEXITED | os.WNOWAIT
        ):  # dead, and nobody has waited for it
            pass
        with locked(tmp_path):
            assert owners(tmp_path) == [os.getpid()]
    finally:
        process.kill()
        process.communicate()


def leave(folder: Path, **changes: Any) -> Path:
    """The file of a process that is like this one but for ``changes``."""
    path = folder / locks._Owner.this()._replace(**changes).name
    path.touch()
    return path


@pytest.mark.filterwarnings("ignore:the file system")
@pytest.mark.parametrize(
    "changes",
    [{"started": "1"}, {"boot": "another"}, {"pid": 2**22 + 1}, {"pid": 2**22 + 1, "started": ""}],
    ids=["reused", "rebooted", "dead", "dead, of another system"],
)
def test_what_a_process_left_behind_keeps_nobody_out(
    changes: dict[str, Any], tmp_path: Path, without_locks: None
) -> None:
    leave(tmp_path, **changes)
    leave(tmp_path, pid=2**22 + 2)
    with locked(tmp_path):
        assert owners(tmp_path) == [os.getpid()]
    assert [path.name for path in tmp_path.iterdir()] == [locks.LOCK]


@pytest.mark.filterwarnings("ignore:the file system")
@pytest.mark.parametrize("host", ["elsewhere", "else-where.example.org"])
def test_a_process_of_another_machine_is_named_with_the_file_to_remove(
    host: str, tmp_path: Path, without_locks: None
) -> None:
    path = leave(tmp_path, host=host, pid=7)
    with pytest.raises(UsageError) as caught, locked(tmp_path):
        pass
    assert str(caught.value) == (
        f"{tmp_path} is in use by another process, 7 on {host}; if that has ended, remove {path}"
    )
    assert owners(tmp_path) == [7]
    path.unlink()
    with locked(tmp_path):
        assert owners(tmp_path) == [os.getpid()]


@pytest.mark.filterwarnings("ignore:the file system")
def test_other_files_are_no_locks(tmp_path: Path, without_locks: None) -> None:
    for name in (f"{OWNER}-notes.txt", OWNER, f"{OWNER}-,,,"):
        (tmp_path / name).touch()
    with locked(tmp_path):
        pass
    assert len(list(tmp_path.glob(f"{OWNER}*"))) == 3


def test_processes_take_turns_from_a_file_that_was_left_over_on(tmp_path: Path) -> None:
    leave(tmp_path, pid=2**22 + 1)
    program = [sys.executable, "-P", "-c", HOLD + TAKE_TURNS, str(tmp_path), "15"]
    processes = [subprocess.Popen(program, stderr=subprocess.PIPE, text=True) for _ in range(4)]
    for process in processes:
        _, err = process.communicate(timeout=120)
        assert process.returncode == 0, err
    assert sorted(path.name for path in tmp_path.iterdir()) == [locks.LOCK]


@pytest.mark.filterwarnings("ignore:the file system")
def test_a_run_is_made_and_resumed_without_locks(tmp_path: Path, without_locks: None) -> None:
    run = str(tmp_path / "run")
    assert command(["experts", *tiny.flags(), "--run-dir", run]) == 0
    leave(tmp_path / "run", pid=2**22 + 1)  # as SIGKILL does
    assert command(["distill", "--resume", "--run-dir", run]) == 0
    assert owners(tmp_path / "run") == []
    assert (
        command(["experts", *tiny.flags(device="cuda:99"), "--run-dir", str(tmp_path / "wrong")])
        == 2
    )
    assert not (tmp_path / "wrong").exists()  # nothing was made in it
