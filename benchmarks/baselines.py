"""Compute the meta-gradient of one matching iteration without this package.

The package is compared with these baselines. Each is a function of a :class:`Problem`. It prepares
(for example compiles) and returns the iteration, a call that computes the gradients of the matching
loss with respect to the images and the learning rate. All baselines are exact except
:func:`frozen`. They use torch's own layers and plain torch operations for the augmentation.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import pdd_fast
from pdd_fast.benchmarks.plain_dsa import PlainAugment
from pdd_fast.benchmarks.plain_network import plain_convnet
from pdd_fast.training.cuda_graphs import CudaBackend, Replay

Gradients = tuple[Tensor, Tensor]  # with respect to images [n, C, H, W] and the learning rate []
Iteration = Callable[[], Gradients]


@dataclass
class Problem:
    """One matching iteration.

    N steps train from ``start`` on the images. The loss is ‖θ_N − target‖² / ‖start − target‖².
    """

    net: nn.Module  # torch's own layers
    start: Tensor  # [P]
    target: Tensor  # [P]
    images: Tensor  # [n, C, H, W]
    labels: Tensor  # int64 [n]
    lr: Tensor  # []
    batches: list[Tensor]  # N of int64 [b]
    aug_params: list[pdd_fast.AugmentParameters] | None = None
    own: pdd_fast.ConvNet | None = None  # the same network, as this package implements it
    channels_last: bool = False
    autocast: torch.dtype | None = None

    @classmethod
    def draw(
        cls,
        n: int,
        steps: int,
        size: int,
        width: int,
        depth: int,
        device: torch.device,
        dtype: torch.dtype,
        augment: bool = True,
    ) -> Problem:
        """Return a random problem whose steps each use all ``n`` images.

        Random values are drawn on the CPU in float32, so they are equal on every device and in
        every precision.
        """
        torch.manual_seed(0)
        own = pdd_fast.ConvNet(3, 10, size, width, depth)
        start = pdd_fast.flatten_parameters(own)
        images = torch.randn(n, 3, size, size)
        batches = [torch.randperm(n) for _ in range(steps)]
        target = start + 0.01 * torch.randn_like(start)
        dsa = pdd_fast.DSA("color_crop_cutout_flip_scale_rotate", mode="single")
        aug_params = [dsa.sample(n, size) for _ in batches] if augment else None
        start, target, images = (tensor.to(device, dtype) for tensor in (start, target, images))
        labels, lr = (
            (torch.arange(n) % 10).to(device),
            torch.tensor(0.01, device=device, dtype=dtype),
        )
        net, own = (
            plain_convnet(3, 10, (size, size), width, depth).to(device, dtype),
            own.to(device, dtype),
        )
        return cls(net, start, target, images, labels, lr, batches, aug_params, own)

    def __post_init__(self) -> None:
        device, dtype = self.images.device, self.images.dtype
        self.shapes: dict[str, torch.Size] = {
            name: p.shape for name, p in self.net.named_parameters()
        }
        self.index = [batch.to(device) for batch in self.batches]
        self.steps = len(self.batches)  # fewer during the warm-up
        # Augmentation parameters are on the device before the clock starts, for every
        # implementation.
        self.augments = (
            [PlainAugment.of(each, device, dtype) for each in self.aug_params]
            if self.aug_params
            else None
        )

    def step_input(self, i: int, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return A_i X[b_i] and y[b_i]."""
        x = images[self.index[i]]
        x = self.augments[i](x) if self.augments else x
        x = x.contiguous(memory_format=torch.channels_last) if self.channels_last else x
        return x, self.labels[self.index[i]]

    def step_loss(self, i: int, theta: Tensor, images: Tensor) -> Tensor:
        """Return ℓ(θ, A_i X[b_i], y[b_i])."""
        return self.loss(theta, *self.step_input(i, images))

    def loss(self, theta: Tensor, x: Tensor, y: Tensor) -> Tensor:
        """Return the mean cross-entropy of the network at the flat vector ``theta``."""
        parts = theta.split([shape.numel() for shape in self.shapes.values()])
        parameters = {
            name: part.view(shape)
            for (name, shape), part in zip(self.shapes.items(), parts, strict=True)
        }
        with self.precision():
            return F.cross_entropy(torch.func.functional_call(self.net, parameters, (x,)), y)

    def precision(self) -> AbstractContextManager[object]:
        """Return the autocast context of the problem's precision."""
        if self.autocast is None:
            return nullcontext()
        # The cache is off: θ changes every step, and a tensor cast in one graph must not appear in
        # the next.
        return torch.autocast(self.images.device.type, dtype=self.autocast, cache_enabled=False)

    def matching_loss(self, end: Tensor) -> Tensor:
        """Return ‖θ_N − target‖² / ‖start − target‖²."""
        return (end - self.target).square().sum() / (self.start - self.target).square().sum()

    def adjoint(self, end: Tensor) -> Tensor:
        """Return λ_N, the gradient of the matching loss with respect to θ_N."""
        return 2 * (end - self.target) / (self.start - self.target).square().sum()


def plain(problem: Problem) -> Iteration:
    """Differentiate with create_graph=True through all steps, as MTT's scripts do."""

    def iterate() -> Gradients:
        images, lr = (
            problem.images.detach().requires_grad_(),
            problem.lr.detach().requires_grad_(),
        )
        loss = problem.matching_loss(trained(problem, images, lr))
        images_grad, rate_grad = torch.autograd.grad(loss, [images, lr])
        return images_grad, rate_grad

    return iterate


