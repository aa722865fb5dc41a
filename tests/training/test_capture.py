"""Captures on a GPU's streams: who waits for whom, workspaces, and what a failure leaves behind."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any
from weakref import WeakSet

import pytest
import torch

from pdd_fast.runtime import torch_internals
from pdd_fast.training import cuda_graphs as graphs
from pdd_fast.training.cuda_graphs import CudaBackend, Replay

CUDA = torch.device("cuda", 0)


class FakeCuda:
    """torch.cuda as far as CudaBackend goes: which stream is current, and who waits for whom."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, ends: Exception | None = None) -> None:
        self.log, self.current, self.ends, self.streams = list[str](), "main", ends, 0
        for name in (
            "Stream",
            "current_stream",
            "device",
            "stream",
            "graph",
            "CUDAGraph",
            "graph_pool_handle",
            "synchronize",
        ):
            monkeypatch.setattr(torch.cuda, name, getattr(self, name))
        for name in ("free_cublas_workspaces", "abandon_capture"):
            monkeypatch.setattr(torch_internals, name, getattr(self, name))
        monkeypatch.setattr(graphs, "_BACKENDS", defaultdict(WeakSet))
        monkeypatch.setattr(CudaBackend, "failure", "")

    class _Stream:
        def __init__(self, cuda: FakeCuda, name: str, handle: int = 0) -> None:
            self.cuda, self.name, self.cuda_stream = cuda, name, handle

        def wait_stream(self, other: FakeCuda._Stream) -> None:
            self.cuda.log.append(f"{self.name} waits for {other.name}")

    def Stream(self, device: torch.device) -> FakeCuda._Stream:  # noqa: N802
        self.streams += 1
        return self._Stream(self, "side", self.streams % 32)

    def synchronize(self) -> None:
        self.log.append("synchronize")

    def free_cublas_workspaces(self) -> None:
        self.log.append("free workspaces")

    def graph_pool_handle(self) -> tuple[int, int]:
        return 0, 7

    def abandon_capture(self, graph: object, device: torch.device, pool: tuple[int, int]) -> None:
        self.log.append(f"abandon {device}, {pool}")

    def current_stream(self) -> FakeCuda._Stream:
        return self._Stream(self, self.current)

    @contextmanager
    def device(self, device: torch.device) -> Iterator[None]:
        self.log.append(f"on {device}")
        yield

    @contextmanager
    def stream(self, stream: FakeCuda._Stream) -> Iterator[None]:
        before, self.current = self.current, stream.name
        try:
            yield
        finally:
            self.current = before

    def CUDAGraph(self) -> object:  # noqa: N802
        return object()

    @contextmanager
    def graph(
        self,
        graph: object,
        pool: tuple[int, int],
        stream: FakeCuda._Stream,
        capture_error_mode: str,
    ) -> Iterator[None]:
        assert pool == (0, 7)
        self.current = stream.name
        self.log.append(f"begin on {self.current}, {capture_error_mode}")
        try:
            yield
        finally:
            self.log.append("end")
            if self.ends is not None:
                raise self.ends  # and leaves its stream current, as torch does
        self.current = "main"


