"""Registers an operator with torch's dispatcher from its four parts, and the checks that all
operators share.
"""

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
    """Defines ``pdd_fast::<schema>`` for CPU, CUDA and fake tensors, and returns the function that
    calls it.

    Args:
        schema: name, arguments and results, in torch's schema language.
        check: takes the arguments, raises ValueError or TypeError; runs before anything takes an
            address.
        allocate: takes the arguments, gives the uninitialized results; also the fake kernel.
        kernel: takes the arguments, gives the results of the compiled kernel.
        reference: the same in plain torch: the oracle of the tests and the fallback where nothing
            was compiled.
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
    """What sums, statistics and per-channel vectors are held in, for images stored as ``dtype``."""
    return torch.float32 if dtype in HALF else dtype


def require_floating(
    operator: str, argument: str, tensor: torch.Tensor, half: bool = False
) -> None:
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
    """``tensor`` has the given shape, the device of ``like`` and its type, or ``dtype``."""
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
    """``function`` on 16-bit tensors converted to float32; those of its results that are images
    rounded back.

    What the CUDA kernels do in registers, for where there is no kernel: the CPU, and the
    references. Where images have 16 bits, the first argument has.
    """
    half = arguments[0].dtype
    if half not in HALF:
        return function(*arguments)
    wide = (a.float() if isinstance(a, torch.Tensor) and a.dtype == half else a for a in arguments)
    results = function(*wide)
    if isinstance(results, torch.Tensor):
        return results.to(half)
    return tuple(r.to(half) if r.dim() == 4 else r for r in results)
