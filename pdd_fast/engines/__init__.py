"""Ways to compute a network's gradient and its derivative along a direction; ``choose`` picks
one."""

from __future__ import annotations

from torch import nn

from pdd_fast.engines.autograd import AutogradEngine
from pdd_fast.engines.base import DualResult, Engine, PassShape
from pdd_fast.engines.fused import FusedEngine
from pdd_fast.networks.convnet import kernel_shape
from pdd_fast.ops.convnet import CONVOLUTIONS

__all__ = [
    "CONVOLUTIONS",
    "AutogradEngine",
    "DualResult",
    "Engine",
    "FusedEngine",
    "PassShape",
    "choose",
]

NAMES = ("auto", "fused", "autograd")


def choose(
    net: nn.Module, name: str = "auto", precision: str = "float32", convolution: str = "auto"
) -> Engine:
    """The engine called ``name`` for ``net``; "auto" is "fused" for a ConvNet as it was made, and
    "autograd" for other modules and for a ConvNet that was changed
    (:func:`pdd_fast.networks.convnet.kernel_shape`).

    Args:
        precision: of convolutions, one of pdd_fast.runtime.precision.NAMES (docs/precision.md).
        convolution: how the fused engine convolves on the CPU, one of CONVOLUTIONS: "direct",
            "winograd" (F(4×4, 3×3), fewer multiplications, rounding errors about four times as
            large), or "auto", whichever is faster layer by layer. Without effect on a GPU and on
            the autograd engine, whose libraries choose by themselves.

    Raises:
        ValueError: an unknown name, precision or convolution, or "fused" for a module that the
            kernels cannot compute.
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
