"""How many threads the kernels on the CPU may use: torch's number, and no more than the container's
quota allows.

The processors that a thread may run on (its affinity) can change at any time: csrc/core/threads.cpp
asks for them when it is about to use more than one.
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
    """The most threads of a kernel: ``torch.get_num_threads()``, or the quota, rounded up, where
    that is less.
    """
    limit = _limit()
    return torch.get_num_threads() if limit is None else min(torch.get_num_threads(), limit)


@cache
def _limit() -> int | None:
    quota = cgroup_quota(_GROUPS, _ROOT)
    return None if quota is None else max(1, math.ceil(quota))


def cgroup_quota(groups: Path = _GROUPS, root: Path = _ROOT) -> float | None:
    """Processors whose time this process may use, by its control groups; None where there is no
    quota.

    Args:
        groups: lines "id:controllers:path", without controllers in version 2.
        root: where version 2, or a folder for each controller of version 1, is mounted. Within a
            container ``path`` may be the host's name for what is the root there, so the root counts
            too, and every group above.
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
    """cpu.max: "max 100000" or "150000 100000", microseconds of each period."""
    return _ratio(_read(folder / "cpu.max").split())


def _quota_1(folder: Path) -> float | None:
    """cpu.cfs_quota_us, -1 for none, and cpu.cfs_period_us."""
    return _ratio([_read(folder / f"cpu.cfs_{name}_us").strip() for name in ("quota", "period")])


def _ratio(words: list[str]) -> float | None:
    if len(words) != 2 or not all(word.isdecimal() and int(word) > 0 for word in words):
        return None
    return int(words[0]) / int(words[1])


# torch shares an operation on more numbers than this among OpenMP's threads. Those then spin for 5
# ms, waiting for the next one, on the cores that the kernels' own threads want meanwhile: a step of
# width 128 took 1.1 times as long.
_SHARED_BY_TORCH = 32768
_PIECE = 32000  # whole vectors, so that the bits are those of one thread


def in_pieces(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The same parts of contiguous tensors of one size, too small for torch to share among threads;
    on a GPU, or where one is not contiguous, the tensors themselves. For operations element by
    element that write to one of them.
    """
    whole = tensors[0].numel() <= _SHARED_BY_TORCH or tensors[0].device.type != "cpu"
    if whole or not all(tensor.is_contiguous() for tensor in tensors):
        yield tensors
        return
    yield from zip(*(tensor.view(-1).split(_PIECE) for tensor in tensors), strict=True)


def select_rows(tensor: Tensor, index: Tensor) -> Tensor:
    """``tensor.index_select(0, index)``, without OpenMP's threads on a CPU."""
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
    except (OSError, ValueError):  # not Linux, not mounted, or not for this process to read
        return ""
