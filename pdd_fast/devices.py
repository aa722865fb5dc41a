"""From a device's name to a device that can be used."""

from __future__ import annotations

import torch

from pdd_fast.errors import UsageError


def resolve_device(name: str) -> torch.device:
    """The device called ``name``: "auto" (a GPU where torch finds one), "cpu", "cuda" or "cuda:N".

    Raises:
        UsageError: the name is not a device, or torch cannot use it here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda"):
        raise UsageError(f"device must be auto, cpu, cuda or cuda:N, got {name!r}")
    if device.type == "cpu":
        return device
    if not torch.cuda.is_available():
        raise UsageError(f"device {name!r} cannot be used: torch finds no GPU; `pdd-fast env` says more")
    count = torch.cuda.device_count()
    if (device.index or 0) >= count:
        raise UsageError(f"device must be below cuda:{count}, got {name!r}")
    return device
