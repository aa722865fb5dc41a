"""Checks of what a function takes a network's gradient of: sentences that name the argument, what it must be and what
it is."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pdd_fast.errors import require
from pdd_fast.networks.parameters import check_parameters


def check_theta(operator: str, net: nn.Module, theta: Tensor) -> None:
    """Raises TypeError or ValueError unless ``theta`` is a vector of parameters of ``net``, float32 or float64."""
    if theta.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"{operator}: theta must be float32 or float64, got {theta.dtype}")
    check_parameters(operator, net, theta)


def check_batch(
    operator: str, net: nn.Module, theta: Tensor, images: Tensor, labels: Tensor,
    names: tuple[str, str] = ("images", "labels"),
) -> None:  # fmt: skip
    """Raises TypeError or ValueError unless ``images`` [n, C, H, W] and ``labels``, int64 [n] or weights [n, classes],
    fit one another, ``net`` and ``theta``.

    Args:
        names: of both arguments, for the message.
    """
    images_name, labels_name = names
    for name, tensor in zip(names, (images, labels), strict=True):
        require(operator, tensor.device == theta.device, name, f"be on {theta.device}", tensor.device)
        hard = tensor is labels and tensor.dtype == torch.int64
        if tensor.dtype != theta.dtype and not hard:
            also = " or int64" if tensor is labels else ""
            raise TypeError(f"{operator}: {name} must be {theta.dtype}{also}, got {tensor.dtype}")
    shape = tuple(images.shape)
    require(operator, images.dim() == 4 and len(images) > 0, images_name, "have shape [n, C, H, W]", shape)
    n, shape = len(images), tuple(labels.shape)
    if labels.dtype == torch.int64:
        require(operator, shape == (n,), labels_name, f"have shape ({n},)", shape)
    else:
        require(operator, len(shape) == 2 and shape[0] == n, labels_name, f"have shape ({n}, classes)", shape)
    _check_network(operator, net, images, labels, names)


def _check_network(operator: str, net: nn.Module, images: Tensor, labels: Tensor, names: tuple[str, str]) -> None:
    """Where the module says what it takes, a mismatch is named before a kernel or a matrix product trips over it."""
    channels, size = getattr(net, "in_channels", None), getattr(net, "image_size", None)
    if isinstance(channels, int) and isinstance(size, tuple):
        expected = (channels, *size)
        require(operator, tuple(images.shape[1:]) == expected, names[0],
                f"have shape [n, {', '.join(map(str, expected))}]", tuple(images.shape))  # fmt: skip
    classes = getattr(net, "num_classes", None)
    if not isinstance(classes, int):
        return
    if labels.dtype == torch.int64:
        low, high = int(labels.min()), int(labels.max())
        require(operator, low >= 0 and high < classes, names[1], f"lie in [0, {classes})", f"{low}..{high}")
    else:
        expected = (len(labels), classes)
        require(operator, tuple(labels.shape) == expected, names[1], f"have shape {expected}", tuple(labels.shape))
