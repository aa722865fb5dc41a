"""Measure one plain training step: SGD with momentum 0.9 and weight decay 5e-4.

These are the values of evaluation. With augmentation, every step samples new parameters.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import pdd_fast
from pdd_fast import engines
from pdd_fast.benchmarks import measure
from pdd_fast.benchmarks.cases import Case
from pdd_fast.benchmarks.implementations import Implementation
from pdd_fast.benchmarks.measure import Job
from pdd_fast.benchmarks.plain_dsa import PlainSampler
from pdd_fast.benchmarks.plain_network import plain_convnet
from pdd_fast.benchmarks.plain_training import PlainTraining, Sampler
from pdd_fast.training.sgd import Loop, Sgd, TrainState

RATE, MOMENTUM, DECAY = 0.01, 0.9, 5e-4
STEPS = 6  # steps per call: the six operations of DSA take different times
DSA = "color_crop_cutout_flip_scale_rotate"

Steps = Callable[[], object]  # takes STEPS steps
Parameters = Callable[[], Tensor]  # returns the current parameters [P]


def ours(
    implementation: Implementation,
    net: pdd_fast.ConvNet,
    images: Tensor,
    labels: Tensor,
    augment: bool,
) -> tuple[Steps, Parameters]:
    """Return the package's steps and a call that returns the parameters."""
    train_state = TrainState.start(pdd_fast.flatten_parameters(net)[None])
    options = implementation.options
    engine = engines.choose(
        net, options["engine"], implementation.precision, options["convolution"]
    )
    dsa = pdd_fast.DSA(DSA if augment else "none")
    loop = Loop(
        Sgd(engine, dsa, len(images), MOMENTUM, DECAY, graph=options.get("graph", True)),
        train_state,
        images,
        labels,
        STEPS,
    )
    generator = torch.Generator().manual_seed(0)
    return (lambda: list(loop.advance([RATE] * STEPS, [generator]))), (lambda: train_state.theta[0])


def plain(
    implementation: Implementation,
    own: pdd_fast.ConvNet,
    images: Tensor,
    labels: Tensor,
    sampler: Sampler | None,
    generator: torch.Generator,
) -> tuple[Steps, Parameters]:
    """Return the same in PyTorch, starting at the parameters of ``own``.

    With the option "module" the network is ``own`` itself.
    """
    options = dict(implementation.options)
    net: torch.nn.Module = own
    if not options.pop("module", False):
        net = plain_convnet(
            own.in_channels, own.num_classes, own.image_size, own.width, own.depth
        ).to(images)
        pdd_fast.load_parameters(net, pdd_fast.flatten_parameters(own))
    training = PlainTraining(
        net,
        sampler,
        generator,
        batch=len(images),
        lr=RATE,
        momentum=MOMENTUM,
        decay=DECAY,
        **options,
    )
    return (lambda: training.steps(images, labels, STEPS)), (
        lambda: pdd_fast.flatten_parameters(net)
    )


def measured(case: Case, implementation: Implementation, job: Job) -> dict[str, Any]:
    """Measure one implementation."""
    measure.set_precision(implementation.precision)
    torch.manual_seed(0)
    net = pdd_fast.ConvNet(3, 10, case.size, case.width, case.depth).to(job.device)
    images = torch.randn(case.batch, 3, case.size, case.size, device=job.device)
    labels = torch.arange(case.batch, device=job.device) % 10
    fused = implementation.ours and "module" not in implementation.options
    if not fused:
        measure.load_lazily_loaded()
    memory = measure.Memory(job.device)
    if fused:
        steps, _ = ours(implementation, net, images, labels, case.augment)
    else:
        sampler = (
            PlainSampler(pdd_fast.DSA(DSA), job.device, images.dtype) if case.augment else None
        )
        steps, _ = plain(
            implementation, net, images, labels, sampler, torch.Generator(job.device).manual_seed(0)
        )
    steps()
    memory.forget()
    taken = [seconds / STEPS for seconds in measure.repeated(steps, job.device)]
    return measure.sample({"step": taken}, memory.found(holds_graph="graph" in implementation.name))
