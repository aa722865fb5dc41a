"""Engines: ways to compute a network's gradient and its derivative along a direction.

:func:`choose` selects one.
"""

from __future__ import annotations

from torch import nn

from pdd_fast.engines.autograd import AutogradEngine
from pdd_fast.engines.base import DualResult, Engine, PassShape
from pdd_fast.engines.fused import FusedEngine
from pdd_fast.networks.convnet import kernel_shape
from pdd_fast.ops.convnet import CONVOLUTIONS
from pdd_fast.runtime import choices

__all__ = [
    "CONVOLUTIONS",
    "AutogradEngine",
    "DualResult",
    "Engine",
    "FusedEngine",
    "PassShape",
    "choose",
]

NAMES = choices.ENGINES


def choose(
    net: nn.Module, name: str = "auto", precision: str = "float32", convolution: str = "auto"
) -> Engine:
    """Return the engine called ``name`` for ``net``.

    "auto" is "fused" for an unchanged ConvNet, and "autograd" for other modules and for a ConvNet
    that was changed (:func:`pdd_fast.networks.convnet.kernel_shape`).

    Args:
        net: the network.
        name: "fused", "autograd" or "auto".
        precision: of convolutions, one of pdd_fast.runtime.precision.NAMES (docs/precision.md).
        convolution: algorithm of the fused engine on the CPU, one of CONVOLUTIONS: "direct",
            "winograd" (F(4×4, 3×3), fewer multiplications, about four times the rounding error), or
            "auto", which chooses the faster one per layer. It has no effect on a GPU or on the
            autograd engine, whose libraries choose themselves.

    Raises:
        ValueError: a name, precision or convolution is unknown, or "fused" is given a module that
            the kernels cannot compute.
    """
    if name not in NAMES:
        raise ValueError(f"engine must be one of {', '.join(NAMES)}, got {name!r}")
    if convolution not in CONVOLUTIONS:
        raise ValueError(
            f"convolution must be one of {', '.join(CONVOLUTIONS)}, got {convolution!r}"
        )
    shape = kernel_shape(net)
    if name == "fused" or (name == "auto" and shape is not None):
        return FusedEngine(net, precision, convolution, shape)
    return AutogradEngine(net, precision, shape)
