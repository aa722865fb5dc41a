"""Memory that passes over a ConvNet take from torch's allocator, estimated from shapes.

The unit is a = b · width · H · W elements, the activations of b images behind the first
convolution. Every later block has a quarter of the block before. x = b · channels · H · W elements
are the images themselves.

tests/training/test_memory.py holds the estimates to the use of a process within a quarter. Images
of one channel take up to 2a more, because torch's first convolution then returns planar memory,
which has to be converted. cuDNN's workspace is in no estimate.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from pdd_fast.engines.base import PassShape
from pdd_fast.ops.convnet import ConvNetShape
from pdd_fast.runtime import precision as precisions


class Multiples(NamedTuple):
    """Memory of the passes, in multiples of a unit.

    ``dual``, ``dual_of_saved`` and ``gradient`` count multiples of a that are alive at once at the
    peak, in the first block's backward pass. ``saved`` counts the data that a step saves, in units
    of what the dual pass reads: the input and output of every block, and the gradients of both.
    """

    dual: float
    dual_of_saved: float  # beside the saved activations
    gradient: float
    saved: float


# The peak of the composed dual pass: z and its gradient with their tangents (4), the pooled
# gradient with its tangent (0.5), the gradient from the block above (0.5), and the workspace of the
# convolution library (0.5; measured). The peak of its plain gradient: z and its gradient (2), the
# pooled gradient (0.25), and the gradient from the block above (0.25).
COMPOSED = Multiples(dual=5.5, dual_of_saved=2.75, gradient=2.5, saved=1)
# All measured: the double backward of the norm is elementwise.
AUTOGRAD = Multiples(dual=9, dual_of_saved=4, gradient=4, saved=1.75)


def _blocks(net: ConvNetShape, shape: PassShape) -> list[int]:
    """Return a of every block."""
    _, H, W = shape.image
    return [shape.batch * net.channels * (H >> i) * (W >> i) for i in range(net.depth)]


def _images(shape: PassShape) -> int:
    return shape.batch * math.prod(shape.image)


def saved_bytes(multiples: Multiples, net: ConvNetShape, precision: str, shape: PassShape) -> int:
    """Return the estimate of :meth:`pdd_fast.engines.base.Engine.saved_bytes`."""
    blocks = _blocks(net, shape)
    inputs = _images(shape) + sum(blocks[1:])
    numbers = multiples.saved * (inputs + 2.25 * sum(blocks))
    return int(precisions.storage(precision, shape.dtype).itemsize * numbers)


def working_bytes(
    multiples: Multiples,
    net: ConvNetShape,
    precision: str,
    shape: PassShape,
    dual: bool,
    saved: bool,
) -> int:
    """Return the estimate of :meth:`pdd_fast.engines.base.Engine.working_bytes` for one network.

    It counts the network's activations and 2x: the images as stored, and their gradient.
    """
    times = (multiples.dual_of_saved if saved else multiples.dual) if dual else multiples.gradient
    numbers = times * _blocks(net, shape)[0] + 2 * _images(shape)
    return int(precisions.storage(precision, shape.dtype).itemsize * numbers)
