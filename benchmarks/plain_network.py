"""Build the ConvNet from torch's own layers, without this package's kernels."""

from __future__ import annotations

from collections import OrderedDict

from torch import nn


def plain_convnet(
    in_channels: int, num_classes: int, size: tuple[int, int], width: int, depth: int
) -> nn.Module:
    """Return the network of :class:`pdd_fast.ConvNet`, with the same order of parameters."""
    blocks = [
        nn.Sequential(
            nn.Conv2d(width if i else in_channels, width, 3, padding=1),
            nn.GroupNorm(width, width),
            nn.ReLU(),
            nn.AvgPool2d(2),
        )
        for i in range(depth)
    ]
    features = width * (size[0] >> depth) * (size[1] >> depth)
    layers = {
        "blocks": nn.Sequential(*blocks),
        "flatten": nn.Flatten(),
        "linear": nn.Linear(features, num_classes),
    }
    return nn.Sequential(OrderedDict(layers))
