"""Layout of several ConvNets of one shape that one set of launches computes.

The networks lie side by side along the channels. Images are [B, K·C, H, W] in channels-last memory,
convolutions have K groups, and an instance norm treats every channel alike. Only the linear layer,
here, tells one network from K.

One network of width 128 on 256 images leaves most of a large GPU idle and the host busy with
launches. K networks take as many launches as one.
"""

from __future__ import annotations

import torch
from torch import Tensor


def beside(images: Tensor) -> Tensor:
    """Return images [B, C, H, W], or [K, B, C, H, W] as [B, K·C, H, W], in channels-last memory."""
    if images.dim() == 4:
        return images.contiguous(memory_format=torch.channels_last)
    return images.permute(1, 3, 4, 0, 2).flatten(3).permute(0, 3, 1, 2)


def features(images: Tensor, weight: Tensor) -> Tensor:
    """Return images [B, K·C, H, W] as inputs of the linear layer [B, F] or [K, B, F].

    Args:
        images: the output of the last block.
        weight: of the linear layer, [classes, F] or [K, classes, F].
    """
    if weight.dim() == 2:
        return images.flatten(1).to(weight.dtype)
    return images.unflatten(1, (len(weight), -1)).transpose(0, 1).flatten(2).to(weight.dtype)


def linear(inputs: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Return logits [B, classes] or [K, B, classes]."""
    if weight.dim() == 2:
        return torch.addmm(bias, inputs, weight.t())
    return torch.baddbmm(bias[:, None], inputs, weight.mT)


def sum_images(parts: Tensor, out: Tensor) -> None:
    """Write the sum of [2, B, K·C] over the images B into ``out`` [2, C] or [2, K, C]."""
    if out.dim() == 2:  # one launch instead of two
        torch.sum(parts, 1, out=out)
    else:
        out.copy_(parts.sum(1).view(out.shape))
