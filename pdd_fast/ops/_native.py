"""Finds the compiled kernels and calls them: the one place that reads streams, threads and return
codes.
"""

from __future__ import annotations

import importlib
import warnings
from functools import cache
from types import ModuleType
from typing import Any

import torch

from pdd_fast.ops._threads import threads

# csrc/bind/module.cpp numbers them alike. The last two are stored in 16 bits and computed with in
# 32.
TYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


class MissingKernelsWarning(UserWarning):
    """The plain-torch reference runs in place of a compiled kernel."""


def load(device_type: str) -> ModuleType | None:
    """The library with the kernels for ``"cpu"`` or ``"cuda"``; None where it was not built or does
    not load.
    """
    return _load(device_type)[0]


def loaded(device_type: str) -> ModuleType:
    """:func:`load` where it is known to give a library."""
    library = load(device_type)
    assert library is not None
    return library


def load_error(device_type: str) -> str | None:
    """Why :func:`load` gives None, in words; None where it does not."""
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
    """Warns, once per device type, that the reference is used and how to get the kernels."""
    warnings.warn(
        f"pdd_fast runs its plain-torch reference on {device_type!r}: {load_error(device_type)}. "
        f"Results are the same, "
        "slower. `pdd-fast env` says what to do.",
        MissingKernelsWarning,
        stacklevel=4,
    )


def address(tensor: torch.Tensor | None, device: torch.device) -> int:
    """Return the address of the first element of ``tensor``, 0 for None.

    Raises:
        TypeError: ``tensor`` does not lie in the memory of ``device``, or has no memory of its own
            (wrappers of torch's transforms, fake tensors), or its memory holds the negative of its
            values.
    """
    if tensor is None:
        return 0
    elsewhere = tensor.device != device
    found = (
        0
        if elsewhere or tensor.is_neg() or not torch._C._has_storage(tensor)
        else tensor.data_ptr()
    )
    if found == 0 and (
        elsewhere or tensor.numel() > 0
    ):  # memory that was freed, or zeros that take none
        kind = (
            f"one on {tensor.device}"
            if elsewhere
            else f"a {type(tensor).__name__} without memory of its own"
        )
        raise TypeError(f"a kernel must be given tensors in the memory of {device}, got {kind}")
    return found


def call(name: str, like: torch.Tensor, *arguments: Any) -> None:
    """Runs kernel ``name`` on the device of ``like``, on its current stream, in the precision of
    ``like``.

    Args:
        arguments: numbers, and tensors on that device, of which the kernel gets the addresses;
            None: absent.

    Raises:
        TypeError: a tensor lies elsewhere.
        RuntimeError: the kernel could not be launched; the message names the operator and the CUDA
            error.
        ValueError: a value that only the kernel sees is out of range.
    """
    device, number = like.device, TYPES.index(like.dtype)
    library = loaded(device.type)
    given = [
        address(a, device) if a is None or isinstance(a, torch.Tensor) else a for a in arguments
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
    """How many images' scratch the dsa kernel of the device of ``images`` [B, C, H, W] wants to be
    given.
    """
    library = loaded(images.device.type)
    if images.device.type == "cpu":
        return library.dsa_scratch_images(*images.shape, number_bytes)
    with torch.cuda.device(images.device):
        return library.dsa_scratch_images(*images.shape, number_bytes)
