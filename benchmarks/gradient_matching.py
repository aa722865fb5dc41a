"""Measure one gradient of the matching distance with respect to the synthetic images.

The distance is IDC's: the sum over classes of the squared distance between the parameter gradients
of the class's real images and of its synthetic images.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import pdd_fast
from pdd_fast.benchmarks import measure
from pdd_fast.benchmarks.cases import Case
from pdd_fast.benchmarks.implementations import Implementation
from pdd_fast.benchmarks.measure import Job
from pdd_fast.benchmarks.plain_network import plain_convnet

_TRUTH = "truth.pt"  # in the case's scratch folder

Gradient = Callable[[int], Tensor]  # takes a number of classes; returns [classes, n, C, H, W]


@dataclass
class Problem:
    """K classes at one parameter vector."""

    net: nn.Module  # torch's own layers, with parameters theta
    own: pdd_fast.ConvNet  # the same network, as this package implements it
    theta: Tensor  # [P]
    real: Tensor  # [K, B, C, H, W]
    real_labels: Tensor  # int64 [K, B]
    images: Tensor  # [K, n, C, H, W]
    labels: Tensor  # int64 [K, n]
    channels_last: bool = False
    autocast: torch.dtype | None = None

    @classmethod
    def draw(cls, case: Case, device: torch.device, dtype: torch.dtype) -> Problem:
        """Return a random problem.

        Random values are drawn on the CPU in float32, so they are equal on every device and in
        every precision.
        """
        torch.manual_seed(0)
        own = pdd_fast.ConvNet(3, case.classes, case.size, case.width, case.depth)
        theta = pdd_fast.flatten_parameters(own)
        net = plain_convnet(3, case.classes, (case.size, case.size), case.width, case.depth)
        pdd_fast.load_parameters(net, theta)
        real, images = (
            torch.randn(case.classes, n, 3, case.size, case.size) for n in (case.real, case.batch)
        )
        theta, real, images = (tensor.to(device, dtype) for tensor in (theta, real, images))
        classes = torch.arange(case.classes, device=device)[:, None]
        labels = [classes.expand(case.classes, n).contiguous() for n in (case.real, case.batch)]
        return cls(
            net.to(device, dtype), own.to(device, dtype), theta, real, labels[0], images, labels[1]
        )

    def loss(self, net: Callable[[Tensor], Tensor], x: Tensor, y: Tensor) -> Tensor:
        """Return the mean cross-entropy of ``net``."""
        with self.precision():
            return F.cross_entropy(net(x), y)

    def precision(self) -> AbstractContextManager[object]:
        """Return the autocast context of the problem's precision."""
        if self.autocast is None:
            return nullcontext()
        return torch.autocast(self.images.device.type, dtype=self.autocast)


def ours(problem: Problem, implementation: Implementation) -> Gradient:
    """Compute the gradient with the package's public function.

    With ``engine="autograd"`` the network is a module that the package does not know.
    """
    options = dict(implementation.options)
    net = problem.net if options["engine"] == "autograd" else problem.own

    def gradient(classes: int) -> Tensor:
        images = problem.images[:classes].detach().requires_grad_()
        loss = pdd_fast.gradient_matching(
            net,
            problem.theta,
            problem.real[:classes],
            problem.real_labels[:classes],
            images,
            problem.labels[:classes],
            precision=implementation.precision,
            **options,
        )
        return torch.autograd.grad(loss, images)[0]

    return gradient


