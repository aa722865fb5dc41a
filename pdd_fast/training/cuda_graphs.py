"""CUDA graphs: capture a function once, replay it with one launch, upload inputs without a wait.

An iteration on a GPU is thousands of kernels of a few microseconds each, and launching them one by
one takes longer than running them. A graph launches them all at once. In return, every address and
every shape must stay the same.
"""

from __future__ import annotations

import math
import warnings
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar, NamedTuple, Protocol
from weakref import WeakSet

import torch
from torch import Tensor

from pdd_fast.engines import Engine, FusedEngine
from pdd_fast.ops import _native
from pdd_fast.runtime import torch_internals
from pdd_fast.runtime.device_memory import is_out_of_memory
from pdd_fast.runtime.errors import first_line


def can_capture(engine: Engine, device: torch.device) -> bool:
    """Return whether work of ``engine`` can be captured as a CUDA graph.

    The autograd engine reads random states, and the plain-torch operators read values from the
    device. Neither can be captured.
    """
    return (
        device.type == "cuda"
        and isinstance(engine, FusedEngine)
        and _native.load("cuda") is not None
    )


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

    cuBLAS keeps a workspace per stream, whose address a graph records. It must lie in the private
    memory pool of the graph: torch frees the workspace of a stream when any graph that was captured
    on it is destroyed, and a graph whose workspace was in ordinary memory would then write to
    memory of others (https://github.com/pytorch/pytorch/issues/193402). Workspaces are therefore
    freed directly before a capture, which allocates new ones in its pool, and directly after it, so
    that no later work uses those of the graph.

    Args:
        device: GPU to capture on.
    """

    # Why a capture failed in this process. Later ones would fail too, and are not tried.
    failure: ClassVar[str] = ""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = _unused_stream(device, self)

    def warm_up(self, function: Callable[[], None]) -> None:
        """Run ``function`` on the stream of the capture; see :meth:`Backend.warm_up`."""
        # On the stream of the capture, because the allocator keeps its blocks per stream.
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
        # torch.cuda.graph leaves its stream current if ending the capture fails, hence the stream
        # context around it. With thread_local, work of other threads, such as allocating pinned
        # memory, does not disturb the capture.
        with torch.cuda.device(self._device), torch.cuda.stream(self._stream):
            graph, pool = torch.cuda.CUDAGraph(), torch.cuda.graph_pool_handle()
            torch.cuda.synchronize()
            torch_internals.free_cublas_workspaces()
            try:
                with torch.cuda.graph(
                    graph, pool=pool, stream=self._stream, capture_error_mode="thread_local"
                ):
                    try:
                        function()
                    except Exception as error:
                        reason = first_line(error)
                        raise
            except Exception as error:
                torch_internals.abandon_capture(graph, self._device, pool)
                # Ending a failed capture raises an error of its own, which no longer names the
                # cause.
                reason = reason or first_line(error)
                # With less other memory in use, the same capture may succeed.
                lasting = not is_out_of_memory(error) and not is_out_of_memory(RuntimeError(reason))
            except BaseException:
                torch_internals.abandon_capture(graph, self._device, pool)
                raise
            else:
                return graph
            finally:
                torch_internals.free_cublas_workspaces()
        if lasting:
            CudaBackend.failure = reason
        raise RuntimeError(reason)


# Living backends by the handle of their stream.
_BACKENDS: defaultdict[int, WeakSet[CudaBackend]] = defaultdict(WeakSet)
_POOL_STREAMS = 32  # streams that torch hands out in turn, per GPU


def _unused_stream(device: torch.device, backend: CudaBackend) -> torch.cuda.Stream:
    """Return a stream on which no living graph was captured, as long as there is one."""
    for _ in range(_POOL_STREAMS):
        stream = torch.cuda.Stream(device)
        if not _BACKENDS[stream.cuda_stream]:
            break
    _BACKENDS[stream.cuda_stream].add(backend)
    return stream


class Replay:
    """Call ``function()``, captured as a CUDA graph where possible.

    ``function`` reads and writes fixed tensors only and never waits for the device. On CUDA, the
    first call runs it kernel by kernel: a real step that also serves as warm-up, in which libraries
    choose kernels and allocate. The second call captures it, and that call and all later ones
    replay it. On other devices, or with ``enabled=False``, it is simply called.

    If the capture fails, a :class:`CaptureWarning` gives the reason once, and later calls of the
    process run kernel by kernel. A capture records and runs nothing, so no step is lost or
    repeated.

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
        if enabled and backend is None and device.type == "cuda" and not CudaBackend.failure:
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
