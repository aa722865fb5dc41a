"""The threads of the kernels on the CPU: how many there are, where they may run, and that results
do not show them.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import Tensor

import pdd_fast
from pdd_fast.engines import FusedEngine
from pdd_fast.ops import _native, _threads
from pdd_fast.ops._threads import cgroup_quota

pytestmark = pytest.mark.skipif(_native.load("cpu") is None, reason="the kernels were not built")
needs_two = pytest.mark.skipif(
    not hasattr(os, "sched_getaffinity")
    or len(os.sched_getaffinity(0)) < 2
    or _threads._limit() == 1,
    reason="needs two processors",
)

# Defines run(batch, size, width), a gradient, and helpers(): for each thread of the pool, on how
# many processors it may run.
PROGRAM = """
import os, sys, torch, pdd_fast
from pathlib import Path
from pdd_fast.engines import FusedEngine
torch.set_num_threads(2)

def run(batch, size, width):
    torch.manual_seed(0)
    net = pdd_fast.ConvNet(1, 10, size, width, 2)
    images, labels = torch.randn(batch, 1, size, size), torch.arange(batch) % 10
    return FusedEngine(net).gradient(pdd_fast.flatten_parameters(net), images, labels)[1]

def helpers():
    found = []
    for task in Path("/proc/self/task").iterdir():
        if (task / "comm").read_text().strip() == "pdd-fast":
            found.append(len(os.sched_getaffinity(int(task.name))))
    return found
"""


def printed(code: str, **environment: str) -> list[str]:
    result = subprocess.run(
        [sys.executable, "-P", "-c", PROGRAM + code],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.splitlines()


@needs_two
def test_tiny_regions_start_no_thread_and_large_ones_do() -> None:
    code = "run(1, 4, 8); print(len(helpers())); run(40, 32, 64); print(len(helpers()))"
    assert printed(code, OMP_NUM_THREADS="2") == ["0", "1"]


@needs_two
def test_a_process_on_one_processor_starts_no_thread() -> None:
    one = "os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})\n"
    assert printed(one + "run(40, 32, 64); print(len(helpers()))", OMP_NUM_THREADS="2") == ["0"]


@needs_two
def test_threads_bound_by_openmp_do_not_share_one_processor() -> None:
    """The calling thread then has one of the places, which is not all that the process may use."""
    code = "run(40, 32, 64); print(*helpers(), len(os.sched_getaffinity(0)))"
    (line,) = printed(code, OMP_NUM_THREADS="2", OMP_PROC_BIND="true")
    of_helper, of_caller = map(int, line.split())
    assert of_caller == 1
    assert of_helper == len(os.sched_getaffinity(0))


@needs_two
def test_a_forked_process_computes_the_same_with_threads_of_its_own() -> None:
    # Fewer numbers in every tensor than torch shares among threads: OpenMP's do not survive a fork,
    # and hang.
    code = """
before = run(20, 32, 48)
child = os.fork()
if child == 0:
    same = not helpers() and torch.equal(run(20, 32, 48), before) and len(helpers()) == 1
    os._exit(0 if same else 1)
