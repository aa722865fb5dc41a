"""Measure differentiable Siamese augmentation: sampling, forward pass and adjoint."""

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
from pdd_fast.benchmarks.plain_dsa import PlainSampler

SAMPLES = 5  # per part; each covers as many calls as the clock's resolution needs
# Minimum seconds of calls that sample a new operation each, so that their mean covers all six.
AT_LEAST = 0.1

Augment = Callable[[Tensor], Tensor]
Drawing = Callable[[], Augment]


def drawing(ours: bool, case: Case, device: torch.device) -> Drawing:
    """Return a call that samples a batch's parameters and returns the function to apply them."""
    strategy = case.operation if case.operation in OPERATIONS else "_".join(OPERATIONS)
    dsa = pdd_fast.DSA(strategy, mode="multiple" if case.operation == "multiple" else "single")
    size = (case.size, case.size)
    if not ours:
        plain = PlainSampler(dsa, device, torch.float32)
        return lambda: plain.sample(case.batch, size)

    generator = torch.Generator().manual_seed(0)

    def draw() -> Augment:
        parameters = dsa.sample(case.batch, size, generator)
        parameters.packed(device)  # on the device, where plain parameters are created
        return lambda images: pdd_fast.augment(images, parameters)

    return draw


def measured(case: Case, implementation: Implementation, job: Job) -> dict[str, Any]:
    """Measure one implementation."""
    torch.manual_seed(0)
    images, grad = (
        torch.randn(case.batch, 3, case.size, case.size, device=job.device) for _ in range(2)
    )
    followed = images.clone().requires_grad_()
    memory = measure.Memory(job.device)
    draw = drawing(implementation.ours, case, job.device)
    # If the operation changes with every sample, the timed calls must include all six. Parameters
    # are sampled once and applied in turn.
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
