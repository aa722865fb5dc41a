"""Estimate the memory of a training step from shapes alone.

:meth:`pdd_fast.engines.Engine.working_bytes` knows what a pass takes; this module adds the tensors
around it. P is the number of parameters. tests/training/test_memory.py holds the sums to what a
process takes, within a quarter.
"""

from __future__ import annotations

import math

from pdd_fast.engines import Engine, PassShape
from pdd_fast.networks.parameters import parameter_count


def training_bytes(engine: Engine, shape: PassShape, networks: int = 1) -> int:
    """Peak of one training step of ``networks`` networks, each on a batch of its own.

    The gradient's pass, and for each network its batch and 5P: parameters, momentum, gradient and
    two beside them. The dataset is not counted.
    """
    each = shape.batch * math.prod(shape.image) + 5 * parameter_count(engine.net)
    return engine.working_bytes(shape, networks=networks) + networks * shape.dtype.itemsize * each
