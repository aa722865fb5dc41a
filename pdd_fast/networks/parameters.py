"""A module's parameters as one flat vector, in the order of ``parameters()``."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import torch
from torch import Tensor, nn


def flatten_parameters(net: nn.Module) -> Tensor:
    """The parameters of ``net`` as one new vector [P], detached, in the order of
    ``net.parameters()``.

    Raises:
        ValueError: ``net`` has no parameters.
    """
    parameters = [p.detach().reshape(-1) for p in net.parameters()]
    if not parameters:
        raise ValueError("flatten_parameters: net must have parameters, got none")
    return torch.cat(parameters)


def load_parameters(net: nn.Module, theta: Tensor) -> None:
    """Copies ``theta`` [P] into the parameters of ``net``.

    Raises:
        ValueError: ``theta`` is not a vector of as many numbers as ``net`` has parameters.
    """
    check_parameters("load_parameters", net, theta)
    with torch.no_grad():
        for parameter, view in zip(net.parameters(), views(theta, net.parameters()), strict=True):
            parameter.copy_(view)


def views(theta: Tensor, like: Iterator[Tensor]) -> list[Tensor]:
    """Slices of ``theta`` [P] with the shapes of ``like``, P numbers in all, sharing memory.

    Of one split, whose backward pass is one concatenation. A slice's own fills a vector of P
    numbers: of ResNet-18's 62 parameters, a step took four times as long as plain autograd.
    """
    shapes = [tensor.shape for tensor in like]
    parts = theta.split([shape.numel() for shape in shapes])
    return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]


def parameter_count(net: nn.Module) -> int:
    """P, the numbers in all parameters of ``net``."""
    return sum(parameter.numel() for parameter in net.parameters())


def check_parameters(operator: str, net: nn.Module, theta: Tensor) -> None:
    """Raises ValueError unless ``theta`` is a vector with one number per parameter of ``net``."""
    count = parameter_count(net)
    if theta.dim() != 1 or theta.numel() != count:
        raise ValueError(f"{operator}: theta must have shape ({count},), got {tuple(theta.shape)}")


def initial_parameters(net: nn.Module, seed: int) -> Tensor:
    """Freshly drawn parameters [P] for a module like ``net``, from ``seed`` alone: the same on
    every device.

    Every submodule of a copy is asked to ``reset_parameters()``, as its constructor did. ``net``,
    its buffers included, and the global random states are left alone.
    """
    fresh = copy.deepcopy(net).cpu()
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(
            seed
        )  # torch.manual_seed would change the GPUs' states too
        for module in fresh.modules():
            reset = getattr(module, "reset_parameters", None)
            if callable(reset):
                reset()
    return flatten_parameters(fresh).to(next(net.parameters()).device)
