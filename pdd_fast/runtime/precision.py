"""Precision of convolutions, and the flags that set it in cuDNN (docs/precision.md).

The flags belong to the process. They are set around a pass and restored, so that a user's settings
for other work stay. CUDA graphs use the flags that were set during their capture.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from pdd_fast.runtime import choices

NAMES = choices.PRECISIONS


def resolve(name: str, device: torch.device) -> str:
    """Return ``name``, or for "auto": "tf32" on a GPU, "float32" on the CPU."""
    if name != "auto":
        return name
    return "tf32" if device.type == "cuda" else "float32"


def check(name: str) -> str:
    """Return ``name``.

    Raises:
        ValueError: ``name`` is not in :data:`NAMES`.
    """
    if name not in NAMES:
        raise ValueError(f"precision must be one of {', '.join(NAMES)}, got {name!r}")
    return name


def storage(name: str, dtype: torch.dtype) -> torch.dtype:
    """Return the type in which images and activations are stored.

    Args:
        name: precision of convolutions.
        dtype: type of the parameters, float32 or float64.

    Raises:
        TypeError: bfloat16 is combined with parameters that are not float32.
    """
    if name != "bfloat16":
        return dtype
    if dtype != torch.float32:
        raise TypeError(f"parameters must be torch.float32 for precision 'bfloat16', got {dtype}")
    return torch.bfloat16


@contextmanager
def computing_in(name: str, device: torch.device) -> Iterator[None]:
    """Compute in precision ``name`` inside the block, whatever the caller has set.

    cuDNN's convolutions of float32 tensors use TF32 if and only if ``name`` is "tf32". Matrix
    products never use it. Both give the same bits every time. The caller's autocast is off.
    """
    if torch.is_autocast_enabled(device.type):
        with torch.autocast(device.type, enabled=False), computing_in(name, device):
            yield
        return
    if device.type != "cuda":
        yield
        return
    backends: Any = torch.backends  # torch's annotations lack half of its attributes
    cudnn, matmul, mkldnn = backends.cudnn, backends.cuda.matmul, backends.mkldnn.matmul
    mode = cudnn.deterministic, cudnn.benchmark
    legacy, before_mkldnn = _legacy_matmul_precision(), mkldnn.fp32_precision
    # The older switch, allow_tf32, would also change the flag of recurrent networks, and reading it
    # fails if a user has set the two apart. This one exists from torch 2.9 on. "none" means ieee
    # unless something else was requested. A flag with the right value is left alone, because an
    # unset flag cannot be restored.
    changed: list[tuple[Any, str]] = []
    try:
        cudnn.deterministic, cudnn.benchmark = True, False
        if legacy != "highest":
            # It would contradict the newer flag, and torch raises an error in a matrix product if
            # the two differ. It also sets the flags of both back ends.
            changed.append((matmul, matmul.fp32_precision))
            torch.set_float32_matmul_precision("highest")
        for flag, allowed in ((cudnn.conv, name == "tf32"), (matmul, False)):
            if (flag.fp32_precision == "tf32") != allowed:
                changed.append((flag, flag.fp32_precision))
                flag.fp32_precision = "tf32" if allowed else "ieee"
        yield
    finally:
        if legacy != "highest":
            torch.set_float32_matmul_precision(legacy)
            mkldnn.fp32_precision = before_mkldnn
        for flag, before in changed:
            flag.fp32_precision = before
        cudnn.deterministic, cudnn.benchmark = mode


def _legacy_matmul_precision() -> str:
    """Return what torch.set_float32_matmul_precision has set for a GPU.

    The result is "highest" if the caller has set the older and the newer flag apart. That is nearly
    always a newer flag of "tf32" beside an older one that was never set.
    """
    try:
        if not torch.backends.cuda.matmul.allow_tf32:
            return "highest"
    except RuntimeError:  # torch's answer to flags that differ
        return "highest"
    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError:  # oneDNN's flag differs; "medium" would be another value of that flag only
        return "high"
