"""Memory estimate of a training step, from shapes alone.

:meth:`pdd_fast.engines.Engine.working_bytes` estimates a pass. This module adds the tensors around
it. P is the number of elements of the parameters. tests/training/test_memory.py holds the sums to
the use of a process within a quarter.
"""

from __future__ import annotations

import math

from pdd_fast.engines import Engine, PassShape
from pdd_fast.networks.parameters import parameter_count


def training_bytes(engine: Engine, shape: PassShape, networks: int = 1) -> int:
    """Return the peak number of bytes in one training step of ``networks`` networks.

    It counts the gradient's pass and, for each network, its batch and 5P elements: parameters,
    momentum buffer, gradient and two temporaries. It does not count the dataset.

    Args:
        engine: engine of the networks.
        shape: shape of the batch of each network.
        networks: number of networks.
    """
    each = shape.batch * math.prod(shape.image) + 5 * parameter_count(engine.net)
    return engine.working_bytes(shape) + networks * shape.dtype.itemsize * each
