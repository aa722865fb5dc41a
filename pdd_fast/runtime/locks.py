"""Keep other processes out of a directory."""

from __future__ import annotations

import errno
import os
import random
import re
import socket
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from pdd_fast.runtime.errors import PddFastWarning, UsageError

try:
    import fcntl
except ImportError:  # not a POSIX system: directories are not locked there
    fcntl = None  # type: ignore[assignment]

LOCK, OWNER = ".lock", ".lock-owner"  # the second where the file system has no locks
_HELD = (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES)
_ATTEMPTS, _PAUSE = (
    5,
    0.05,
)  # of processes that come at the same time, and seconds between them, at most


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep other processes out of ``folder`` while the block runs; a process that ended, however it
    ended, keeps nobody out.

    Where the file system has no locks, a file that is made exclusively names the process in their
    place.

    Raises:
        UsageError: another process works in this directory.
    """
    if fcntl is None:
        yield
        return
    with (folder / LOCK).open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in _HELD:
                raise UsageError(f"{folder} is in use by another process") from error
            reason = error.strerror or str(error)
        else:
            yield
            return
    warnings.warn(
        f"the file system of {folder} has no locks ({reason}): {OWNER}-* in it keeps other "
        f"processes out",
        PddFastWarning,
        stacklevel=3,
    )
    with _owned(folder):
        yield


@contextmanager
def _owned(folder: Path) -> Iterator[None]:
    """:func:`locked` by a file whose name is the process that works there.

    Each process first makes its own file and then looks for those of others, so of two at least one
    sees the other and goes back. Nobody removes the file of a process that may be alive, and a name
    never comes again: there is no moment in which a file that was left over could be mistaken for a
    new one.
    """
    own = _Owner.this()
    path = folder / own.name
    for attempt in range(_ATTEMPTS):
        try:
            os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
        except FileExistsError:  # another thread of this process
            raise _in_use(path, own) from None
        other = _other(folder, own)
        if other is None:
            break
        path.unlink()
        if attempt + 1 == _ATTEMPTS:
            raise _in_use(*other)
        time.sleep(random.uniform(0, _PAUSE))
    try:
        yield
    finally:
        path.unlink(missing_ok=True)


class _Owner(NamedTuple):
    """A process, told from a later one of the same number, and its machine."""

    host: str
    pid: int
    started: str  # in ticks since the machine was
    boot: str  # what tells this run of the machine from others

    @classmethod
    def this(cls) -> _Owner:
        return cls(_host(), os.getpid(), _started(os.getpid()), _boot())

    @classmethod
    def of_name(cls, name: str) -> _Owner | None:
        """The process that a file's name says; None where it is no such file."""
        found = re.fullmatch(rf"{re.escape(OWNER)}-(.*),(\d{{1,9}}),(\d*),(\w*)", name)
        return cls(found[1], int(found[2]), found[3], found[4]) if found else None

    @property
    def name(self) -> str:
        return f"{OWNER}-{self.host},{self.pid},{self.started},{self.boot}"

    @property
    def is_gone(self) -> bool:
        """Whether the process has ended. False where that cannot be known, because it runs on
        another machine.
        """
        if self.host != _host():
            return False
        if self.boot != _boot():
            return True
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return True
        except OSError:  # it is another user's
            pass
        return self.started != _started(self.pid)


def _other(folder: Path, own: _Owner) -> tuple[Path, _Owner] | None:
    """Another process's file in ``folder``; those of processes that are gone are removed."""
    for path in folder.glob(f"{OWNER}-*"):
        owner = _Owner.of_name(path.name)
        if owner is None or owner == own:
            continue
        if not owner.is_gone:
            return path, owner
        path.unlink(missing_ok=True)
    return None


def _in_use(path: Path, owner: _Owner) -> UsageError:
    where = "" if owner.host == _host() else f" on {owner.host}"
    return UsageError(
        f"{path.parent} is in use by another process, {owner.pid}{where}; if that has ended, "
        f"remove {path}"
    )


def _host() -> str:
    """The machine's name, of characters that every file system takes."""
    return re.sub(r"[^\w.-]", "_", socket.gethostname(), flags=re.ASCII)


def _boot() -> str:
    """Return an identifier of the machine's current boot; "" where the system does not say."""
    with suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip().replace("-", "")
    return ""


def _started(pid: int) -> str:
    """When a process began, in ticks since the machine did; "" where the system does not say, or
    the process is a zombie, which has ended but was not waited for.
    """
    with suppress(OSError, IndexError):
        # The name in parentheses may hold anything; 0 and 19 fields after it come the state and the
        # start.
        fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
        return "" if fields[0] in "ZX" else fields[19]
    return ""
