"""Capture and replay: who is called when, and what a failure leaves behind."""

from __future__ import annotations

import gc
import warnings
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from pdd_fast.training.cuda_graphs import CaptureWarning, CudaBackend, Graph, Replay, Upload

CPU = torch.device("cpu")
CUDA = torch.device("cuda", 0)
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no GPU")
needs_two = pytest.mark.skipif(
    torch.cuda.device_count() < 2, reason="torch finds less than two GPUs"
)


class Fake:
    """A backend that does as CUDA does: a capture runs nothing, a replay runs what was captured."""

    def __init__(self, failure: BaseException | None = None) -> None:
        self.failure, self.log = failure, list[str]()

    def warm_up(self, function: Callable[[], None]) -> None:
        self.log.append("warm up")
        function()

    def capture(self, function: Callable[[], None]) -> Graph:
        self.log.append("capture")
        if self.failure is not None:
            raise self.failure
        return FakeGraph(self.log, function)


class FakeGraph:
    def __init__(self, log: list[str], function: Callable[[], None]) -> None:
        self._log, self._function = log, function

    def replay(self) -> None:
        self._log.append("replay")
        self._function()


class Counter:
    def __init__(self) -> None:
        self.calls = 0

    def __call__(self) -> None:
        self.calls += 1


# ---- the order of things ----


def test_the_first_call_warms_up_the_second_captures_and_every_call_is_one_run() -> None:
    counter, fake = Counter(), Fake()
    replay = Replay(counter, CPU, backend=fake)
    for calls in range(1, 5):
        replay()
        assert counter.calls == calls
    assert fake.log == ["warm up", "capture", "replay", "replay", "replay"]
    assert replay.captures


@pytest.mark.parametrize("options", [{}, {"enabled": False, "backend": Fake()}, {"enabled": False}])
def test_without_a_gpu_or_not_enabled_it_is_simply_called(options: dict[str, Any]) -> None:
    counter = Counter()
    replay = Replay(counter, CPU, **options)
    for _ in range(3):
        replay()
    assert counter.calls == 3
    assert not replay.captures
    assert not options.get("backend", Fake()).log


def test_a_capture_that_fails_warns_once_and_every_call_still_is_one_run() -> None:
    counter, fake = (
        Counter(),
        Fake(RuntimeError("operation not permitted.\nCompile with TORCH_USE_CUDA_DSA")),
    )
    replay = Replay(counter, CPU, backend=fake)
    with warnings.catch_warnings(record=True, action="always") as seen:
        for calls in range(1, 5):
            replay()
            assert counter.calls == calls
    assert [w.category for w in seen] == [CaptureWarning]
    assert [str(w.message) for w in seen] == [
        "the computation could not be captured as a CUDA graph (operation not permitted); it "
        "continues kernel by kernel, with the same results but slower"
    ]
    assert fake.log == ["warm up", "capture"]
    assert not replay.captures


def test_a_failure_without_words_is_called_by_its_type() -> None:
    replay = Replay(Counter(), CPU, backend=Fake(NotImplementedError()))
    replay()
    with pytest.warns(CaptureWarning, match=r"\(NotImplementedError\)"):
        replay()


def test_what_a_failed_capture_held_is_gone_when_the_call_is_made_after_all() -> None:
    class Memory:
        pass

    held: list[weakref.ref[Memory]] = []
    seen: list[bool] = []

    class Failing(Fake):
        def capture(self, function: Callable[[], None]) -> Graph:
            memory = Memory()
            held.append(weakref.ref(memory))
            raise RuntimeError("no")

    replay = Replay(
        lambda: seen.append(bool(held) and held[0]() is not None), CPU, backend=Failing()
    )
    replay()
    gc.disable()
    try:
        with pytest.warns(CaptureWarning):
            replay()
    finally:
        gc.enable()
    assert len(held) == 1
    assert seen == [False, False]


def test_an_interrupted_first_call_is_a_first_call_again() -> None:
    stops = iter([KeyboardInterrupt(), None, None])

    def function() -> None:
        stop = next(stops)
        if stop is not None:
            raise stop

    fake = Fake()
    replay = Replay(function, CPU, backend=fake)
    with pytest.raises(KeyboardInterrupt):
        replay()
    replay()
    replay()
    assert fake.log == ["warm up", "warm up", "capture", "replay"]


