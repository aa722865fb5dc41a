"""Load the compiled kernels and call them.

No other module handles their streams, thread counts and return codes.
"""

from __future__ import annotations

import importlib
import warnings
from functools import cache
from types import ModuleType
from typing import Any

import torch

from pdd_fast.ops._threads import threads
from pdd_fast.runtime.torch_internals import has_memory

# The same order as in csrc/bind/module.cpp. The last two types are stored in 16 bits and computed
# in 32.
TYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_NO_TENSORS = frozenset((int, float, bool, tuple, torch.Size))


class MissingKernelsWarning(UserWarning):
    """Warning that the plain-torch reference runs instead of a compiled kernel."""


def load(device_type: str) -> ModuleType | None:
    """Return the library of kernels for ``"cpu"`` or ``"cuda"``.

    Returns:
        The library; None if it was not built or does not load.
    """
    return _load(device_type)[0]


def loaded(device_type: str) -> ModuleType:
    """Return the library of :func:`load`, which the caller knows to exist."""
    library = load(device_type)
    assert library is not None
    return library


def load_error(device_type: str) -> str | None:
    """Return the reason why :func:`load` returns None, or None if it does not."""
    return _load(device_type)[1]


@cache
def _load(device_type: str) -> tuple[ModuleType | None, str | None]:
    if device_type not in ("cpu", "cuda"):
        return None, f"there are no kernels for device type {device_type!r}"
    try:
        return importlib.import_module(f"pdd_fast._{device_type}"), None
    except ModuleNotFoundError:
        return None, f"pdd_fast._{device_type} was not built"
    except ImportError as error:
        return None, f"pdd_fast._{device_type} does not load: {error}"


@cache
def explain_missing(device_type: str) -> None:
    """Warn, once per device type, that the reference runs, and how to get the kernels."""
    warnings.warn(
        f"pdd_fast runs its plain-torch reference on {device_type!r}: {load_error(device_type)}. "
        "Results are the same, but slower. `pdd-fast env` shows how to get the kernels.",
        MissingKernelsWarning,
        stacklevel=4,
    )


def address(tensor: torch.Tensor | None, device: torch.device) -> int:
    """Return the address of the first element of ``tensor``, 0 for None.

    Raises:
        TypeError: ``tensor`` is not in the memory of ``device``, has no memory of its own (wrappers
            of torch's transforms, fake tensors), or stores the negative of its values.
    """
    if tensor is None:
        return 0
    here = tensor.device == device
    found = tensor.data_ptr() if here and has_memory(tensor) and not tensor.is_neg() else 0
    # Address 0: memory that was freed, or zeros that take none.
    if found == 0 and (not here or tensor.numel() > 0):
        kind = (
            f"a {type(tensor).__name__} without memory of its own"
            if here
            else f"one on {tensor.device}"
        )
        raise TypeError(f"a kernel must be given tensors in the memory of {device}, got {kind}")
    return found


def call(name: str, like: torch.Tensor, *arguments: Any) -> None:
    """Run kernel ``name`` on the device of ``like``, on its current stream and in its precision.

    Args:
        name: of the kernel in the library.
        like: tensor that gives device and precision.
        *arguments: scalars, and tensors on that device, which are passed by address. None means
            absent.

    Raises:
        TypeError: a tensor is on another device.
        RuntimeError: the kernel could not be launched. The message names the operator and the CUDA
            error.
        ValueError: a value that only the kernel sees is out of range.
    """
    device, number = like.device, TYPES.index(like.dtype)
    library = loaded(device.type)
    # isinstance takes 0.2 µs for what is no tensor, and a call has up to 17 arguments.
    given = [
        a
        if type(a) in _NO_TENSORS
        else address(a, device)
        if a is None or isinstance(a, torch.Tensor)
        else a
        for a in arguments
    ]
    function = getattr(library, name)
    if device.type == "cuda":
        with torch.cuda.device(device):
            stream = torch.cuda.current_stream().cuda_stream
            status = function(number, stream, 0, *given)
    else:
        status = function(number, 0, threads(), *given)
    if status < 0:
        raise ValueError(f"{name}: {library.status_string(status)}")
    if status > 0:
        raise RuntimeError(f"{name}: {library.status_string(status)}")


def scratch_images(images: torch.Tensor, number_bytes: int) -> int:
    """Return for how many images the dsa kernel needs scratch memory.

    Args:
        images: [B, C, H, W]; their device selects the kernel.
        number_bytes: bytes per element in which the kernel computes.
    """
    library = loaded(images.device.type)
    if images.device.type == "cpu":
        return library.dsa_scratch_images(*images.shape, number_bytes)
    with torch.cuda.device(images.device):
        return library.dsa_scratch_images(*images.shape, number_bytes)
