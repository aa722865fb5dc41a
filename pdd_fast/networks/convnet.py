"""ConvNet of the dataset-distillation literature."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pdd_fast.networks import kernels
from pdd_fast.ops.convnet import ConvNetShape
from pdd_fast.runtime import torch_internals


class ConvNet(nn.Module):
    """Convolutional network of ``depth`` blocks and one linear layer.

    A block is a 3×3 convolution, an instance norm with affine parameters, ReLU, and 2×2 average
    pooling. ``parameters()`` gives convolution weight, convolution bias, norm weight and norm bias
    per block, then linear weight and bias. Flat vectors are therefore interchangeable with those of
    MTT's expert files (Cazenavette et al. 2022).

    Differentiable to any order. On the CPU, a compiled kernel computes the forward pass and its
    first gradient in float32 and float64, two to three times as fast as the layers one by one. The
    layers themselves run on a GPU, in transforms, and within
    :func:`pdd_fast.networks.kernels.plain_torch`.

    Args:
        in_channels: channels of an image, at least 1.
        num_classes: number of logits, at least 1.
        image_size: height and width in pixels, one number or two; each at least ``2**depth``.
        width: channels of every convolution.
        depth: number of blocks, at least 1.

    Raises:
        ValueError: a number is out of range.

    Example:
        >>> import torch
        >>> import pdd_fast
        >>> net = pdd_fast.ConvNet(in_channels=3, num_classes=10, image_size=32)
        >>> net(torch.randn(4, 3, 32, 32)).shape
        torch.Size([4, 10])
        >>> sum(parameter.numel() for parameter in net.parameters())
        320010
    """

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        image_size: int | tuple[int, int],
        width: int = 128,
        depth: int = 3,
    ) -> None:
        super().__init__()
        sides = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
        if len(sides) != 2:
            raise ValueError(f"ConvNet: image_size must be one number or two, got {sides}")
        height, width_px = sides
        for name, value in (
            ("in_channels", in_channels),
            ("num_classes", num_classes),
            ("width", width),
            ("depth", depth),
        ):
            if value < 1:
                raise ValueError(f"ConvNet: {name} must be at least 1, got {value}")
        if min(height, width_px) < 2**depth:
            raise ValueError(
                f"ConvNet: image_size must be at least 2**depth = {2**depth} pixels, got "
                f"{height}x{width_px}"
            )
        self.in_channels, self.num_classes, self.width, self.depth = (
            in_channels,
            num_classes,
            width,
            depth,
        )
        self.image_size = (height, width_px)
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(in_channels if i == 0 else width, width, kernel_size=3, padding=1),
                nn.GroupNorm(width, width),
                nn.ReLU(),
                nn.AvgPool2d(2),
            )
            for i in range(depth)
        )
        self.classifier = nn.Linear(width * (height >> depth) * (width_px >> depth), num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits [B, num_classes] of ``images`` [B, in_channels, H, W]."""
        if not torch.jit.is_scripting():  # type: ignore[attr-defined]
            found = kernels.logits(self, images)
            if found is not None:
                return found
        for block in self.blocks:
            images = block(images)
        return self.classifier(torch.flatten(images, 1))


_FORWARD = ConvNet.forward


def kernel_shape(net: nn.Module) -> ConvNetShape | None:
    """Return the shape by which the kernels compute ``net``; None if they cannot.

    The kernels compute a ConvNet with the layers and parameters that its constructor makes. They do
    not compute a subclass, which may have another ``forward``, a ConvNet with an exchanged, pruned,
    parametrized or hooked layer, or one with a parameter added, missing or shared. This check alone
    decides between the fused and the autograd engine.
    """
    if (
        type(net) is not ConvNet
        or torch_internals.is_patched(net)
        or torch_internals.has_hooks(net)
    ):
        return None
    if (
        ConvNet.forward is not _FORWARD
        or torch_internals.has_global_hooks()
        or torch_internals.in_function_mode()
    ):
        return None
    shape, parameters = kernels.recognized(net)
    own = list(net.parameters())
    if (
        shape is None
        or len(own) != len(parameters)
        or any(a is not b for a, b in zip(own, parameters, strict=True))
    ):
        return None
    return shape
