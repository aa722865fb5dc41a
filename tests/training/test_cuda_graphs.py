"""Capture and replay: who is called when, what a failure leaves behind, and inputs that arrive
whole.
"""

from __future__ import annotations

import gc
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any
from weakref import WeakValueDictionary

import pytest
import torch
from torch import Tensor

from pdd_fast.runtime import torch_internals
from pdd_fast.training import cuda_graphs as graphs
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


# ---- streams ----


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
        monkeypatch.setattr(graphs, "_STREAMS", WeakValueDictionary())
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
    assert Replay(Counter(), CUDA).captures == (not remembered)


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
    torch_internals.abandon_capture(Graph(), CUDA, (0, 7))  # type: ignore[arg-type]
    steps = [("_cuda_endAllocateToPool", 0, (0, 7)), ("_cuda_releasePool", 0, (0, 7))]
    assert log == ["reset", *([] if ended else steps)]


@pytest.mark.skipif(torch.version.cuda is None, reason="this build of torch has no CUDA")
def test_torch_has_the_private_functions_of_captures() -> None:
    for name in ("clearCublasWorkspaces", "endAllocateToPool", "releasePool"):
        assert callable(getattr(torch._C, f"_cuda_{name}"))


# ---- uploads ----

SHAPES: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
    "vector": ((5,), torch.float32),
    "flag": ((), torch.bool),
    "matrix": ((3, 7), torch.float64),
    "indices": ((2, 2), torch.int64),
    "small": ((3,), torch.int32),
}


def drawn(seed: int) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return {
        name: torch.randint(0, 2, shape, generator=draw).to(dtype)
        for name, (shape, dtype) in SHAPES.items()
    }


def test_every_write_arrives_whole_in_the_same_place(device: torch.device) -> None:
    upload = Upload(SHAPES, device)
    places = {name: tensor.data_ptr() for name, tensor in upload.tensors.items()}
    seen = []
    for seed in range(10):
        sources = drawn(seed)
        upload.write(**sources)
        seen.append({name: tensor.clone() for name, tensor in upload.tensors.items()})
        for source in sources.values():
            source.zero_()  # the caller's again at once, though the copy may be under way
    for seed, found in enumerate(seen):
        for name, expected in drawn(seed).items():
            assert found[name].dtype == expected.dtype
            assert torch.equal(found[name].cpu(), expected), (seed, name)
    assert {name: tensor.data_ptr() for name, tensor in upload.tensors.items()} == places
    assert all(place % 16 == 0 for place in places.values())


def test_sources_may_have_any_strides_and_another_type(device: torch.device) -> None:
    upload = Upload({"matrix": ((3, 7), torch.float64)}, device)
    source = torch.arange(21).view(7, 3).t()
    upload.write(matrix=source)
    assert torch.equal(upload.tensors["matrix"].cpu(), source.double())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"vector": None},
            "sources must be vector, flag, matrix, indices, small, got flag, matrix, indices, "
            "small",
        ),
        ({"other": torch.zeros(1)}, "sources must be vector, .*, got .*, other"),
        ({"vector": torch.zeros(1)}, r"vector must have shape \(5,\), got \(1,\)"),
    ],
)
def test_sources_that_do_not_fit_are_named_and_nothing_is_written(
    change: dict[str, Tensor | None], message: str
) -> None:
    upload = Upload(SHAPES, CPU)
    upload.write(**drawn(0))
    sources = {name: source for name, source in (drawn(1) | change).items() if source is not None}
    with pytest.raises(ValueError, match=message):
        upload.write(**sources)
    for name, expected in drawn(0).items():
        assert torch.equal(upload.tensors[name], expected)


def test_a_buffer_is_written_again_only_after_its_last_copy(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    log: list[str] = []

    class Event:
        def __init__(self, name: str) -> None:
            self.name = name

        def synchronize(self) -> None:
            log.append(f"wait for {self.name}")

        def record(self) -> None:
            log.append(f"{self.name} under way")

    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    upload = Upload(SHAPES, CPU)
    for name in "ab":
        pinned = torch.empty_like(upload._buffer)
        upload._stages.append(graphs._Stage(pinned, upload._views(pinned), Event(name)))  # type: ignore[arg-type]
    for seed in range(4):
        upload.write(**drawn(seed))
        for name, expected in drawn(seed).items():
            assert torch.equal(upload.tensors[name], expected)
        if seed > 0:  # the other buffer, whose copy may not have begun
            for name, expected in drawn(seed - 1).items():
                assert torch.equal(upload._stages[(seed - 1) % 2].tensors[name], expected)
    assert log == ["wait for a", "a under way", "wait for b", "b under way"] * 2


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
    check_on(CUDA)


@needs_cuda
def test_a_graph_outlives_forty_others_with_matrix_products() -> None:
    """The workspace of its product is not freed with a graph that had the same stream."""
    expected, product = Product(CUDA), Product(CUDA)
    replay = Replay(product, CUDA)
    eager, _ = after(expected, expected, 6), after(product, replay, 3)
    for _ in range(40):
        other = Product(CUDA)
        after(other, Replay(other, CUDA), 3)
        del other
        torch.cuda.empty_cache()
    # What is freed must be in use by others when the graph is replayed.
    filled = [torch.full((1 << 20,), float("nan"), device=CUDA) for _ in range(64)]
    product.out.zero_()
    assert torch.equal(after(product, replay, 6), eager)
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