def test_an_interrupted_capture_is_made_at_the_next_call() -> None:
    counter, fake = Counter(), Fake()
    replay = Replay(counter, CPU, backend=fake)
    replay()
    fake.failure = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        replay()
    assert counter.calls == 1
    fake.failure = None
    with warnings.catch_warnings(action="error"):
        replay()
    assert counter.calls == 2
    assert fake.log == ["warm up", "capture", "capture", "replay"]


# ---- on a GPU ----


class Product:
    """out = matrix @ vector + total of what was; enough for cuBLAS to want its workspace."""

    def __init__(self, device: torch.device) -> None:
        draw = torch.Generator().manual_seed(0)
        self.matrix = torch.randn(300, 300, generator=draw).to(device)
        self.upload = Upload({"vector": ((300,), torch.float32)}, device)
        self.out = torch.zeros(300, device=device)

    def __call__(self) -> None:
        self.out.add_(self.matrix @ self.upload.tensors["vector"])


def after(product: Product, replay: Callable[[], None], calls: int) -> Tensor:
    for seed in range(calls):
        product.upload.write(vector=torch.randn(300, generator=torch.Generator().manual_seed(seed)))
        replay()
    return product.out.cpu()


def check_on(device: torch.device) -> None:
    expected = Product(device)
    eager = after(expected, expected, 6)
    captured = Product(device)
    replay = Replay(captured, device)
    assert torch.equal(after(captured, replay, 6), eager)
    assert replay.captures


@needs_cuda
def test_replays_with_new_inputs_give_the_bits_of_calls() -> None:
    check_on(CUDA)


@needs_cuda
def test_on_a_stream_that_is_not_the_default() -> None:
    with torch.cuda.stream(torch.cuda.Stream()):
        check_on(CUDA)


@needs_two
def test_on_a_second_gpu_while_the_first_is_current() -> None:
    check_on(torch.device("cuda", 1))
    assert torch.cuda.current_device() == 0


@needs_cuda
def test_a_replay_does_not_wait_for_the_device() -> None:
    product = Product(CUDA)
    replay = Replay(product, CUDA)
    after(product, replay, 3)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for seed in range(4):
            product.upload.write(vector=torch.full((300,), float(seed)))
            replay()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@needs_cuda
def test_what_cannot_be_captured_on_a_gpu_goes_on_and_leaves_it_usable() -> None:
    product = Product(CUDA)

    def waiting() -> None:
        product()
        float(product.out[0])

    replay, stream = Replay(waiting, CUDA), torch.cuda.current_stream()
    with pytest.warns(CaptureWarning, match="could not be captured"):
        found = after(product, replay, 5)
    assert torch.cuda.current_stream() == stream
    expected = Product(CUDA)
    assert torch.equal(found, after(expected, expected, 5))
    assert CudaBackend.failure  # so that the process tries no more
    CudaBackend.failure = ""
    check_on(CUDA)


@needs_cuda
def test_a_graph_outlives_forty_others_with_matrix_products() -> None:
    """The workspace of its product is not freed with a graph that had the same stream."""

    def product(out: Tensor) -> None:
        out.add_(matrix @ matrix.T)  # a sum so long that cuBLAS splits it, in a workspace

    matrix = torch.randn(64, 65536, device=CUDA)
    out = torch.zeros(64, 64, device=CUDA)
    replay = Replay(partial(product, out), CUDA)
    for _ in range(3):
        replay()
    assert replay.captures
    expected = out.clone()
    for _ in range(40):
        other = Replay(partial(product, torch.zeros(64, 64, device=CUDA)), CUDA)
        for _ in range(3):
            other()
        del other
        torch.cuda.empty_cache()
    # Freed memory must be in use by others when the graph is replayed.
    filled = [torch.full((1 << 20,), float("nan"), device=CUDA) for _ in range(64)]
    out.zero_()
    for _ in range(3):
        replay()
    assert torch.equal(out, expected)
    assert all(bool(part.isnan().all()) for part in filled)


@needs_cuda
def test_the_memory_of_a_graph_goes_with_its_replay() -> None:
    def fill(out: Tensor) -> None:
        out.copy_(torch.ones(1 << 24, device=CUDA).cumsum(0)[:1])

    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved()
    replay = Replay(partial(fill, torch.zeros(1, device=CUDA)), CUDA)
    for _ in range(3):
        replay()
    torch.cuda.synchronize()
    assert torch.cuda.memory_reserved() > before
    del replay
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved() <= before + (
        1 << 22
    )  # 4 MiB: what a library may have taken for good
