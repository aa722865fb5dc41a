"""CUDA graphs: a function is captured once and replayed with one launch, and its inputs are
uploaded without a wait.

An iteration on a GPU is thousands of kernels of a few microseconds each; launching them one by one
takes longer than running them. A graph launches them all at once, at the price that every address
and every shape stays what it was.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from pdd_fast.runtime.errors import first_line


class CaptureWarning(UserWarning):
    """A function could not be captured and runs kernel by kernel instead: the same results,
    slower."""


class Graph(Protocol):
    """What a capture gives."""

    def replay(self) -> None:
        """Does on the current stream what was captured."""
        ...


class Backend(Protocol):
    """How a function is warmed up and captured; :class:`CudaBackend`, or a stand-in where there is
    no GPU.
    """

    def warm_up(self, function: Callable[[], None]) -> None:
        """Runs ``function`` where it will be captured, between what was and what will be on the
        current stream.
        """
        ...

    def capture(self, function: Callable[[], None]) -> Graph:
        """The graph of ``function``, which is recorded and not run.

        Raises:
            Exception: it could not be recorded. Stream and device are again what they were.
        """
        ...


class CudaBackend:
    """Captures on a stream of its own: the default stream cannot be captured."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)

    def warm_up(self, function: Callable[[], None]) -> None:
        # On the stream of the capture, because cuBLAS keeps one workspace a stream and the
        # allocator its blocks.
        with torch.cuda.device(self._device):
            current = torch.cuda.current_stream()
            self._stream.wait_stream(current)
            try:
                with torch.cuda.stream(self._stream):
                    function()
            finally:
                current.wait_stream(self._stream)

    def capture(self, function: Callable[[], None]) -> Graph:
        reason = ""
        try:
            # torch.cuda.graph leaves its stream current where ending the capture fails, hence the
            # stream context around it. thread_local: what another thread does meanwhile, such as
            # allocating pinned memory, disturbs nothing.
            with torch.cuda.device(self._device), torch.cuda.stream(self._stream):
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(
                    graph, stream=self._stream, capture_error_mode="thread_local"
                ):
                    try:
                        function()
                    except Exception as error:
                        reason = first_line(error)
                        raise
        except Exception as error:
            # Ending a capture that went wrong raises an error of its own, which no longer says what
            # went wrong.
            raise RuntimeError(reason or first_line(error)) from None
        return graph


class Replay:
    """``function()``, which reads and writes fixed tensors only and never waits for the device.

    On CUDA it runs kernel by kernel at the first call (a real step, and the warm-up at once:
    libraries choose kernels and allocate), is captured at the second and replayed from then on.
    Elsewhere, or with ``enabled=False``, it is simply called. Where it cannot be captured, a
    :class:`CaptureWarning` says why, once, and it goes on being called: a capture records and runs
    nothing, so nothing is lost and nothing happens twice.

    Args:
        function: whatever it reads that changes between calls lies in tensors that stay where they
            are. It must not hold the object that holds this one: the memory of a graph would wait
            for the garbage collector.
        device: of these tensors.
        enabled: whether to capture at all.
        backend: how; None: :class:`CudaBackend` on CUDA, none elsewhere.
    """

    def __init__(
        self,
        function: Callable[[], None],
        device: torch.device,
        enabled: bool = True,
        *,
        backend: Backend | None = None,
    ) -> None:
        if enabled and backend is None and device.type == "cuda":
            backend = CudaBackend(device)
        self._function = function
        self._backend = backend if enabled else None
        self._warm = False
        self._graph: Graph | None = None

    @property
    def captures(self) -> bool:
        """Whether calls are, or are going to be, replays."""
        return self._backend is not None

    def __call__(self) -> None:
        if self._backend is None:
            self._function()
            return
        if not self._warm:
            self._backend.warm_up(self._function)
            self._warm = (
                True  # only now: where the call was interrupted, the next is a first one again
            )
            return
        if self._graph is None:
            reason = self._capture(self._backend)
            if self._graph is None:
                self._backend = None
                warnings.warn(
                    f"the computation could not be captured as a CUDA graph ({reason}); it goes "
                    f"on kernel by kernel, "
                    "with the same results but slower",
                    CaptureWarning,
                    stacklevel=2,
                )
                self._function()
                return
        self._graph.replay()

    def _capture(self, backend: Backend) -> str:
        """Sets the graph, or says why there is none. A function of its own: an error that is being
        handled keeps alive what the capture had allocated, and the call that follows needs that
        memory.
        """
        try:
            self._graph = backend.capture(self._function)
        except Exception as error:
            return first_line(error)
        return ""


