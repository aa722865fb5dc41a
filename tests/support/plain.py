"""The unroll as a textbook writes it: every step through autograd with its graph kept. What the
engines are held to.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pdd_fast.augmentation.parameters import AugmentParameters
from pdd_fast.ops.dsa import dsa


def unroll(
    net: nn.Module,
    theta: Tensor,  # [P]
    images: Tensor,  # [n, C, H, W]
    labels: Tensor,  # [n] or [n, classes]
    lrs: Tensor,  # [] or [N]
    batches: Sequence[Tensor],
    augmentations: Sequence[AugmentParameters] | None = None,
) -> Tensor:
    """θ_N, differentiable to any order; memory grows with every step's activations."""
    shapes = {name: parameter.shape for name, parameter in net.named_parameters()}
    for i, batch in enumerate(batches):
        x, y = images[batch], labels[batch]
        if augmentations is not None:
            draw = augmentations[i]
            packed = draw.packed(x.device)
            x = dsa.reference(x, packed.values, packed.operations, list(packed.cutout_size), False)
        parts = theta.split([shape.numel() for shape in shapes.values()])
        parameters = {
            name: part.view(shape)
            for (name, shape), part in zip(shapes.items(), parts, strict=True)
        }
        loss = F.cross_entropy(torch.func.functional_call(net, parameters, (x,)), y)
        (gradient,) = torch.autograd.grad(loss, theta, create_graph=True)
        theta = theta - (lrs if lrs.dim() == 0 else lrs[i]) * gradient
    return theta
