"""Locks that keep other processes out of a directory."""

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
except ImportError:  # not a POSIX system; directories are not locked there
    fcntl = None  # type: ignore[assignment]

LOCK, OWNER = ".lock", ".lock-owner"  # OWNER is used if the file system has no locks
_HELD = (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES)
# For processes that come at the same time: attempts, and the longest pause in seconds.
_ATTEMPTS, _PAUSE = (5, 0.05)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep other processes out of ``folder`` while the block runs.

    A process that ended in any way keeps nobody out. If the file system has no locks, a file that
    is created exclusively and names the process replaces them.

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
        "processes out",
        PddFastWarning,
        stacklevel=3,
    )
    with _owned(folder):
        yield


@contextmanager
def _owned(folder: Path) -> Iterator[None]:
    """Lock ``folder`` by a file whose name identifies the process.

    Each process first creates its own file and then looks for those of others, so at least one of
    two sees the other and gives up. No process removes the file of another that may be alive. Names
    are never reused, so a leftover file cannot be mistaken for a new one.
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
    """Process with its machine, distinct from a later process of the same number."""

    host: str
    pid: int
    started: str  # in ticks since the machine started
    boot: str  # identifier of the machine's boot

    @classmethod
    def this(cls) -> _Owner:
        return cls(_host(), os.getpid(), _started(os.getpid()), _boot())

    @classmethod
    def of_name(cls, name: str) -> _Owner | None:
        """Return the process that a file's name identifies; None for other files."""
        found = re.fullmatch(rf"{re.escape(OWNER)}-(.*),(\d{{1,9}}),(\d*),(\w*)", name)
        return cls(found[1], int(found[2]), found[3], found[4]) if found else None

    @property
    def name(self) -> str:
        return f"{OWNER}-{self.host},{self.pid},{self.started},{self.boot}"

    @property
    def is_gone(self) -> bool:
        """Whether the process has ended; False if it runs on another machine and may be alive."""
        if self.host != _host():
            return False
        if self.boot != _boot():
            return True
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return True
        except OSError:  # another user's process
            pass
        return self.started != _started(self.pid)


def _other(folder: Path, own: _Owner) -> tuple[Path, _Owner] | None:
    """Return another process's file in ``folder``, and remove those of ended processes."""
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
    """Return the machine's name in characters that every file system accepts."""
    return re.sub(r"[^\w.-]", "_", socket.gethostname(), flags=re.ASCII)


def _boot() -> str:
    """Return an identifier of the machine's current boot; "" if the system does not say."""
    with suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip().replace("-", "")
    return ""


def _started(pid: int) -> str:
    """Return when a process began, in ticks since the machine started.

    The result is "" if the system does not say, or if the process is a zombie.
    """
    with suppress(OSError, IndexError):
        # The name in parentheses may hold any characters. The state follows it directly, and the
        # start 19 fields later.
        fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
        return "" if fields[0] in "ZX" else fields[19]
    return ""
