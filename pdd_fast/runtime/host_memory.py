"""The memory of the machine, or of the control group (container, job) that this process may not
leave.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

# Where Linux tells; tests have it elsewhere.
ROOT = Path("/")
# Of a control group, by version: where groups lie, the limit's file, the usage's, and in
# memory.stat what the usage counts and the system takes back before it refuses anything.
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
    """Bytes that processes can have, used or not; 0 where the system does not say."""
    machine = _meminfo("MemTotal")
    if machine is None:
        machine = _pages()
    return min([machine, *(limit for limit, _ in _limits())])


def free() -> int:
    """Bytes that can be had now without taking them from others; 0 where the system does not
    say."""
    machine = _meminfo("MemAvailable")
    if machine is None:
        machine = _pages()
    return max(0, min([machine, *(limit - used for limit, used in _limits())]))


def _pages() -> int:
    """All of the machine's memory, on systems without /proc."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return 0


def _meminfo(key: str) -> int | None:
    kilobytes = _table(ROOT / "proc/meminfo").get(f"{key}:")
    return None if kilobytes is None else kilobytes * 1024


def _limits() -> Iterator[tuple[int, int]]:
    """Limit and use, in bytes, of the groups that this process is in and that have a limit."""
    for line in _text(ROOT / "proc/self/cgroup").splitlines():
        hierarchy, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        version = 2 if hierarchy == "0" else 1
        if version == 1 and "memory" not in controllers.split(","):
            continue
        base, limit_name, used_name, cache = _VERSIONS[version]
        group = Path(path.lstrip("/"))
        # A limit holds for all groups below. Inside of a container the path may be one that only
        # the host knows; the top is then the container's own.
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
    """None where there is no such file, or "max" in it."""
    text = _text(path).strip()
    return int(text) if text.isdecimal() else None


def _table(path: Path) -> dict[str, int]:
    """Lines of a name and a number."""
    rows = (line.split() for line in _text(path).splitlines())
    return {row[0]: int(row[1]) for row in rows if len(row) >= 2 and row[1].isdecimal()}
