"""Memory of the machine, or of the control group (container, job) of this process."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

# Root of the files in which Linux reports memory; tests replace it.
ROOT = Path("/")
# Per version of control groups: their folder, the files of limit and use, and the key in
# memory.stat of the memory that the use counts but the system reclaims before it refuses an
# allocation.
_VERSIONS = {
    2: ("sys/fs/cgroup", "memory.max", "memory.current", "inactive_file"),
    1: (
        "sys/fs/cgroup/memory",
        "memory.limit_in_bytes",
        "memory.usage_in_bytes",
        "total_inactive_file",
    ),
}


def total() -> int:
    """Return the bytes available to processes in all; 0 if the system does not say."""
    machine = _meminfo("MemTotal")
    if machine is None:
        machine = _pages()
    return min([machine, *(limit for limit, _ in _limits())])


def free() -> int:
    """Return the bytes available now; 0 if the system does not say."""
    machine = _meminfo("MemAvailable")
    if machine is None:
        machine = _pages()
    return max(0, min([machine, *(limit - used for limit, used in _limits())]))


def _pages() -> int:
    """Return the machine's memory on systems without /proc."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return 0


def _meminfo(key: str) -> int | None:
    kilobytes = _table(ROOT / "proc/meminfo").get(f"{key}:")
    return None if kilobytes is None else kilobytes * 1024


def _limits() -> Iterator[tuple[int, int]]:
    """Yield limit and use, in bytes, of the limited control groups of this process."""
    for line in _text(ROOT / "proc/self/cgroup").splitlines():
        hierarchy, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        version = 2 if hierarchy == "0" else 1
        if version == 1 and "memory" not in controllers.split(","):
            continue
        base, limit_name, used_name, cache = _VERSIONS[version]
        group = Path(path.lstrip("/"))
        # A limit holds for all groups below it. In a container, the path may be one that only the
        # host knows; the top is then the container's own group.
        for part in dict.fromkeys([group, *group.parents, Path()]):
            folder = ROOT / base / part
            limit, used = _number(folder / limit_name), _number(folder / used_name)
            if limit is not None and used is not None:
                yield limit, used - _table(folder / "memory.stat").get(cache, 0)


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError):
        return ""


def _number(path: Path) -> int | None:
    """Return the number in a file; None if there is no such file or it holds "max"."""
    text = _text(path).strip()
    return int(text) if text.isdecimal() else None


def _table(path: Path) -> dict[str, int]:
    """Return lines of a name and a number as a dictionary."""
    rows = (line.split() for line in _text(path).splitlines())
    return {row[0]: int(row[1]) for row in rows if len(row) >= 2 and row[1].isdecimal()}