print(os.waitpid(child, 0)[1])
"""
    assert printed(code, OMP_NUM_THREADS="2") == ["0"]


@pytest.mark.usefixtures("every_region_shared")
@pytest.mark.parametrize("shape", [(3, 8, 16), (20, 8, 32), (7, 16, 20)], ids=str)
def test_the_same_bits_for_every_number_of_threads_and_from_several_callers(
    shape: tuple[int, int, int],
) -> None:
    batch, size, width = shape
    net = pdd_fast.ConvNet(3, 10, size, width, 2)
    theta, direction = (
        pdd_fast.flatten_parameters(net),
        torch.randn(sum(p.numel() for p in net.parameters())),
    )
    images, labels = torch.randn(batch, 3, size, size), torch.arange(batch) % 10

    def found() -> list[Tensor]:
        engine = FusedEngine(net)
        losses, gradient, saved = engine.gradient(theta, images, labels, keep=True)
        dual = engine.dual(theta, images, labels, direction, saved)
        assert dual.theta is not None
        assert dual.images is not None
        return [losses, gradient, dual.slope, dual.theta, dual.images]

    torch.set_num_threads(1)
    expected = found()
    for count in (2, 3, 7, 40):
        torch.set_num_threads(count)
        assert all(torch.equal(a, b) for a, b in zip(found(), expected, strict=True))
    start = threading.Barrier(3)

    def many(_: int) -> bool:
        torch.set_num_threads(3)
        start.wait()
        return all(
            torch.equal(a, b) for _ in range(30) for a, b in zip(found(), expected, strict=True)
        )

    with ThreadPoolExecutor(3) as pool:
        assert all(pool.map(many, range(3)))


# ---- the container's quota ----


def write(folder: Path, **files: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text + "\n", encoding="utf-8")


@pytest.mark.parametrize(
    ("groups", "files", "quota"),
    [
        ("0::/", {"": {"cpu__max": "150000 100000"}}, 1.5),
        ("0::/", {"": {"cpu__max": "max 100000"}}, None),
        ("0::/", {}, None),
        # The path is the host's name for the root; a service within a slice, whose limits are all
        # in force.
        ("0::/docker/abc", {"": {"cpu__max": "200000 100000"}}, 2.0),
        ("0::/a/b", {"a": {"cpu__max": "50000 100000"}, "a/b": {"cpu__max": "400000 100000"}}, 0.5),
        ("0::/a/b", {"a/b": {"cpu__max": "300000 100000"}}, 3.0),
        (
            "11:memory:/x\n4:cpu,cpuacct:/docker/abc\n0::/",
            {"cpu,cpuacct": {"cpu__cfs_quota_us": "250000", "cpu__cfs_period_us": "100000"}},
            2.5,
        ),
        (
            "4:cpu,cpuacct:/k/pod",
            {
                "cpu,cpuacct": {"cpu__cfs_quota_us": "-1", "cpu__cfs_period_us": "100000"},
                "cpu,cpuacct/k/pod": {"cpu__cfs_quota_us": "400000", "cpu__cfs_period_us": "50000"},
            },
            8.0,
        ),
        ("3:cpu:/", {"cpu": {"cpu__cfs_quota_us": "-1", "cpu__cfs_period_us": "100000"}}, None),
        (
            "5:cpuset:/",
            {"cpuset": {"cpu__cfs_quota_us": "100000", "cpu__cfs_period_us": "100000"}},
            None,
        ),
        ("0::/", {"": {"cpu__max": "garbage"}}, None),
        ("0::/", {"": {"cpu__max": "100000 0"}}, None),
        ("garbage", {}, None),
        ("", {"": {"cpu__max": "100000 100000"}}, None),
    ],
)
def test_the_quota_is_the_least_of_all_groups_above(
    groups: str, files: dict[str, dict[str, str]], quota: float | None, tmp_path: Path
) -> None:
    write(tmp_path, groups=groups)
    for folder, content in files.items():
        write(tmp_path / "mounted" / folder, **content)
    assert cgroup_quota(tmp_path / "groups", tmp_path / "mounted") == quota


def test_without_control_groups_there_is_no_quota(tmp_path: Path) -> None:
    assert cgroup_quota(tmp_path / "missing", tmp_path) is None


@pytest.mark.parametrize(
    ("quota", "expected"), [(None, 4), (0.3, 1), (1.0, 1), (1.5, 2), (64.0, 4)]
)
def test_no_more_threads_than_the_quota_rounded_up(
    quota: float | None, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_threads, "cgroup_quota", lambda *_: quota)
    _threads._limit.cache_clear()
    try:
        torch.set_num_threads(4)
        assert _threads.threads() == expected
    finally:
        _threads._limit.cache_clear()


# ---- operations of torch that leave OpenMP's threads asleep ----


@pytest.mark.parametrize("numbers", [1, 32768, 32769, 96000, 100001])
def test_pieces_are_all_of_the_tensors_and_too_small_to_be_shared(numbers: int) -> None:
    first, second, out = torch.randn(numbers), torch.randn(numbers), torch.empty(numbers)
    for a, b, c in _threads.in_pieces(first, second, out):
        assert a.numel() <= 32768
        torch.addcmul(a, b, torch.tensor(0.3), value=-1, out=c)
    torch.set_num_threads(1)
    assert torch.equal(out, torch.addcmul(first, second, torch.tensor(0.3), value=-1))


def test_pieces_of_images_and_of_what_is_not_contiguous() -> None:
    images = torch.randn(20, 3, 32, 32)
    expected = images * 2
    for (piece,) in _threads.in_pieces(images):
        piece.mul_(2)
    assert torch.equal(images, expected)
    apart = torch.randn(2 * 40000)[::2]
    assert next(_threads.in_pieces(apart)) == (apart,)


@pytest.mark.parametrize(
    "shape", [(5,), (5, 7), (20, 3, 32, 32), (3, 1, 200, 200), (4, 0, 3)], ids=str
)
@pytest.mark.parametrize("count", [0, 1, 33])
def test_rows_are_selected_as_torch_does(shape: tuple[int, ...], count: int) -> None:
    tensor, index = torch.randn(shape), torch.randint(shape[0], (count,))
    assert torch.equal(_threads.select_rows(tensor, index), tensor.index_select(0, index))
    turned = torch.randn(shape[::-1]).permute(*reversed(range(len(shape))))
    assert torch.equal(_threads.select_rows(turned, index), turned.index_select(0, index))
