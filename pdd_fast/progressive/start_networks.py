"""Train the start networks on which a stage's images are matched.

A start network is randomly initialized and then trained on every earlier union in turn, as in the
published code of IDC and PDD. It uses SGD. The learning rate is cut to a fifth after two thirds and
again after five sixths of the epochs on each union. Some steps use CutMix.
"""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from pdd_fast.augmentation.cutmix import CutMix, label_weights
from pdd_fast.data.union_set import UnionSet
from pdd_fast.progressive.context import RunContext
from pdd_fast.training.sgd import Loop


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
        self.sgd = replace(ctx.synthetic_sgd, cutmix=CutMix(cutmix))
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
        ctx, union = self._ctx, self._union
        train_state = ctx.initial_state("start network", group)
        for stage in range(1, union.stages + 1):
            images, labels = union.up_to(stage)
            weights = label_weights(labels, ctx.data.num_classes, images.dtype)
            train_state.momentum_buffer.zero_()  # Every union starts with a new optimizer.
            lrs = self._lrs(union.lrs[stage - 1], self.sgd.steps_per_epoch(len(images)))
            generators = [ctx.generator("start network", number, stage) for number in group]
            loop = Loop(self.sgd, train_state, images, weights, len(lrs))
            loop.train(lrs, generators)
        return list(train_state.theta.unbind())

    def _lrs(self, lr: float, steps_per_epoch: int) -> list[float]:
        """Return the learning rate of every step on a union."""
        epochs = self._ctx.settings.transition_epochs
        sixths = [(6 * epoch) // epochs for epoch in range(epochs)]  # of the epochs that are done
        return [
            lr * 0.2 ** ((done >= 4) + (done >= 5))
            for done in sixths
            for _ in range(steps_per_epoch)
        ]