class Upload:
    """Fixed tensors on a device, filled from the host with one copy that the host does not wait
    for.

    The tensors are parts of one buffer. On CUDA it is filled through pinned buffers of the same
    layout, ``DEPTH`` of them in turn, so that the host writes the next inputs while the last copy
    is still under way; it waits only where it would overwrite what is still being copied. On the
    CPU the tensors are written directly.

    Args:
        shapes: for every name, shape and type of a tensor.
        device: where the tensors lie.
    """

    DEPTH = 2
    # bytes, as CUDA's own allocations have: kernels load 16 at once where an address allows it
    ALIGNMENT = 256

    def __init__(
        self, shapes: Mapping[str, tuple[Sequence[int], torch.dtype]], device: torch.device
    ) -> None:
        self._device = device
        self._layout: dict[str, tuple[slice, Sequence[int], torch.dtype]] = {}
        total = 0
        for name, (shape, dtype) in shapes.items():
            size = math.prod(shape) * dtype.itemsize
            self._layout[name] = (slice(total, total + size), shape, dtype)
            total += -(-size // self.ALIGNMENT) * self.ALIGNMENT
        self._buffer = torch.empty(total, dtype=torch.uint8, device=device)
        self.tensors = self._views(self._buffer)
        self._stages: list[_Stage] = []
        if device.type == "cuda":
            for _ in range(self.DEPTH):
                pinned = torch.empty(total, dtype=torch.uint8, pin_memory=True, device="cpu")
                self._stages.append(_Stage(pinned, self._views(pinned), torch.cuda.Event()))
        self._turn = 0

    def _views(self, buffer: Tensor) -> dict[str, Tensor]:
        layout = self._layout.items()
        return {
            name: buffer[part].view(dtype).view(tuple(shape))
            for name, (part, shape, dtype) in layout
        }

    def write(self, **sources: Tensor) -> None:
        """Fills the tensors with ``sources``, one for each, of the same shapes; in the order of the
        current stream.

        Raises:
            ValueError: a tensor is missing, is one too many, or has another shape.
        """
        if sources.keys() != self.tensors.keys():
            raise ValueError(
                f"Upload: sources must be {', '.join(self.tensors)}, got {', '.join(sources)}"
            )
        for name, source in sources.items():
            shape = tuple(self.tensors[name].shape)
            if tuple(source.shape) != shape:  # copy_ would broadcast
                raise ValueError(
                    f"Upload: {name} must have shape {shape}, got {tuple(source.shape)}"
                )
        if not self._stages:
            for name, source in sources.items():
                self.tensors[name].copy_(source)
            return
        stage = self._stages[self._turn]
        self._turn = (self._turn + 1) % self.DEPTH
        stage.copied.synchronize()
        for name, source in sources.items():
            stage.tensors[name].copy_(source)
        with torch.cuda.device(self._device):
            self._buffer.copy_(stage.pinned, non_blocking=True)
            stage.copied.record()


class _Stage(NamedTuple):
    """Where the host writes what is uploaded next."""

    pinned: Tensor  # [bytes]
    tensors: dict[str, Tensor]  # its parts
    copied: torch.cuda.Event  # after its last copy; there is nothing to wait for before the first
