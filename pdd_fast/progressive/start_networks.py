"""Networks that a stage's images are matched on: freshly drawn, then trained on every earlier union
in turn.

As IDC's and PDD's published codes train them: SGD, the rate cut to a fifth after two and after five
sixths of each union's steps, and CutMix (Yun et al., ICCV 2019, arXiv 1905.04899) in some of the
steps.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from pdd_fast.augmentation.dsa import augment
from pdd_fast.progressive.context import Workbench
from pdd_fast.progressive.union import Union
from pdd_fast.training.sgd import Students, descent


def cut_mixed(images: Tensor, labels: Tensor, draw: torch.Generator) -> tuple[Tensor, Tensor]:
    """``images`` [b, C, H, W] with one box of each replaced by that of another image of the batch,
    and ``labels`` [b, classes] mixed by the area that is left. The box is the same for all, its
    share of the image uniform in [0, 1] before it is cut at the border.
    """
    H, W = images.shape[2:]
    side = float((1 - torch.rand((), generator=draw, device="cpu")).sqrt())
    centre = [int(torch.randint(size, (), generator=draw, device="cpu")) for size in (H, W)]
    halves = [int(size * side) // 2 for size in (H, W)]
    (top, left), (bottom, right) = (
        [
            min(max(c + sign * half, 0), size)
            for c, half, size in zip(centre, halves, (H, W), strict=True)
        ]
        for sign in (-1, 1)
    )
    others = torch.randperm(len(images), generator=draw, device="cpu").to(images.device)
    mixed = images.clone()
    mixed[:, :, top:bottom, left:right] = images[others, :, top:bottom, left:right]
    kept = 1 - (bottom - top) * (right - left) / (H * W)
    return mixed, kept * labels + (1 - kept) * labels[others]


class NetworkSgd:
    """SGD of K networks on augmented batches, some of them mixed; ``union_momentum`` and
    ``union_weight_decay``.
    """

    def __init__(self, bench: Workbench) -> None:
        self._bench = bench

    def weights(self, labels: Tensor) -> Tensor:
        """``labels`` as weights [n, classes], which is what mixing gives."""
        if labels.dim() == 2:
            return labels
        return F.one_hot(labels, self._bench.data.num_classes).to(self._bench.train.images.dtype)

    def step(
        self,
        students: Students,
        images: Tensor,
        weights: Tensor,
        rows: Sequence[Tensor],
        rate: float,
        draws: Sequence[torch.Generator],
    ) -> None:
        """A step of every network on its own ``rows`` of ``images`` [n, C, H, W] and ``weights``
        [n, classes].
        """
        config, batches = self._bench.config, list[tuple[Tensor, Tensor]]()
        for own, draw in zip(rows, draws, strict=True):
            index = own.to(images.device)
            x = augment(
                images[index], self._bench.dsa.sample(len(own), self._bench.data.image_size, draw)
            )
            y = weights[index]
            if float(torch.rand((), generator=draw, device="cpu")) < config.cutmix:
                x, y = cut_mixed(x, y, draw)
            batches.append((x, y))
        x, y = (torch.stack(parts) for parts in zip(*batches, strict=True))
        _, gradient = self._bench.engine.gradients(students.theta, x, y)
        momentum, decay = config.union_momentum, config.union_weight_decay
        students.theta.sub_(
            descent(students.theta, students.velocity, gradient, momentum, decay), alpha=rate
        )


class Starts:
    """The start networks of a stage: number i has been trained on U_1, ..., U_{s-1}, whichever
    stage asks for it.

    Args:
        union: of the earlier stages.
    """

    def __init__(self, bench: Workbench, union: Union) -> None:
        self._bench, self._union, self._sgd = bench, union, NetworkSgd(bench)
        self._made: dict[int, Tensor] = {}

    def parameters(self, iteration: int) -> Tensor:
        """[P] of the network that ``iteration`` takes, on the run's device. Networks are trained in
        groups, ahead.
        """
        pool = self._bench.config.start_networks
        number = iteration % pool if pool else iteration
        if number not in self._made:
            size = self._bench.side_by_side
            first = number - number % size
            group = range(first, min(first + size, pool) if pool else first + size)
            if not pool:
                self._made.clear()  # no iteration comes back to these
            self._made |= zip(group, self._trained(group), strict=True)
        return self._made[number]

    def _trained(self, group: range) -> list[Tensor]:
        bench, config, union = self._bench, self._bench.config, self._union
        students = bench.initial_students("start network", group)
        for stage in range(1, union.stages + 1):
            images, labels = union.up_to(stage)
            weights, rate = self._sgd.weights(labels), union.rates[stage - 1]
            draws = [bench.generator("start network", number, stage) for number in group]
            students.velocity.zero_()  # an optimiser of its own for every union
            for epoch in range(config.transition_epochs):
                orders = [
                    torch.randperm(len(images), generator=draw, device="cpu").split(
                        config.union_batch
                    )
                    for draw in draws
                ]
                passed = (6 * epoch) // config.transition_epochs  # sixths
                now = rate * 0.2 ** ((passed >= 4) + (passed >= 5))
                for rows in zip(*orders, strict=True):
                    self._sgd.step(students, images, weights, rows, now, draws)
        return list(students.theta.unbind())