def plain(problem: Problem) -> Gradient:
    """Differentiate with create_graph=True, as IDC's script does.

    Classes are processed one at a time, so only one class's graph exists at a time.
    """
    memory = torch.channels_last if problem.channels_last else torch.contiguous_format
    net = problem.net.to(memory_format=memory)
    # Only the parameters that count: autograd skips the gradients of the others.
    counted = [parameter for parameter in net.parameters() if parameter.dim() > 2]

    def of_class(real: Tensor, real_labels: Tensor, images: Tensor, labels: Tensor) -> Tensor:
        images = images.contiguous(memory_format=memory).requires_grad_()
        target = torch.autograd.grad(
            problem.loss(net, real.contiguous(memory_format=memory), real_labels), counted
        )
        found = torch.autograd.grad(problem.loss(net, images, labels), counted, create_graph=True)
        distance = torch.stack(
            [(g - t).square().sum() for g, t in zip(found, target, strict=True)]
        ).sum()
        return torch.autograd.grad(distance, images)[0]

    def gradient(classes: int) -> Tensor:
        batches = (problem.real, problem.real_labels, problem.images.detach(), problem.labels)
        return torch.stack(
            [of_class(*each) for each in zip(*(b[:classes] for b in batches), strict=True)]
        )

    return gradient


def functional(problem: Problem) -> Gradient:
    """Compute the dual pass with torch.func: jvp of the images' gradient along ∂D/∂g.

    The memory format is planar, because torch 2.13 does not support channels-last here.
    """
    net = problem.net.to(memory_format=torch.contiguous_format)
    parameters = {name: parameter.detach() for name, parameter in net.named_parameters()}
    Parameters = dict[str, Tensor]

    def loss(at: Parameters, x: Tensor, y: Tensor) -> Tensor:
        return problem.loss(lambda images: torch.func.functional_call(net, at, (images,)), x, y)

    of_parameters, of_images = torch.func.grad(loss), torch.func.grad(loss, argnums=1)

    def of_class(real: Tensor, real_labels: Tensor, images: Tensor, labels: Tensor) -> Tensor:
        target, found = (
            of_parameters(parameters, real, real_labels),
            of_parameters(parameters, images, labels),
        )
        along = {
            name: 2 * (g - target[name]) if g.dim() > 2 else torch.zeros_like(g)
            for name, g in found.items()
        }
        return torch.func.jvp(lambda at: of_images(at, images, labels), (parameters,), (along,))[1]

    def gradient(classes: int) -> Tensor:
        batches = (problem.real, problem.real_labels, problem.images, problem.labels)
        with torch.no_grad():
            return torch.stack(
                [of_class(*each) for each in zip(*(b[:classes] for b in batches), strict=True)]
            )

    return gradient


def prepared(implementation: Implementation, problem: Problem) -> Gradient:
    """Return a gradient on ``problem``, moved to the memory format and precision it needs."""
    options = implementation.options
    if implementation.ours:
        return ours(problem, implementation)
    problem.channels_last = options["channels_last"]
    problem.autocast = torch.bfloat16 if implementation.precision == "bfloat16" else None
    return {"plain": plain, "functional": functional}[options["function"]](problem)


def write_truth(case: Case, job: Job) -> dict[str, Any]:
    """Save the float64 gradient for comparison.

    torch.func computes it, independently of the package and with the memory of one class at a time.
    """
    found = functional(Problem.draw(case, job.device, torch.float64))(case.classes)
    torch.save(found.cpu(), job.scratch / _TRUTH)
    return {"by": "torch.func in float64"}


def measured(case: Case, implementation: Implementation, job: Job) -> dict[str, Any]:
    """Measure one implementation."""
    measure.set_precision(implementation.precision)
    problem = Problem.draw(case, job.device, torch.float32)
    if implementation.options.get("function") == "functional":
        measure.load_lazily_loaded()
    memory = measure.Memory(job.device)
    gradient = prepared(implementation, problem)
    # Two classes complete all one-time work; a GPU needs all classes, because it batches them.
    gradient(case.classes if job.device.type == "cuda" else min(2, case.classes))
    gc.collect()
    memory.forget()
    results: list[Tensor] = []

    def once() -> None:
        results[:] = [gradient(case.classes)]

    taken = measure.repeated(once, job.device)
    bytes_taken = memory.found()
    truth = job.scratch / _TRUTH
    found = {"error": measure.image_errors(results[0], torch.load(truth))} if truth.exists() else {}
    return measure.sample({"gradient": taken}, bytes_taken, **found)
