"""Matching distributions (DM; Zhao and Bilen, WACV 2023, arXiv 2110.04181), in stages."""

from __future__ import annotations

import torch
from torch import Tensor

from pdd_fast.methods.class_matching import PixelMethod
from pdd_fast.networks.parameters import load_parameters
from pdd_fast.runtime import precision


class DistributionMatching(PixelMethod):
    """DM as a base method: in a network's last features real and synthetic images of a class have
    the same mean.

    The network of an iteration is freshly drawn and, which is what makes stages of it, was trained
    through the earlier unions; the mean is that of all stages' images.
    """

    def iterate(self) -> dict[str, float]:
        config, bench = self.problem.config, self.problem.bench
        draw = bench.generator("matching", self.problem.stage, self.iteration)
        load_parameters(bench.engine.net, self.starts.parameters(self.iteration))
        leaf = self.done.pixels.detach().requires_grad_()
        real, synthetic = self.batches.drawn(leaf, draw)
        with precision.computing_in(bench.engine.precision, bench.device):
            with torch.no_grad():
                targets = torch.stack([self._mean_features(images) for images in real])
            means = torch.stack([self._mean_features(each.images) for each in synthetic])
            loss = (means - targets).square().sum()
            (gradient,) = torch.autograd.grad(loss, leaf)
        velocity = self.done.velocity * config.momentum + gradient
        return self.finish(float(loss.detach()), leaf.detach() - self.lr_img * velocity, velocity)

    def _mean_features(self, images: Tensor) -> Tensor:
        """The mean over ``images`` of what the classifier would get [features]."""
        bench = self.problem.bench
        rounded = precision.storage(bench.engine.precision, images.dtype) != images.dtype
        with torch.autocast(bench.device.type, torch.bfloat16, enabled=rounded):
            features = images
            for block in bench.engine.net.blocks:  # type: ignore[union-attr]
                features = block(features)
        return features.to(images.dtype).flatten(1).mean(0)
