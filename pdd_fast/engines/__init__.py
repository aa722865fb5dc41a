"""Ways to compute a network's gradient and its derivative along a direction; ``choose`` picks one."""

from __future__ import annotations

from torch import nn

from pdd_fast.engines.autograd import AutogradEngine
from pdd_fast.engines.base import DualResult, Engine
from pdd_fast.engines.fused import FusedEngine
from pdd_fast.networks.convnet import ConvNet

__all__ = ["AutogradEngine", "DualResult", "Engine", "FusedEngine", "choose"]

NAMES = ("auto", "fused", "autograd")


def choose(net: nn.Module, name: str = "auto", precision: str = "float32") -> Engine:
    """The engine called ``name`` for ``net``; "auto" is "fused" for a ConvNet and "autograd" for other modules.

    Args:
        precision: of convolutions, one of pdd_fast.precision.NAMES (docs/precision.md).

    Raises:
        ValueError: an unknown name or precision, or "fused" for a module that is not a ConvNet.
    """
    if name not in NAMES:
        raise ValueError(f"engine must be one of {', '.join(NAMES)}, got {name!r}")
    # A subclass may have another forward, so only the class itself is known to fit the kernels.
    fits = type(net) is ConvNet
    if name == "fused" and not fits:
        raise ValueError(f"engine 'fused' must be given a pdd_fast.ConvNet, got {type(net).__name__}")
    if isinstance(net, ConvNet) and fits and name != "autograd":
        return FusedEngine(net, precision)
    return AutogradEngine(net, precision)
