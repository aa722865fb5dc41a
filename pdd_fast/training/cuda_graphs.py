"""CUDA graphs: capture a function once, replay it with one launch, upload inputs without a wait.

An iteration on a GPU is thousands of kernels of a few microseconds each, and launching them one by
one takes longer than running them. A graph launches them all at once. In return, every address and
every shape must stay the same.
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
    """Warning that a function runs kernel by kernel because it could not be captured."""


class Graph(Protocol):
    """Result of a capture."""

    def replay(self) -> None:
        """Run the captured work on the current stream."""
        ...


class Backend(Protocol):
    """Way to warm up and capture a function: :class:`CudaBackend`, or a stand-in without a GPU."""

    def warm_up(self, function: Callable[[], None]) -> None:
        """Run ``function`` where it will be captured, in the order of the current stream."""
        ...

    def capture(self, function: Callable[[], None]) -> Graph:
        """Return the graph of ``function``, which is recorded and not run.

        Raises:
            Exception: recording failed. The current stream and device are restored.
        """
        ...


class CudaBackend:
    """Backend that captures on its own stream, because the default stream cannot be captured.

    Args:
        device: GPU to capture on.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)

    def warm_up(self, function: Callable[[], None]) -> None:
        """Run ``function`` on the stream of the capture; see :meth:`Backend.warm_up`."""
        # On the stream of the capture, because cuBLAS keeps a workspace, and the allocator its
        # blocks, per stream.
        with torch.cuda.device(self._device):
            current = torch.cuda.current_stream()
            self._stream.wait_stream(current)
            try:
                with torch.cuda.stream(self._stream):
                    function()
            finally:
                current.wait_stream(self._stream)

    def capture(self, function: Callable[[], None]) -> Graph:
        """Return the graph of ``function``; see :meth:`Backend.capture`."""
        reason = ""
        try:
            # torch.cuda.graph leaves its stream current if ending the capture fails, hence the
            # stream context around it. With thread_local, work of other threads, such as allocating
            # pinned memory, does not disturb the capture.
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
            # Ending a failed capture raises an error of its own, which no longer names the cause.
            raise RuntimeError(reason or first_line(error)) from None
        return graph


class Replay:
    """Call ``function()``, captured as a CUDA graph where possible.

    ``function`` reads and writes fixed tensors only and never waits for the device. On CUDA, the
    first call runs it kernel by kernel: a real step that also serves as warm-up, in which libraries
    choose kernels and allocate. The second call captures it, and that call and all later ones
    replay it. On other devices, or with ``enabled=False``, it is simply called.

    If the capture fails, a :class:`CaptureWarning` gives the reason once and later calls run kernel
    by kernel. A capture records and runs nothing, so no step is lost or repeated.

    Args:
        function: its inputs that change between calls must be in tensors that stay in place. It
            must not reference the object that holds this one, or the memory of the graph would wait
            for the garbage collector.
        device: device of these tensors.
        enabled: whether to capture at all.
        backend: None: :class:`CudaBackend` on CUDA, none elsewhere.
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
        """Whether calls are, or will be, replays."""
        return self._backend is not None

    def __call__(self) -> None:
        """Run, capture or replay the function."""
        if self._backend is None:
            self._function()
            return
        if not self._warm:
            self._backend.warm_up(self._function)
            # Set after the call, so that the next call is the first one again if this one is
            # interrupted.
            self._warm = True
            return
        if self._graph is None:
            reason = self._capture(self._backend)
            if self._graph is None:
                self._backend = None
                warnings.warn(
                    f"the computation could not be captured as a CUDA graph ({reason}); it "
                    "continues kernel by kernel, with the same results but slower",
                    CaptureWarning,
                    stacklevel=2,
                )
                self._function()
                return
        self._graph.replay()

    def _capture(self, backend: Backend) -> str:
        """Set the graph, or return the reason why there is none.

        This is a function of its own because an error that is being handled keeps the memory of the
        capture alive, and the call that follows needs that memory.
        """
        try:
            self._graph = backend.capture(self._function)
        except Exception as error:
            return first_line(error)
        return ""


class Upload:
    """Fixed tensors on a device, filled from the host with one copy without waiting for it.

    The tensors are parts of one buffer. On CUDA, ``DEPTH`` pinned buffers of the same layout fill
    it in turn, so that the host writes the next inputs during the last copy. The host waits only
    before it would overwrite data that is still being copied. On the CPU, the tensors are written
    directly.

    Args:
        shapes: shape and type of every tensor, by name.
        device: device of the tensors.
    """

    DEPTH = 2
    # Bytes, as in CUDA's own allocations: kernels load 16 bytes at once from aligned addresses.
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
        """Fill the tensors with ``sources``, in the order of the current stream.

        Args:
            **sources: one tensor for each name, of the same shape.

        Raises:
            ValueError: a tensor is missing, unknown, or has another shape.
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
    """Host memory of the next upload."""

    pinned: Tensor  # [bytes]
    tensors: dict[str, Tensor]  # its parts
    copied: torch.cuda.Event  # recorded after its last copy
