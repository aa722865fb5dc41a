"""What the large things take in bytes, from shapes alone; what a device has; and sentences where it is too little.

Counted in activations: b images behind the first convolution are a = b · width · H · W numbers, and every block after
it has a quarter of those before. x = b · channels · H · W is the images themselves, P the number of parameters.
tests/test_memory.py holds the formulas to what a process takes, within a quarter. Images of one channel take up to 2a
more: torch has the first convolution answer in planar memory then, and it is converted.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from pdd_fast.devices import peak_memory
from pdd_fast.errors import RunError, UsageError
from pdd_fast.networks.convnet import ConvNet
from pdd_fast.networks.parameters import parameter_count

# How many times a is alive at once where the first block's gradients are made, by engine. In the fused engine's dual
# pass these are z and its gradient with their tangents (4), the pooled gradient with its own (0.5), what the block
# above leaves (0.5), and what the convolution library works in (0.5; measured, like all of autograd's, whose double
# backward of the norm is elementwise).
_DUAL = {"fused": 5.5, "autograd": 9.0}
# What the dual pass adds at its peak to what was kept (memory="cache").
_DUAL_OF_KEPT = {"fused": 2.75, "autograd": 7.0}
# A plain gradient: z and its gradient (2), the pooled one (0.25), and what the block above leaves (0.25).
_GRADIENT = {"fused": 2.5, "autograd": 4.0}


def _images(net: ConvNet, count: int) -> int:
    H, W = net.image_size
    return count * net.in_channels * H * W


def _blocks(net: ConvNet, batch: int) -> list[int]:
    """a of every block."""
    H, W = net.image_size
    return [batch * net.width * (H >> i) * (W >> i) for i in range(net.depth)]


def matching_bytes(
    net: ConvNet,
    *,
    batch: int,
    steps: int,
    learned: int,
    frozen: int = 0,
    engine: str = "fused",
    memory: str = "recompute",
    element_size: int = 4,
) -> int:
    """Peak of one iteration of trajectory matching (:class:`pdd_fast.matching.step.MatchingStep`).

    (N + 1)·P for the path and 6P beside it; 5.5a + 3x of the dual pass (9a with autograd's engine), or with
    ``memory="cache"`` what N steps keep and 2.75a (7a); the union's images with two gradients, and six times the
    learned images for the state.

    Args:
        batch: b, images of an inner step.
        steps: N.
        learned, frozen: images of the union.
        element_size: bytes of an activation: 4 for float32 and tf32, 2 for bfloat16, 8 for float64.
    """
    blocks, x = _blocks(net, batch), _images(net, batch)
    full = max(4, element_size)  # of a parameter and of a learned image
    if memory == "cache":
        activations = steps * _kept(blocks, x, engine) + _DUAL_OF_KEPT[engine] * blocks[0] + 3 * x
    else:
        activations = _DUAL[engine] * blocks[0] + 3 * x
    images = 3 * _images(net, frozen + learned) + 6 * _images(net, learned)
    return int(element_size * activations + full * ((steps + 7) * parameter_count(net) + images))


def _kept(blocks: list[int], x: int, engine: str) -> float:
    """Numbers that one step keeps (memory="cache"): every block's input and its own output, and the gradients of both;
    autograd's graph keeps 1.75 times as many, measured."""
    inputs = x + sum(blocks[1:])
    fused = inputs + 2.25 * sum(blocks)
    return fused if engine == "fused" else 1.75 * fused


def training_bytes(net: ConvNet, *, batch: int, networks: int = 1, engine: str = "fused", element_size: int = 4) -> int:
    """Peak of one training step of ``networks`` networks side by side, each on ``batch`` images of its own.

    2.5a + 3x each (autograd's engine takes 4a + 3x, one network after another) and 5P each: parameters, momentum,
    gradient and two beside them. The data set is not counted.
    """
    activations = _GRADIENT[engine] * _blocks(net, batch)[0] + 3 * _images(net, batch)
    beside = networks if engine == "fused" else 1
    return int(beside * element_size * activations + networks * max(4, element_size) * 5 * parameter_count(net))


def available(device: torch.device) -> int | None:
    """Bytes that can still be allocated on a GPU; None on the CPU, where the system decides."""
    if device.type != "cuda":
        return None
    free, _ = torch.cuda.mem_get_info(device)
    # What torch has taken from the driver and not given out is ours too.
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def require(device: torch.device, size: int, what: str, lower: str) -> None:
    """Makes sure that ``device`` has ``size`` bytes left; without effect on the CPU.

    Args:
        what: what takes them: "stage 3: an iteration".
        lower: what to change: "inner_batch (now 512) or width (now 128)".

    Raises:
        UsageError: it has not.
    """
    there = available(device)
    if there is not None and size > there:
        raise UsageError(f"{what} would take about {in_words(size)} and {device} has {in_words(there)}; lower {lower}")


def largest_group(bytes_each: int, device: torch.device, most: int) -> int:
    """How many networks of ``bytes_each`` fit side by side, in [1, ``most``]; 1 on the CPU.

    They get half of the device's whole memory, not of what is free at the moment: the same machine gives the same
    number, and so the same bits, whatever else runs on it.
    """
    if device.type != "cuda":
        return 1
    total = torch.cuda.get_device_properties(device).total_memory
    return max(1, min(most, total // 2 // max(1, bytes_each)))


@contextmanager
def explained(device: torch.device, what: str, lower: str) -> Iterator[None]:
    """Around work that may run out of memory.

    Args:
        what: what is being done: "stage 3, iteration 12".
        lower: as for :func:`require`.

    Raises:
        RunError: it did, in one sentence.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise RunError(
            f"{what}: {device} is out of memory, at {in_words(peak_memory(device))} taken at the most{_whole(device)}; "
            f"lower {lower}"
        ) from error


def _whole(device: torch.device) -> str:
    if device.type != "cuda":
        return ""
    return f" of {in_words(torch.cuda.get_device_properties(device).total_memory)}"


def is_out_of_memory(error: BaseException) -> bool:
    """Whether ``error`` says that memory could not be had, on whatever device."""
    # Of torch's allocators only that of a GPU has a class for it, and CUDA's libraries have texts of their own.
    texts = "out of memory", "can't allocate memory", "DefaultCPUAllocator", "ALLOC_FAILED"
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(text in str(error) for text in texts)


def in_words(size: int) -> str:
    """Bytes as "91 GB", "3.2 GB" or "150 MB", in powers of 1000."""
    if size >= 1e9:
        return f"{size / 1e9:.0f} GB" if size >= 1e10 else f"{size / 1e9:.1f} GB"
    return f"{max(1, round(size / 1e6))} MB"
