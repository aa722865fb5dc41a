"""Memory of a device, and the sentence that reports too little of it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pdd_fast.runtime import device_memory
from pdd_fast.runtime import host_memory as host
from pdd_fast.runtime.errors import RunError, UsageError

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no GPU")

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


def segments(*parts: tuple[int, tuple[int, int], int, int]) -> list[dict[str, Any]]:
    """Return torch's snapshot of segments: their GPU, pool, and GB in all and given out."""
    return [
        {
            "device": device,
            "segment_pool_id": pool,
            "total_size": size * 10**9,
            "allocated_size": allocated * 10**9,
        }
        for device, pool, size, allocated in parts
    ]


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU of 80 GB, 30 of them free and 7 in torch's hands, of which 5 are given out."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (30_000_000_000, 80_000_000_000))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 7_000_000_000)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 5_000_000_000)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 6_000_000_000)
    monkeypatch.setattr(torch.cuda, "memory_snapshot", lambda: segments((0, (0, 0), 7, 5)))
    properties = SimpleNamespace(total_memory=80_000_000_000)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)


@pytest.mark.usefixtures("gpu")
def test_what_torch_holds_and_does_not_use_is_available() -> None:
    assert device_memory.available(GPU) == device_memory.free(GPU) == 32_000_000_000
    assert device_memory.available(CPU) is None


@pytest.mark.usefixtures("gpu")
def test_what_captured_graphs_hold_is_not_available(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch has 2 GB that it has not given out; 1 is in the pool of a graph on this GPU."""
    parts = segments((0, (0, 0), 4, 3), (0, (0, 7), 3, 2), (1, (0, 8), 9, 1))
    monkeypatch.setattr(torch.cuda, "memory_snapshot", lambda: parts)
    assert device_memory.available(GPU) == 31_000_000_000


@pytest.mark.usefixtures("gpu")
def test_an_allocator_without_a_snapshot_has_no_pools(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> None:
        raise RuntimeError("cudaMallocAsync does not yet support snapshot")

    monkeypatch.setattr(torch.cuda, "memory_snapshot", refuse)
    assert device_memory.available(GPU) == 32_000_000_000


@pytest.mark.usefixtures("gpu")
def test_what_there_is_in_all_and_what_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "total", lambda: 5)
    monkeypatch.setattr(host, "free", lambda: 3)
    assert (
        device_memory.total(GPU),
        device_memory.total(CPU),
        device_memory.free(CPU, reclaimable=4),
    ) == (80_000_000_000, 5, 7)


@pytest.mark.usefixtures("gpu")
def test_more_than_there_is_is_refused_in_a_sentence() -> None:
    device_memory.require(GPU, 32_000_000_000, "stage 3: an iteration", "width (now 128)")
    device_memory.require(CPU, 10**15, "stage 3: an iteration", "width (now 128)")
    with pytest.raises(UsageError) as raised:
        device_memory.require(
            GPU, 91_200_000_000, "stage 3: an iteration", "inner_batch (now 512) or width (now 128)"
        )
    assert str(raised.value) == (
        "stage 3: an iteration would take about 91 GB and cuda:0 has 32 GB; "
        "lower inner_batch (now 512) or width (now 128)"
    )


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize(
    ("each", "most", "group"),
    [(10**9, 100, 40), (10**9, 16, 16), (3 * 10**10, 16, 1), (10**12, 16, 1), (1, 5, 5), (0, 5, 5)],
)
def test_groups_fill_half_of_the_whole_device(each: int, most: int, group: int) -> None:
    assert device_memory.largest_group(each, GPU, most) == group
    assert device_memory.largest_group(each, GPU, most, shared=10**14) == 1
    assert device_memory.largest_group(each, CPU, most) == 1


@pytest.mark.usefixtures("gpu")
def test_out_of_memory_becomes_a_sentence() -> None:
    with (
        pytest.raises(RunError) as raised,
        device_memory.explained(
            GPU, "stage 3, iteration 12", "inner_batch (now 512) or width (now 128)"
        ),
    ):
        raise torch.OutOfMemoryError(
            "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of ..."
        )
    assert str(raised.value) == (
        "stage 3, iteration 12: cuda:0 is out of memory, with a peak of 6.0 GB of 80 GB; "
        "lower inner_batch (now 512) or width (now 128)"
    )
    assert isinstance(raised.value.__cause__, torch.OutOfMemoryError)


@pytest.mark.usefixtures("gpu")
def test_so_does_a_convolution_without_an_engine() -> None:
    """cuDNN's words where no workspace of a convolution can be allocated."""
    with (
        pytest.raises(RunError, match=r"^work: cuda:0 is out of memory"),
        device_memory.explained(GPU, "work", "x"),
    ):
        raise RuntimeError("GET was unable to find an engine to execute this computation")


def test_so_does_that_of_the_host() -> None:
    sentence = r"work: cpu is out of memory, with a peak of [\d.]+ .B; lower x$"
    with pytest.raises(RunError, match=sentence), device_memory.explained(CPU, "work", "x"):
        torch.empty(2**60, dtype=torch.uint8)
    with pytest.raises(RunError, match=sentence), device_memory.explained(CPU, "work", "x"):
        raise MemoryError


@pytest.mark.parametrize(
    "error", [RuntimeError("shapes differ"), ValueError("no"), KeyboardInterrupt()]
)
def test_other_errors_pass_as_they_are(error: BaseException) -> None:
    with pytest.raises(type(error)) as raised, device_memory.explained(CPU, "work", "x"):
        raise error
    assert raised.value is error


@needs_cuda
def test_a_gpu_that_runs_out_says_so_and_can_be_used_again() -> None:
    sentence = r"work: cuda:0 is out of memory, with a peak of [\d.]+ .B of [\d.]+ GB; lower x$"
    with pytest.raises(RunError, match=sentence), device_memory.explained(GPU, "work", "x"):
        torch.empty(2**50, dtype=torch.uint8, device=GPU)
    assert torch.ones(3, device=GPU).sum().item() == 3
    there = device_memory.available(GPU)
    assert there is not None
    assert 0 < there <= torch.cuda.get_device_properties(GPU).total_memory


@pytest.mark.parametrize(
    ("size", "words"),
    [
        (0, "1 MB"),
        (4_000_000, "4 MB"),
        (151_000_000, "151 MB"),
        (999_000_000, "999 MB"),
        (1_000_000_000, "1.0 GB"),
        (9_940_000_000, "9.9 GB"),
        (10_400_000_000, "10 GB"),
        (91_000_000_000, "91 GB"),
    ],
)
def test_bytes_in_words(size: int, words: str) -> None:
    assert device_memory.format_bytes(size) == words
