"""Estimate the memory of one iteration of trajectory matching from shapes alone.

:meth:`pdd_fast.engines.Engine.working_bytes` estimates a pass; this module adds the tensors around
it. tests/training/test_memory.py requires the sum to lie within a quarter of a process's real peak.
"""

from __future__ import annotations

import math

from pdd_fast.engines import Engine, PassShape
from pdd_fast.networks.parameters import parameter_count


def matching_bytes(
    engine: Engine, shape: PassShape, *, steps: int, saved: int, learned: int, frozen: int = 0
) -> int:
    """Return the peak number of bytes of one iteration of trajectory matching.

    The sum for :class:`pdd_fast.methods.mtt.step.MatchingStep` has these parts: the saved
    activations and the working memory of a dual pass; an augmented batch; (N + 1)P elements for
    the path and 6P for other parameter vectors; the union's images; two gradients of the images;
    and six times the learned images for the states. On a GPU the gradients include the frozen
    images.

    Args:
        engine: Engine of the run's network.
        shape: Shape of the batch of an inner step.
        steps: N, number of inner steps.
        saved: Number of steps that save their activations.
        learned: Number of learned images.
        frozen: Number of frozen images in the union.
    """
    # If only some steps save their activations, the peak is at the last of them or at the first
    # step that is recomputed.
    passes = (
        saved * engine.saved_bytes(shape) + engine.working_bytes(shape, dual=True, saved=True)
        if saved
        else 0
    )
    if saved < steps:
        passes = max(passes, engine.working_bytes(shape, dual=True))
    moved = frozen + learned if shape.device.type == "cuda" else learned
    images = shape.batch + frozen + learned + 2 * moved + 6 * learned
    numbers = (steps + 7) * parameter_count(engine.net) + images * math.prod(shape.image)
    return passes + shape.dtype.itemsize * numbers
