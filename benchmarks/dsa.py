"""Differentiable Siamese augmentation, measured: drawing for a batch, applying, and taking a
gradient back.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import pdd_fast
from pdd_fast.benchmarks import measure
from pdd_fast.benchmarks.cases import OPERATIONS, Case
from pdd_fast.benchmarks.implementations import Implementation
from pdd_fast.benchmarks.measure import Job
from pdd_fast.benchmarks.plain_dsa import PlainDraws

SAMPLES = 5  # of every part, each of as many calls as a clock can tell apart
AT_LEAST = (
    0.1  # seconds of calls that draw a new operation each: their mean is to be that of all six
)

Augment = Callable[[Tensor], Tensor]
Drawing = Callable[[], Augment]


def drawing(ours: bool, case: Case, device: torch.device) -> Drawing:
    """A call that draws for a batch and gives what applies it."""
    strategy = case.operation if case.operation in OPERATIONS else "_".join(OPERATIONS)
    dsa = pdd_fast.DSA(strategy, mode="multiple" if case.operation == "multiple" else "single")
    size = (case.size, case.size)
    if not ours:
        plain = PlainDraws(dsa, device, torch.float32)
        return lambda: plain.draw(case.batch, size)

    generator = torch.Generator().manual_seed(0)

    def draw() -> Augment:
        parameters = dsa.sample(case.batch, size, generator)
        parameters.packed(device)  # on the device, where the plain ones are made
        return lambda images: pdd_fast.augment(images, parameters)

    return draw


def measured(case: Case, implementation: Implementation, job: Job) -> dict[str, Any]:
    torch.manual_seed(0)
    images, grad = (
        torch.randn(case.batch, 3, case.size, case.size, device=job.device) for _ in range(2)
    )
    followed = images.clone().requires_grad_()
    memory = measure.Memory(job.device)
    draw = drawing(implementation.ours, case, job.device)
    # Where each draw is of another operation, all six have to be among what is timed: drawn once,
    # in turn.
    drawn = [draw() for _ in range(24 if case.operation == "single" else 1)]
    turn = 0

    def augment() -> Augment:
        nonlocal turn
        turn += 1
        return drawn[turn % len(drawn)]

    def back(apply: Augment) -> None:
        torch.autograd.grad(apply(followed), followed, grad)

    calls: dict[str, Callable[[], object]] = {
        "draw": draw,
        "forward": lambda: augment()(images),
        "forward and backward": lambda: back(augment()),
        "draw, forward and backward": lambda: back(draw()),
    }
    taken = {}
    for part, call in calls.items():
        call()
        taken[part] = [measure.seconds_per_call(call, job.device, AT_LEAST) for _ in range(SAMPLES)]
    return measure.sample(taken, memory.found())
