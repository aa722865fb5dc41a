"""The machine's memory, as Linux tells it of a machine, of a job and of a container; and where
nobody tells.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from pdd_fast.runtime import host_memory as host

GB = 10**9


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine of 64 MiB, half of them free, and no control groups."""
    monkeypatch.setattr(host, "ROOT", tmp_path)
    write(
        tmp_path / "proc/meminfo",
        "MemTotal:  65536 kB\nMemFree:  1 kB\nMemAvailable:  32768 kB\nHugePages_Total: 0\n",
    )
    return tmp_path


def write(path: Path, text: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"{text}\n")


def group(folder: Path, limit: object, used: int, cache: int = 0) -> None:
    """A control group of version 2."""
    write(folder / "memory.max", limit)
    write(folder / "memory.current", used)
    write(folder / "memory.stat", f"anon 1\ninactive_file {cache}")


def test_without_groups_the_machine_is_what_there_is(root: Path) -> None:
    assert (host.total(), host.free()) == (65536 * 1024, 32768 * 1024)


def test_a_groups_limit_counts_where_it_is_lower(root: Path) -> None:
    write(root / "proc/self/cgroup", "0::/jobs/one")
    group(root / "sys/fs/cgroup/jobs/one", "max", 5)
    group(root / "sys/fs/cgroup/jobs", 1_000_000, 400_000, cache=100_000)
    assert (host.total(), host.free()) == (1_000_000, 700_000)
    group(root / "sys/fs/cgroup/jobs/one", 600_000, 250_000)
    assert (host.total(), host.free()) == (600_000, 350_000)
    group(
        root / "sys/fs/cgroup/jobs/one", 2 * GB, 700_000_000
    )  # more than the machine has, and hardly in use
    group(root / "sys/fs/cgroup/jobs", "max", 700_000_000)
    assert (host.total(), host.free()) == (65536 * 1024, 32768 * 1024)


def test_a_container_sees_its_own_group_at_the_top(root: Path) -> None:
    write(root / "proc/self/cgroup", "0::/docker/only-the-host-knows")
    group(root / "sys/fs/cgroup", 2_000_000, 500_000)
    assert (host.total(), host.free()) == (2_000_000, 1_500_000)


def test_the_first_version_of_groups(root: Path) -> None:
    write(root / "proc/self/cgroup", "5:devices:/\n4:memory,other:/jobs/one\n0::/")
    folder = root / "sys/fs/cgroup/memory/jobs/one"
    write(folder / "memory.limit_in_bytes", 3_000_000)
    write(folder / "memory.usage_in_bytes", 1_000_000)
    write(folder / "memory.stat", "inactive_file 5\ntotal_inactive_file 200000")
    write(root / "sys/fs/cgroup/memory/memory.limit_in_bytes", 9223372036854771712)
    write(root / "sys/fs/cgroup/memory/memory.usage_in_bytes", 4_000_000)
    assert (host.total(), host.free()) == (3_000_000, 2_200_000)


def test_a_group_that_is_full_has_nothing(root: Path) -> None:
    write(root / "proc/self/cgroup", "0::/")
    group(root / "sys/fs/cgroup", 1000, 1200)
    assert host.free() == 0


def test_without_proc_the_systems_pages_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host, "ROOT", tmp_path)
    sizes = {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": 10}
    monkeypatch.setattr(os, "sysconf", lambda name: sizes[name])
    assert host.total() == host.free() == 40960
    monkeypatch.delattr(os, "sysconf")
    assert host.total() == host.free() == 0


def test_this_machine_has_memory() -> None:
    assert 0 <= host.free() <= host.total()
    assert host.total() > 0
