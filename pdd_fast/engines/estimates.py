"""What passes over a ConvNet take that torch's allocator gives piece by piece, from shapes alone.

Counted in activations: b images behind the first convolution are a = b · width · H · W numbers, and
every block after it has a quarter of those before. x = b · channels · H · W is the images
themselves. tests/training/test_memory.py holds the estimates to what a process takes, within a
quarter. Images of one channel take up to 2a more: torch has the first convolution answer in planar
memory then, and it is converted. What cuDNN works in is in no estimate.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from pdd_fast.engines.base import PassShape
from pdd_fast.ops.convnet import ConvNetShape
from pdd_fast.runtime import precision as precisions


class Multiples(NamedTuple):
    """How many times a is alive at once where the first block's gradients are made; and what a step
    keeps, in units of what the dual pass reads: every block's input and its own output, and the
    gradients of both.
    """

    dual: float
    dual_of_kept: float  # beside what was kept
    gradient: float
    kept: float


# The composed dual pass has z and its gradient with their tangents (4), the pooled gradient with
# its own (0.5), what the block above leaves (0.5), and what the convolution library works in (0.5;
# measured). Its plain gradient has z and its gradient (2), the pooled one (0.25), and what the
# block above leaves (0.25).
COMPOSED = Multiples(dual=5.5, dual_of_kept=2.75, gradient=2.5, kept=1)
# All measured: the double backward of the norm is elementwise.
AUTOGRAD = Multiples(dual=9, dual_of_kept=4, gradient=4, kept=1.75)


def _blocks(net: ConvNetShape, shape: PassShape) -> list[int]:
    """a of every block."""
    _, H, W = shape.image
    return [shape.batch * net.channels * (H >> i) * (W >> i) for i in range(net.depth)]


def _images(shape: PassShape) -> int:
    return shape.batch * math.prod(shape.image)


def kept_bytes(multiples: Multiples, net: ConvNetShape, precision: str, shape: PassShape) -> int:
    """As :meth:`pdd_fast.engines.base.Engine.kept_bytes`."""
    blocks = _blocks(net, shape)
    inputs = _images(shape) + sum(blocks[1:])
    numbers = multiples.kept * (inputs + 2.25 * sum(blocks))
    return int(precisions.storage(precision, shape.dtype).itemsize * numbers)


def working_bytes(
    multiples: Multiples,
    net: ConvNetShape,
    precision: str,
    shape: PassShape,
    dual: bool,
    kept: bool,
) -> int:
    """As :meth:`pdd_fast.engines.base.Engine.working_bytes`, of one network: its activations and
    2x, the images as they are stored and their gradient.
    """
    times = (multiples.dual_of_kept if kept else multiples.dual) if dual else multiples.gradient
    numbers = times * _blocks(net, shape)[0] + 2 * _images(shape)
    return int(precisions.storage(precision, shape.dtype).itemsize * numbers)
