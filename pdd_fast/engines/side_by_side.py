"""Several ConvNets in one set of launches: gradients and logits of K networks of one shape.

The networks lie side by side along the channels. Images are [B, K·C, H, W] in channels-last memory,
convolutions have K groups, and an instance norm treats every channel alike.

One network of width 128 on 256 images leaves most of a large GPU idle and the host busy with
launches. K networks take as many launches as one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from pdd_fast.engines.convolution import conv, conv_input_grad, conv_weight_grad, operand
from pdd_fast.ops.cross_entropy import cross_entropy
from pdd_fast.ops.norm_relu_pool import norm_relu_pool, norm_relu_pool_backward


class _Block(NamedTuple):
    """One block of every network, in the order of the network's parameters."""

    conv: Tensor  # [K, C, C_in, 3, 3]
    conv_bias: Tensor  # [K, C]
    weight: Tensor  # [K, C]
    bias: Tensor  # [K, C]

    @property
    def affine(self) -> Tensor:
        """Weights and biases [2, K, C], which are neighbors in every network's vector."""
        networks, channels = self.weight.shape
        return self.weight.as_strided((2, networks, channels), (channels, self.weight.stride(0), 1))


class _Seen(NamedTuple):
    """Inputs and outputs of a block."""

    x: Tensor  # [B, K·C_in, H, W]
    z: Tensor  # [B, K·C, H, W]
    mean: Tensor  # [B, K·C]
    rstd: Tensor  # [B, K·C]


class _Networks:
    """Views of the parameters theta [K, P], or of their gradients.

    They are the blocks, and ``weight`` [K, classes, F] and ``bias`` [K, classes] of the linear
    layer.
    """

    def __init__(self, shapes: Sequence[Tensor], theta: Tensor) -> None:
        parts, start = [], 0
        for shape in shapes:
            parts.append(theta[:, start : start + shape.numel()].unflatten(1, shape.shape))
            start += shape.numel()
        self.blocks = [_Block(*parts[i : i + 4]) for i in range(0, len(parts) - 2, 4)]
        self.weight, self.bias = parts[-2:]

    def operands(self, dtype: torch.dtype) -> list[_Block]:
        """Return the blocks as a pass computes with them: networks joined to [K·C, ...]."""
        joined = [_Block(*(tensor.flatten(0, 1) for tensor in block)) for block in self.blocks]
        return [block._replace(conv=operand(block.conv, dtype)) for block in joined]


def _beside(images: Tensor) -> Tensor:
    """Return images [K, B, C, H, W] as [B, K·C, H, W] in channels-last memory."""
    return images.permute(1, 3, 4, 0, 2).flatten(3).permute(0, 3, 1, 2)


def _apart(images: Tensor, networks: int) -> Tensor:
    """Return images [B, K·C, H, W] as features [K, B, C·H·W]."""
    return images.unflatten(1, (networks, -1)).transpose(0, 1).flatten(2)


def _forward(
    nets: _Networks, blocks: list[_Block], x: Tensor, seen: list[_Seen] | None
) -> tuple[Tensor, Tensor]:
    """Return features [K, B, F] and logits [K, B, classes].

    ``x`` is [B, K·C, H, W], or [B, C, H, W] for images that all networks share.
    """
    networks = len(nets.bias)
    for i, block in enumerate(blocks):
        z = conv(
            x, block.conv, groups=1 if i == 0 and x.shape[1] == block.conv.shape[1] else networks
        )
        out, mean, rstd = norm_relu_pool(z, block.weight, block.bias)
        if seen is not None:
            seen.append(_Seen(x, z, mean, rstd))
        x = out
    features = _apart(x, networks).to(nets.weight.dtype)
    return features, torch.baddbmm(nets.bias[:, None], features, nets.weight.mT)


def logits_of(shapes: Sequence[Tensor], theta: Tensor, images: Tensor) -> Tensor:
    """Return logits [K, B, classes] of ``images`` [B, C, H, W].

    The activations are stored in the type and layout of ``images``.
    """
    nets = _Networks(shapes, theta)
    return _forward(nets, nets.operands(images.dtype), images, None)[1]


def gradients(
    shapes: Sequence[Tensor],  # parameters of one network
    theta: Tensor,  # [K, P]
    images: Tensor,  # [K, B, C, H, W]
    labels: Tensor,  # [K, B] or [K, B, classes]
    dtype: torch.dtype,  # of images and activations
) -> tuple[Tensor, Tensor]:
    """Return losses [K, B] and the gradient of every network's own mean loss [K, P]."""
    networks, batch = images.shape[:2]
    nets, result, seen = _Networks(shapes, theta), torch.zeros_like(theta), list[_Seen]()
    grads, blocks = _Networks(shapes, result), nets.operands(dtype)
    features, logits = _forward(nets, blocks, _beside(images.to(dtype)), seen)
    losses, grad_logits = cross_entropy(logits.flatten(0, 1), labels.flatten(0, 1))
    # cross_entropy averages over all networks; undo that.
    grad_logits = grad_logits.mul_(networks).unflatten(0, (networks, batch))
    grads.weight.copy_(grad_logits.mT @ features)
    grads.bias.copy_(grad_logits.sum(1))
    last = seen[-1].z
    shape = (-1, last.shape[2] // 2, last.shape[3] // 2)
    grad_out = _beside((grad_logits @ nets.weight).unflatten(2, shape).to(dtype))
    for i in reversed(range(len(blocks))):
        block, grad, (x, z, mean, rstd) = blocks[i], grads.blocks[i], seen.pop()
        grad_z, parts = norm_relu_pool_backward(grad_out, z, mean, rstd, block.weight, block.bias)
        grad.conv.copy_(conv_weight_grad(grad_z, x, block.conv, networks).view(grad.conv.shape))
        grad.affine.copy_(parts.sum(1).unflatten(1, (networks, -1)))
        if i > 0:
            grad_out = conv_input_grad(grad_z, block.conv, x, networks)
    return losses.view(networks, batch), result
