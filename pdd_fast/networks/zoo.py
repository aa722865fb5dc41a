"""Networks for evaluating a distilled set beside the one it was made for.

They are torchvision's if it has them, adapted to small images. They use instance norm unless the
name says otherwise, as in the literature's comparisons.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from pdd_fast.networks.convnet import ConvNet
from pdd_fast.runtime.errors import UsageError, nearest
from pdd_fast.runtime.torchvision_import import load

_MLP_WIDTH = 128
# Minimum side that leaves more than one pixel in the last normalized plane: an instance norm turns
# a single pixel into 0.
_LEAST_SIDE = {"resnet18": 16, "resnet18-batchnorm": 8, "vgg11": 32, "alexnet": 8}


def build(
    name: str,
    in_channels: int,
    num_classes: int,
    image_size: tuple[int, int],
    width: int = 128,
    depth: int = 3,
) -> nn.Module:
    """Return a network by name, initialized from torch's global random state.

    Args:
        name: one of :data:`TITLES`.
        in_channels: channels of an image.
        num_classes: number of logits.
        image_size: height and width, pixels.
        width: width of "convnet"; the other networks are as published.
        depth: depth of "convnet".

    Raises:
        UsageError: the name is unknown, the images are too small, or torchvision is needed and does
            not import.
    """
    check_names([name])
    least = _LEAST_SIDE.get(name, 1)
    if min(image_size) < least:
        raise UsageError(
            f"image_size must be at least {least} pixels per side for network {name!r}, got "
            f"{image_size}"
        )
    if name == "convnet":
        return ConvNet(in_channels, num_classes, image_size, width, depth)
    return _MAKERS[name](in_channels, num_classes, image_size)


def check_names(names: list[str]) -> None:
    """Raise UsageError unless ``names`` are one or more networks, each named once."""
    for name in names:
        if name not in TITLES:
            raise UsageError(
                f"networks must be from {', '.join(TITLES)}, got {name!r}{nearest(name, TITLES)}"
            )
    if not names or len(set(names)) < len(names):
        raise UsageError(
            f"networks must be one or more, each named once, got {', '.join(names) or 'none'}"
        )


TITLES = {
    "convnet": "ConvNet",
    "resnet18": "ResNet18",
    "resnet18-batchnorm": "ResNet18 (batch norm)",
    "vgg11": "VGG11",
    "alexnet": "AlexNet",
    "mlp": "MLP",
}


def _instance_norm(channels: int) -> nn.Module:
    return nn.GroupNorm(channels, channels)


def _resnet18(
    in_channels: int,
    num_classes: int,
    _: tuple[int, int],
    norm: Callable[[int], nn.Module] = _instance_norm,
) -> nn.Module:
    """Return torchvision's network with a 3×3 first convolution at full resolution, unpooled."""
    net = load("models", "network 'resnet18'").resnet18(num_classes=num_classes, norm_layer=norm)
    net.conv1 = nn.Conv2d(in_channels, 64, 3, padding=1, bias=False)
    net.maxpool = nn.Identity()
    return net


def _vgg11(in_channels: int, num_classes: int, image_size: tuple[int, int]) -> nn.Module:
    """Return the convolutions of torchvision's network, each normalized, and one linear layer."""
    features = load("models", "network 'vgg11'").vgg11_bn(num_classes=num_classes).features
    for i, layer in enumerate(features):
        if isinstance(layer, nn.BatchNorm2d):
            features[i] = _instance_norm(layer.num_features)
    features[0] = nn.Conv2d(in_channels, 64, 3, padding=1)
    H, W = (side // 32 for side in image_size)
    return nn.Sequential(features, nn.Flatten(), nn.Linear(512 * H * W, num_classes))


def _alexnet(in_channels: int, num_classes: int, image_size: tuple[int, int]) -> nn.Module:
    """Return five convolutions at CIFAR's size (Zhao et al., ICLR 2021)."""

    def conv(before: int, after: int, side: int) -> list[nn.Module]:
        return [nn.Conv2d(before, after, side, padding=side // 2), nn.ReLU()]

    def pool() -> list[nn.Module]:
        return [nn.MaxPool2d(2)]

    H, W = (side // 8 for side in image_size)
    return nn.Sequential(
        *conv(in_channels, 128, 5),
        *pool(),
        *conv(128, 192, 5),
        *pool(),
        *conv(192, 256, 3),
        *conv(256, 192, 3),
        *conv(192, 192, 3),
        *pool(),
        nn.Flatten(),
        nn.Linear(192 * H * W, num_classes),
    )


def _mlp(in_channels: int, num_classes: int, image_size: tuple[int, int]) -> nn.Module:
    numbers = in_channels * image_size[0] * image_size[1]
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(numbers, _MLP_WIDTH),
        nn.ReLU(),
        nn.Linear(_MLP_WIDTH, _MLP_WIDTH),
        nn.ReLU(),
        nn.Linear(_MLP_WIDTH, num_classes),
    )


_MAKERS: dict[str, Callable[[int, int, tuple[int, int]], nn.Module]] = {
    "resnet18": _resnet18,
    "resnet18-batchnorm": partial(_resnet18, norm=nn.BatchNorm2d),
    "vgg11": _vgg11,
    "alexnet": _alexnet,
    "mlp": _mlp,
}


def accuracy(net: nn.Module, images: Tensor, labels: Tensor, batch: int = 1000) -> float:
    """Return the top-1 accuracy (%) of ``net`` in evaluation mode.

    Args:
        net: the network; its mode is restored.
        images: [n, C, H, W].
        labels: class indices [n].
        batch: images per forward pass.
    """
    was_training = net.training
    net.eval()
    with torch.no_grad():
        right = sum(
            int((net(x).argmax(1) == y).sum())
            for x, y in zip(images.split(batch), labels.split(batch), strict=True)
        )
    net.train(was_training)
    return 100.0 * right / len(images)