def captured(problem: Problem) -> Iteration:
    """Replay :func:`plain` as one CUDA graph, whose launches cost next to nothing.

    On other devices it is :func:`plain`.

    Raises:
        RuntimeError: by the second call, if the capture failed.
    """
    on_gpu = problem.images.is_cuda
    found = torch.zeros_like(problem.images), torch.zeros_like(problem.lr)
    replay = Replay(partial(_copy_gradients, plain(problem), found), problem.images.device)

    def iterate() -> Gradients:
        replay()
        if on_gpu and not replay.captures:
            raise RuntimeError(f"no graph was captured: {CudaBackend.failure}")
        return found

    return iterate


def _copy_gradients(iterate: Iteration, places: Gradients) -> None:
    for place, gradient in zip(places, iterate(), strict=True):
        place.copy_(gradient)


def trained(problem: Problem, images: Tensor, lr: Tensor) -> Tensor:
    """Return θ_N as a function of ``images`` and ``lr``, with the graph of all steps."""
    theta = problem.start.detach().requires_grad_()
    for i in range(problem.steps):
        (gradient,) = torch.autograd.grad(
            problem.step_loss(i, theta, images), theta, create_graph=True
        )
        theta = theta - lr * gradient
    return theta


def training_path(problem: Problem) -> tuple[list[Tensor], list[Tensor]]:
    """Return θ_0..θ_N and the N gradients, without a graph across steps."""
    path, gradients = [problem.start], []
    for i in range(problem.steps):
        theta = path[i].detach().requires_grad_()
        (gradient,) = torch.autograd.grad(problem.step_loss(i, theta, problem.images), theta)
        gradients.append(gradient)
        path.append(path[i] - problem.lr * gradient)
    return path, gradients


def checkpointed(problem: Problem) -> Iteration:
    """Save only each step's parameters and recompute its double backward pass from them."""

    def iterate() -> Gradients:
        path, gradients = training_path(problem)
        adjoint = problem.adjoint(path[-1])
        images = problem.images.detach().requires_grad_()
        images_grad, rate_grad = torch.zeros_like(images), torch.zeros_like(problem.lr)
        for i in reversed(range(len(gradients))):
            theta = path[i].detach().requires_grad_()
            (gradient,) = torch.autograd.grad(
                problem.step_loss(i, theta, images), theta, create_graph=True
            )
            theta_part, images_part = torch.autograd.grad(gradient @ adjoint, [theta, images])
            rate_grad -= gradients[i] @ adjoint
            images_grad -= problem.lr * images_part
            adjoint = adjoint - problem.lr * theta_part
        return images_grad, rate_grad

    return iterate


def frozen(problem: Problem) -> Iteration:
    """Compute TESLA's approximation, which is NOT exact.

    θ_N = θ_0 − α Σ g_i(θ_i, X) with every θ_i a constant, so λ_i = λ_N. As in TESLA, only one
    step's graph exists at a time, because all steps share the direction λ_N.
    """

    def iterate() -> Gradients:
        path, gradients = training_path(problem)
        adjoint = problem.adjoint(path[-1])
        images = problem.images.detach().requires_grad_()
        images_grad = torch.zeros_like(images)
        for i in range(len(gradients)):
            theta = path[i].detach().requires_grad_()
            (gradient,) = torch.autograd.grad(
                problem.step_loss(i, theta, images), theta, create_graph=True
            )
            (part,) = torch.autograd.grad(gradient @ adjoint, images)
            images_grad -= problem.lr * part
        return images_grad, -(torch.stack(gradients) @ adjoint).sum()

    return iterate


def functional(problem: Problem, compiled: bool = False) -> Iteration:
    """Compute the dual pass with torch.func: jvp of grad along the adjoint.

    The augmentation stays outside of torch.compile. Its operation changes from step to step, and
    each one would be compiled anew.

    Args:
        problem: the matching iteration.
        compiled: compile the gradient and the dual pass with torch.compile.
    """
    gradient_of = torch.func.grad(problem.loss)
    both_of = torch.func.grad(problem.loss, argnums=(0, 1))

    def dual(
        theta: Tensor, x: Tensor, y: Tensor, direction: Tensor
    ) -> tuple[tuple[Tensor, Tensor], ...]:
        along = (direction, torch.zeros_like(x))
        return torch.func.jvp(lambda theta, x: both_of(theta, x, y), (theta, x), along)

    if compiled:
        # On a GPU this mode uses CUDA graphs, which avoid the cost of hundreds of small launches.
        mode = "reduce-overhead" if problem.images.is_cuda else None
        gradient_of, dual = torch.compile(gradient_of, mode=mode), torch.compile(dual, mode=mode)

    def iterate() -> Gradients:
        path = [problem.start]
        with torch.no_grad():
            for i in range(problem.steps):
                x, y = problem.step_input(i, problem.images)
                path.append(path[i] - problem.lr * gradient_of(path[i], x, y))
        adjoint = problem.adjoint(path[-1])
        images = problem.images.detach().requires_grad_()
        images_grad, rate_grad = torch.zeros_like(images), torch.zeros_like(problem.lr)
        for i in reversed(range(problem.steps)):
            x, y = problem.step_input(i, images)
            with torch.no_grad():
                (gradient, _), (theta_part, x_part) = dual(path[i], x.detach(), y, adjoint)
                rate_grad -= gradient @ adjoint
                adjoint = adjoint - problem.lr * theta_part
            (images_part,) = torch.autograd.grad(x, images, x_part)
            images_grad -= problem.lr * images_part
        return images_grad, rate_grad

    return iterate


FUNCTIONS: dict[str, Callable[[Problem], Iteration]] = {
    "plain": plain,
    "captured": captured,
    "checkpointed": checkpointed,
    "frozen": frozen,
    "functional": functional,
    "compiled": partial(functional, compiled=True),
}
