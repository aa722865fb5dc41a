"""Number of threads that the CPU kernels may use.

It is torch's number, limited by the container's quota. The processors that a thread may run on (its
affinity) can change at any time, so csrc/core/threads.cpp reads them whenever it uses more than one
thread.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

_ROOT, _GROUPS = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")


def threads() -> int:
    """Return the maximum number of threads of a kernel.

    It is ``torch.get_num_threads()``, or the quota rounded up if that is less.
    """
    limit = _limit()
    return torch.get_num_threads() if limit is None else min(torch.get_num_threads(), limit)


@cache
def _limit() -> int | None:
    quota = cgroup_quota(_GROUPS, _ROOT)
    return None if quota is None else max(1, math.ceil(quota))


def cgroup_quota(groups: Path = _GROUPS, root: Path = _ROOT) -> float | None:
    """Return the processor quota of this process's control groups; None if there is none.

    Args:
        groups: file with lines "id:controllers:path"; version 2 has no controllers.
        root: folder where version 2, or a folder per controller of version 1, is mounted. In a
            container, ``path`` may be the host's name for the root, so the root and every group
            above count too.
    """
    found: list[float] = []
    for line in _read(groups).splitlines():
        number, controllers, path = (*line.split(":", 2), "", "")[:3]
        if (number, controllers) == ("0", ""):
            mounts, quota_of = [root, root / "unified"], _quota_2
        elif "cpu" in controllers.split(","):
            mounts, quota_of = [root / controllers, root / "cpu"], _quota_1
        else:
            continue
        for mount in mounts:
            group = mount / path.lstrip("/")
            for folder in {
                mount,
                group,
                *(parent for parent in group.parents if mount in parent.parents),
            }:
                quota = quota_of(folder)
                if quota is not None:
                    found.append(quota)
    return min(found, default=None)


def _quota_2(folder: Path) -> float | None:
    """Read cpu.max: "max 100000" or "150000 100000", microseconds of each period."""
    return _ratio(_read(folder / "cpu.max").split())


def _quota_1(folder: Path) -> float | None:
    """Read cpu.cfs_quota_us (-1 for none) and cpu.cfs_period_us."""
    return _ratio([_read(folder / f"cpu.cfs_{name}_us").strip() for name in ("quota", "period")])


def _ratio(words: list[str]) -> float | None:
    if len(words) != 2 or not all(word.isdecimal() and int(word) > 0 for word in words):
        return None
    return int(words[0]) / int(words[1])


# torch splits an operation on more elements than this among OpenMP's threads. Those then spin for 5
# ms, waiting for the next operation, on cores that the kernels' own threads need. A step of width
# 128 took 1.1 times as long.
_SHARED_BY_TORCH = 32768
_PIECE = 32000  # a multiple of the vector size, so that the bits are those of one thread


def in_pieces(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Yield matching parts of contiguous tensors of one size for elementwise writes.

    The parts are too small for torch to split among threads. On a GPU, or if a tensor is not
    contiguous, the tensors themselves are the only part.
    """
    whole = tensors[0].numel() <= _SHARED_BY_TORCH or tensors[0].device.type != "cpu"
    if whole or not all(tensor.is_contiguous() for tensor in tensors):
        yield tensors
        return
    yield from zip(*(tensor.view(-1).split(_PIECE) for tensor in tensors), strict=True)


def select_rows(tensor: Tensor, index: Tensor) -> Tensor:
    """Return ``tensor.index_select(0, index)``, without OpenMP's threads on a CPU."""
    each = tensor.numel() // max(tensor.shape[0], 1)
    if (
        tensor.device.type != "cpu"
        or index.numel() * each <= _SHARED_BY_TORCH
        or not 0 < each <= _SHARED_BY_TORCH
    ):
        return tensor.index_select(0, index)
    result = tensor.new_empty(len(index), *tensor.shape[1:])
    rows = _SHARED_BY_TORCH // each
    for part, out in zip(index.split(rows), result.split(rows), strict=True):
        torch.index_select(tensor, 0, part, out=out)
    return result


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError):  # not Linux, not mounted, or not readable by this process
        return ""
