"""Train the start networks on which a stage's images are matched.

A start network is randomly initialized and then trained on every earlier union in turn, as in the
published code of IDC and PDD. It uses SGD. The learning rate is cut to a fifth after two thirds and
again after five sixths of the epochs on each union. Some steps use CutMix (Yun et al., ICCV 2019,
arXiv 1905.04899).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from pdd_fast.augmentation.dsa import augment
from pdd_fast.data.union_set import UnionSet
from pdd_fast.progressive.context import RunContext
from pdd_fast.training.sgd import TrainState, sgd_update


def cutmix_batch(
    images: Tensor, labels: Tensor, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Return a batch mixed by CutMix: images [b, C, H, W] and labels [b, classes].

    A box of each image is replaced with that of another image in the batch, and the labels are
    mixed by the remaining area. All images have the same box. Its share of the image is uniform in
    [0, 1] before it is clipped at the border.
    """
    H, W = images.shape[2:]
    side = float((1 - torch.rand((), generator=generator, device="cpu")).sqrt())
    center = [int(torch.randint(size, (), generator=generator, device="cpu")) for size in (H, W)]
    halves = [int(size * side) // 2 for size in (H, W)]
    (top, left), (bottom, right) = (
        [
            min(max(c + sign * half, 0), size)
            for c, half, size in zip(center, halves, (H, W), strict=True)
        ]
        for sign in (-1, 1)
    )
    others = torch.randperm(len(images), generator=generator, device="cpu").to(images.device)
    mixed = images.clone()
    mixed[:, :, top:bottom, left:right] = images[others, :, top:bottom, left:right]
    kept = 1 - (bottom - top) * (right - left) / (H * W)
    return mixed, kept * labels + (1 - kept) * labels[others]


class NetworkSgd:
    """SGD of K networks on augmented batches, some of which are mixed by CutMix.

    The momentum is ``union_momentum``, and the weight decay is ``union_weight_decay``.

    Args:
        ctx: Run context.
        cutmix: Probability that a step mixes a network's batch.
    """

    def __init__(self, ctx: RunContext, cutmix: float = 0.0) -> None:
        self._ctx, self._cutmix = ctx, cutmix

    def weights(self, labels: Tensor) -> Tensor:
        """Return ``labels`` as weights [n, classes], the form that CutMix mixes."""
        if labels.dim() == 2:
            return labels
        return F.one_hot(labels, self._ctx.data.num_classes).to(self._ctx.train.images.dtype)

    def step(
        self,
        train_state: TrainState,
        images: Tensor,
        weights: Tensor,
        rows: Sequence[Tensor],
        lr: float,
        generators: Sequence[torch.Generator],
    ) -> None:
        """Update every network with a step on its own ``rows`` of the images, in place.

        ``images`` has shape [n, C, H, W], and ``weights`` has shape [n, classes].
        """
        settings, batches = self._ctx.settings, list[tuple[Tensor, Tensor]]()
        for own, generator in zip(rows, generators, strict=True):
            index = own.to(images.device)
            x = augment(
                images[index], self._ctx.dsa.sample(len(own), self._ctx.data.image_size, generator)
            )
            y = weights[index]
            if float(torch.rand((), generator=generator, device="cpu")) < self._cutmix:
                x, y = cutmix_batch(x, y, generator)
            batches.append((x, y))
        x, y = (torch.stack(parts) for parts in zip(*batches, strict=True))
        _, gradient = self._ctx.engine.gradients(train_state.theta, x, y)
        momentum, decay = settings.union_momentum, settings.union_weight_decay
        train_state.theta.sub_(
            sgd_update(train_state.theta, train_state.momentum_buffer, gradient, momentum, decay),
            alpha=lr,
        )


class StartNetworks:
    """Start networks of stage s.

    Network i is trained on U_1, ..., U_{s-1}. Its random values on a union are the same in every
    stage.

    Args:
        ctx: Run context.
        union: Union of the earlier stages.
        pool: Number of networks, used in turn. 0: a new network in every iteration.
        cutmix: Probability that a training step mixes a network's batch.
    """

    def __init__(
        self, ctx: RunContext, union: UnionSet, pool: int = 0, cutmix: float = 0.0
    ) -> None:
        self._ctx, self._union, self._pool = ctx, union, pool
        self.sgd = NetworkSgd(ctx, cutmix)
        self._made: dict[int, Tensor] = {}

    def parameters(self, iteration: int) -> Tensor:
        """Return the parameters [P] of the network for ``iteration``, on the run's device.

        Networks are trained in groups, ahead of their use.
        """
        pool = self._pool
        number = iteration % pool if pool else iteration
        if number not in self._made:
            size = self._ctx.side_by_side
            first = number - number % size
            group = range(first, min(first + size, pool) if pool else first + size)
            if not pool:
                self._made.clear()  # Later iterations do not use these.
            self._made |= zip(group, self._trained(group), strict=True)
        return self._made[number]

    def _trained(self, group: range) -> list[Tensor]:
        ctx, settings, union = self._ctx, self._ctx.settings, self._union
        train_state = ctx.initial_state("start network", group)
        for stage in range(1, union.stages + 1):
            images, labels = union.up_to(stage)
            weights, lr = self.sgd.weights(labels), union.lrs[stage - 1]
            generators = [ctx.generator("start network", number, stage) for number in group]
            train_state.momentum_buffer.zero_()  # Every union starts with a new optimizer.
            for epoch in range(settings.transition_epochs):
                orders = [
                    torch.randperm(len(images), generator=generator, device="cpu").split(
                        settings.union_batch
                    )
                    for generator in generators
                ]
                passed = (6 * epoch) // settings.transition_epochs  # in sixths
                now = lr * 0.2 ** ((passed >= 4) + (passed >= 5))
                for rows in zip(*orders, strict=True):
                    self.sgd.step(train_state, images, weights, rows, now, generators)
        return list(train_state.theta.unbind())