def test_the_warm_up_runs_on_the_side_after_what_was_and_before_what_follows(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cuda = FakeCuda(monkeypatch)
    CudaBackend(CUDA).warm_up(lambda: cuda.log.append(f"run on {cuda.current}"))
    assert cuda.log == ["on cuda:0", "side waits for main", "run on side", "main waits for side"]
    assert cuda.current == "main"


def test_a_warm_up_that_fails_is_waited_for_too(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = FakeCuda(monkeypatch)
    with pytest.raises(ZeroDivisionError):
        CudaBackend(CUDA).warm_up(lambda: cuda.log.append(str(1 // 0)))
    assert cuda.log[-1] == "main waits for side"
    assert cuda.current == "main"


def test_a_capture_is_made_on_the_side(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = FakeCuda(monkeypatch)
    assert (
        CudaBackend(CUDA).capture(lambda: cuda.log.append(f"record on {cuda.current}")) is not None
    )
    assert cuda.log == [
        "on cuda:0",
        "synchronize",
        "free workspaces",
        "begin on side, thread_local",
        "record on side",
        "end",
        "free workspaces",
    ]
    assert cuda.current == "main"


def test_streams_of_living_graphs_are_not_used_again(monkeypatch: pytest.MonkeyPatch) -> None:
    FakeCuda(monkeypatch)
    living = [CudaBackend(CUDA) for _ in range(31)]
    handles = [backend._stream.cuda_stream for backend in living]
    assert len(set(handles)) == 31
    for _ in range(5):  # torch's turn comes round to streams of the living
        assert CudaBackend(CUDA)._stream.cuda_stream not in handles
    last = CudaBackend(CUDA)
    assert CudaBackend(CUDA)._stream.cuda_stream in [*handles, last._stream.cuda_stream]


@pytest.mark.parametrize(
    "ends", [None, RuntimeError("operation failed due to a previous error during capture")]
)
def test_a_capture_that_fails_says_why_and_leaves_the_stream_as_it_was(
    monkeypatch: pytest.MonkeyPatch, ends: Exception | None
) -> None:
    def function() -> None:
        raise RuntimeError("operation not permitted when stream is capturing\nand some advice")

    cuda = FakeCuda(monkeypatch, ends)
    with pytest.raises(RuntimeError, match=r"^operation not permitted when stream is capturing$"):
        CudaBackend(CUDA).capture(function)
    assert cuda.current == "main"
    assert cuda.log[-2:] == ["abandon cuda:0, (0, 7)", "free workspaces"]


def test_a_capture_that_only_fails_to_end_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = FakeCuda(monkeypatch, RuntimeError("invalid capture"))
    with pytest.raises(RuntimeError, match="invalid capture"):
        CudaBackend(CUDA).capture(lambda: None)
    assert cuda.current == "main"
    assert cuda.log[-2:] == ["abandon cuda:0, (0, 7)", "free workspaces"]


def test_an_interrupt_during_a_capture_gives_its_memory_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def function() -> None:
        raise KeyboardInterrupt

    cuda = FakeCuda(monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        CudaBackend(CUDA).capture(function)
    assert cuda.log[-2:] == ["abandon cuda:0, (0, 7)", "free workspaces"]
    assert not CudaBackend.failure


@pytest.mark.parametrize(
    ("words", "remembered"),
    [("operation not permitted", True), ("CUDA out of memory. Tried to allocate 2 GiB", False)],
)
def test_after_a_failure_the_process_captures_no_more_unless_memory_was_short(
    monkeypatch: pytest.MonkeyPatch, words: str, remembered: bool
) -> None:
    def function() -> None:
        raise RuntimeError(words)

    FakeCuda(monkeypatch)
    with pytest.raises(RuntimeError):
        CudaBackend(CUDA).capture(function)
    assert Replay(lambda: None, CUDA).captures == (not remembered)


@pytest.mark.parametrize("ended", [True, False])
@pytest.mark.parametrize("done_by_torch", [True, False])
def test_an_abandoned_capture_ends_and_frees_its_pool(
    monkeypatch: pytest.MonkeyPatch, ended: bool, done_by_torch: bool
) -> None:
    log: list[Any] = []

    class Graph:
        def pool(self) -> tuple[int, int]:
            if not ended:
                raise RuntimeError("without a preceding successful capture")
            return 0, 7

        def reset(self) -> None:
            log.append("reset")

    def finish(name: str, device: int, pool: tuple[int, int]) -> None:
        log.append((name, device, pool))
        if done_by_torch:
            raise RuntimeError("not currently recording to mempool_id")

    for name in ("_cuda_endAllocateToPool", "_cuda_releasePool"):
        monkeypatch.setattr(torch._C, name, partial(finish, name), raising=False)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    torch_internals.abandon_capture(Graph(), CUDA, (0, 7))  # type: ignore[arg-type]
    end, free = ("_cuda_endAllocateToPool", 0, (0, 7)), ("_cuda_releasePool", 0, (0, 7))
    steps = [] if ended else [end] if done_by_torch else [end, free]
    assert log == ["reset", *steps]


@pytest.mark.skipif(torch.version.cuda is None, reason="torch finds no GPU: it has no CUDA")
def test_torch_has_the_private_functions_of_captures() -> None:
    for name in ("clearCublasWorkspaces", "endAllocateToPool", "releasePool"):
        assert callable(getattr(torch._C, f"_cuda_{name}"))
