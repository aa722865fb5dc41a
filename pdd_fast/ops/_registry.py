"""Registration of operators with torch's dispatcher, and the checks that all operators share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from pdd_fast.ops import _native

_LIBRARY = torch.library.Library("pdd_fast", "DEF")


def operator(
    schema: str,
    *,
    check: Callable[..., None],
    allocate: Callable[..., Any],
    kernel: Callable[..., Any],
    reference: Callable[..., Any],
) -> Callable[..., Any]:
    """Define ``pdd_fast::<schema>`` for CPU, CUDA and fake tensors, and return its function.

    Args:
        schema: name, arguments and results, in torch's schema language.
        check: takes the arguments and raises ValueError or TypeError. It runs before any address is
            taken.
        allocate: takes the arguments and returns uninitialized results; also the fake kernel.
        kernel: takes the arguments and returns the results of the compiled kernel.
        reference: the same in plain torch. Tests compare with it, and it runs if nothing was
            compiled.
    """
    name = schema.partition("(")[0]
    _LIBRARY.define(schema)

    def run(*arguments: Any) -> Any:
        check(*arguments)
        device_type = arguments[0].device.type
        if _native.load(device_type) is None:
            _native.explain_missing(device_type)
            return computed_in_32_bits(reference, *arguments)
        return (
            kernel(*arguments) if device_type == "cuda" else computed_in_32_bits(kernel, *arguments)
        )

    for key in ("CPU", "CUDA"):
        _LIBRARY.impl(name, run, key)
    torch.library.register_fake(f"pdd_fast::{name}", allocate, lib=_LIBRARY)
    return getattr(torch.ops.pdd_fast, name).default


HALF = (torch.bfloat16, torch.float16)


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the type of sums, statistics and per-channel vectors for images of type ``dtype``."""
    return torch.float32 if dtype in HALF else dtype


def require_floating(
    operator: str, argument: str, tensor: torch.Tensor, half: bool = False
) -> None:
    """Raise TypeError unless ``tensor`` is float32 or float64, or 16-bit if ``half``."""
    allowed = (torch.float32, torch.float64, *(HALF if half else ()))
    if tensor.dtype not in allowed:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in allowed[:-1])
        last = str(allowed[-1]).removeprefix("torch.")
        raise TypeError(f"{operator}: {argument} must be {names} or {last}, got {tensor.dtype}")


def require_like(
    operator: str,
    argument: str,
    tensor: torch.Tensor,
    like: torch.Tensor,
    shape: tuple[int, ...],
    dtype: torch.dtype | None = None,
) -> None:
    """Raise TypeError or ValueError unless ``tensor`` has the shape, device and type asked for.

    Args:
        operator: name of the operator, for the message.
        argument: name of ``tensor``, for the message.
        tensor: the argument.
        like: tensor that gives the device, and the type if ``dtype`` is None.
        shape: required shape.
        dtype: required type.
    """
    wanted = like.dtype if dtype is None else dtype
    if tensor.dtype != wanted:
        raise TypeError(f"{operator}: {argument} must be {wanted}, got {tensor.dtype}")
    if tensor.device != like.device:
        raise ValueError(f"{operator}: {argument} must be on {like.device}, got {tensor.device}")
    if tuple(tensor.shape) != tuple(shape):
        raise ValueError(
            f"{operator}: {argument} must have shape {tuple(shape)}, got {tuple(tensor.shape)}"
        )


def computed_in_32_bits(function: Callable[..., Any], *arguments: Any) -> Any:
    """Return ``function`` of the arguments, with 16-bit tensors computed in float32.

    Results that are images are rounded back to 16 bits. The CUDA kernels do the same in registers;
    this serves the CPU and the references. If images have 16 bits, so has the first argument.
    """
    half = arguments[0].dtype
    if half not in HALF:
        return function(*arguments)
    wide = (a.float() if isinstance(a, torch.Tensor) and a.dtype == half else a for a in arguments)
    results = function(*wide)
    if isinstance(results, torch.Tensor):
        return results.to(half)
    return tuple(r.to(half) if r.dim() == 4 else r for r in results)
