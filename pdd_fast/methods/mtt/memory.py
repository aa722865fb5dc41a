"""Estimate the memory of one iteration of trajectory matching from shapes alone.

:meth:`pdd_fast.engines.Engine.working_bytes` knows what a pass takes; this module adds the tensors
around it. tests/training/test_memory.py holds the sums to what a process takes, within a quarter.
"""

from __future__ import annotations

import math

from pdd_fast.engines import Engine, PassShape
from pdd_fast.networks.parameters import parameter_count


def matching_bytes(
    engine: Engine, shape: PassShape, *, steps: int, kept: int, learned: int, frozen: int = 0
) -> int:
    """Peak of one iteration of trajectory matching
    (:class:`pdd_fast.methods.mtt.step.MatchingStep`).

    What the kept steps keep and what a dual pass works in, with a batch before it; (N + 1)P for the
    path and 6P beside it; the union's images, two gradients, and six times the learned images for
    the state. On a GPU frozen images have a gradient too.

    Args:
        shape: of a batch of an inner step.
        steps: N.
        kept: how many of them keep their activations.
        learned, frozen: images of the union.
    """
    # Where some steps are kept and some are not, the last kept one or the first that is made again
    # is the peak.
    passes = (
        kept * engine.kept_bytes(shape) + engine.working_bytes(shape, dual=True, kept=True)
        if kept
        else 0
    )
    if kept < steps:
        passes = max(passes, engine.working_bytes(shape, dual=True))
    moved = frozen + learned if shape.device.type == "cuda" else learned
    images = shape.batch + frozen + learned + 2 * moved + 6 * learned
    numbers = (steps + 7) * parameter_count(engine.net) + images * math.prod(shape.image)
    return passes + shape.dtype.itemsize * numbers
