"""In which precision convolutions are computed, and how cuDNN is told (docs/precision.md).

The flags belong to the process. They are set around a pass and put back, so that what a user has
set for other work stays; CUDA graphs keep what held while they were captured.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

NAMES = ("float32", "tf32", "bfloat16")


def resolve(name: str, device: torch.device) -> str:
    """``name`` with "auto" made definite: "tf32" on a GPU, "float32" on the CPU."""
    if name != "auto":
        return name
    return "tf32" if device.type == "cuda" else "float32"


def check(name: str) -> str:
    """``name`` itself.

    Raises:
        ValueError: it is none of :data:`NAMES`.
    """
    if name not in NAMES:
        raise ValueError(f"precision must be one of {', '.join(NAMES)}, got {name!r}")
    return name


def storage(name: str, dtype: torch.dtype) -> torch.dtype:
    """What images and activations are stored in, for parameters of ``dtype`` (float32 or float64).

    Raises:
        TypeError: bfloat16 is asked for with parameters that are not float32.
    """
    if name != "bfloat16":
        return dtype
    if dtype != torch.float32:
        raise TypeError(f"precision 'bfloat16' needs parameters of torch.float32, got {dtype}")
    return torch.bfloat16


@contextmanager
def computing_in(name: str, device: torch.device) -> Iterator[None]:
    """Compute in precision ``name`` inside the block, whatever the caller has set.

    cuDNN's convolutions of float32 tensors use TF32 exactly where ``name`` is "tf32", matrix
    products never do, and both give the same bits every time. The caller's autocast is off.
    """
    if torch.is_autocast_enabled(device.type):
        with torch.autocast(device.type, enabled=False), computing_in(name, device):
            yield
        return
    if device.type != "cuda":
        yield
        return
    cudnn: Any = torch.backends.cudnn  # torch's own annotations lack half of it
    matmul = torch.backends.cuda.matmul
    kept = cudnn.deterministic, cudnn.benchmark
    cudnn.deterministic, cudnn.benchmark = True, False
    # The older switch, allow_tf32, would change recurrent networks' flag too, and reading it fails
    # where a user has set the two apart; this one is in every torch from 2.9 on. "none" means ieee
    # where nothing else was asked for. A flag that says the right thing is left alone, because one
    # that was never set cannot be put back to that.
    changed = []
    for flag, allowed in ((cudnn.conv, name == "tf32"), (matmul, False)):
        if (flag.fp32_precision == "tf32") != allowed:
            changed.append((flag, flag.fp32_precision))
            flag.fp32_precision = "tf32" if allowed else "ieee"
    try:
        yield
    finally:
        for flag, before in changed:
            flag.fp32_precision = before
        cudnn.deterministic, cudnn.benchmark = kept
