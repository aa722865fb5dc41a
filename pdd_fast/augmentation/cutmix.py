"""CutMix: a box of every image is replaced with that of another image, and labels are mixed.

Source: Yun et al., ICCV 2019, arXiv 1905.04899.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F


class CutMixParameters(NamedTuple):
    """Sampled parameters of one batch of b images for each of K networks.

    They are tensors only, so that a captured graph can be given others of the same shape.
    """

    boxes: Tensor  # int64 [K, 4], the rows [top, bottom) and the columns [left, right) of a box
    partners: Tensor  # int64 [K, b], the image of the same batch that fills the box of each image
    shares: Tensor  # float64 [K, 2], shares of an image's own label and of its partner's

    @classmethod
    def cat(cls, parameters: Sequence[CutMixParameters]) -> CutMixParameters:
        """Return the parameters of several networks as one object."""
        return cls(*(torch.cat(parts) for parts in zip(*parameters, strict=True)))

    def apply(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Return the mixed batches of all networks.

        Args:
            images: [K, b, C, H, W].
            labels: weights [K, b, classes].
        """
        networks, batch = self.partners.shape
        rows, columns = (torch.arange(side, device=images.device) for side in images.shape[-2:])
        top, bottom, left, right = self.boxes.unsqueeze(2).unbind(1)  # [K, 1] each
        inside = ((rows >= top) & (rows < bottom)).unsqueeze(2) & (
            (columns >= left) & (columns < right)
        ).unsqueeze(1)
        offsets = batch * torch.arange(networks, device=images.device).unsqueeze(1)
        index = (self.partners + offsets).flatten()
        others, other_labels = (
            values.flatten(0, 1).index_select(0, index).view_as(values)
            for values in (images, labels)
        )
        own_share, other_share = self.shares.to(labels.dtype).view(-1, 2, 1, 1).unbind(1)
        return (
            torch.where(inside[:, None, None], others, images),
            own_share * labels + other_share * other_labels,
        )


@dataclass(frozen=True)
class CutMix:
    """CutMix of a share of the batches.

    All images of a batch have the same box. Its share of the image is uniform in [0, 1] before it
    is clipped at the border.

    Args:
        probability: probability that a batch is mixed.
    """

    probability: float

    def sample(
        self, batch: int, image_size: tuple[int, int], generator: torch.Generator
    ) -> CutMixParameters:
        """Return parameters for one batch of one network (K = 1), on the CPU.

        Args:
            batch: number of images.
            image_size: height and width of the images in pixels.
            generator: generator on the CPU.
        """
        box, partners = [0, 0, 0, 0], torch.arange(batch, device="cpu")
        if float(torch.rand((), generator=generator, device="cpu")) < self.probability:
            scale = float((1 - torch.rand((), generator=generator, device="cpu")).sqrt())
            centers = [
                int(torch.randint(side, (), generator=generator, device="cpu"))
                for side in image_size
            ]
            box = [
                min(max(center + sign * (int(side * scale) // 2), 0), side)
                for center, side in zip(centers, image_size, strict=True)
                for sign in (-1, 1)
            ]
            partners = torch.randperm(batch, generator=generator, device="cpu")
        top, bottom, left, right = box
        own = 1 - (bottom - top) * (right - left) / (image_size[0] * image_size[1])
        return CutMixParameters(
            torch.tensor([box], device="cpu"),
            partners.unsqueeze(0),
            torch.tensor([[own, 1 - own]], dtype=torch.float64, device="cpu"),
        )


def label_weights(labels: Tensor, num_classes: int, dtype: torch.dtype) -> Tensor:
    """Return labels as weights [n, classes], the form that CutMix mixes.

    Args:
        labels: class indices [n], or weights [n, classes], which are returned as they are.
        num_classes: number of classes.
        dtype: type of new weights.
    """
    return labels if labels.dim() == 2 else F.one_hot(labels, num_classes).to(dtype)
