"""Matching distributions (DM; Zhao and Bilen, WACV 2023, arXiv 2110.04181), in stages."""

from __future__ import annotations

import torch
from torch import Tensor

from pdd_fast.methods.class_matching import ClassMatching
from pdd_fast.networks.parameters import load_parameters
from pdd_fast.runtime import precision


class DistributionMatching(ClassMatching):
    """DM as a method: in a network's last features real and synthetic images of a class have
    the same mean.

    The network of an iteration is freshly drawn and, which is what makes stages of it, was trained
    through the earlier unions; the mean is that of all stages' images.
    """

    def iterate(self) -> dict[str, float]:
        config, ctx = self.problem.config, self.problem.ctx
        generator = ctx.generator("matching", self.problem.stage, self.iteration)
        load_parameters(ctx.engine.net, self.starts.parameters(self.iteration))
        leaf = self.done.pixels.detach().requires_grad_()
        real, synthetic = self.batches.drawn(leaf, generator)
        with precision.computing_in(ctx.engine.precision, ctx.device):
            with torch.no_grad():
                targets = torch.stack([self._mean_features(images) for images in real])
            means = torch.stack([self._mean_features(each.images) for each in synthetic])
            loss = (means - targets).square().sum()
            (gradient,) = torch.autograd.grad(loss, leaf)
        momentum_buffer = self.done.momentum_buffer * config.momentum + gradient
        return self.finish(
            float(loss.detach()), leaf.detach() - self.lr_img * momentum_buffer, momentum_buffer
        )

    def _mean_features(self, images: Tensor) -> Tensor:
        """The mean over ``images`` of what the classifier would get [features]."""
        ctx = self.problem.ctx
        rounded = precision.storage(ctx.engine.precision, images.dtype) != images.dtype
        with torch.autocast(ctx.device.type, torch.bfloat16, enabled=rounded):
            features = images
            for block in ctx.engine.net.blocks:  # type: ignore[union-attr]
                features = block(features)
        return features.to(images.dtype).flatten(1).mean(0)
