"""Distribution matching (DM; Zhao and Bilen, WACV 2023, arXiv 2110.04181), in stages."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from pdd_fast.methods.class_matching import ClassMatching, ClassMatchingSettings
from pdd_fast.networks.parameters import load_parameters
from pdd_fast.runtime import precision


class DistributionMatchingSettings(ClassMatchingSettings):
    """Settings of DM; no published run of DM in stages is known."""

    run_defaults: ClassVar[Mapping[str, Any]] = MappingProxyType(
        {"iterations": 2000, "transition_epochs": 200}
    )

    lr_img: float = Field(0.1, ge=0, description="Learning rate of the images.")


class DistributionMatching(ClassMatching):
    """Method that matches the mean last-layer features of real and synthetic images per class.

    Every iteration takes a start network: freshly initialized, then trained on the earlier unions.
    This conditions a stage on the stages before it. The synthetic mean includes the images of all
    stages so far.
    """

    Settings = DistributionMatchingSettings
    settings: DistributionMatchingSettings

    def iterate(self) -> dict[str, float]:
        """Run one iteration: one SGD update of the images on the squared distance of the means."""
        settings, problem = self.settings, self.problem
        generator = problem.generator("matching", problem.stage, self.iteration)
        load_parameters(problem.engine.net, self.starts.parameters(self.iteration))
        leaf = self.done.pixels.detach().requires_grad_()
        real, synthetic = self.batches.drawn(leaf, generator)
        with precision.computing_in(problem.engine.precision, problem.device):
            with torch.no_grad():
                targets = torch.stack([self._mean_features(images) for images in real])
            means = torch.stack([self._mean_features(each.images) for each in synthetic])
            loss = (means - targets).square().sum()
            (gradient,) = torch.autograd.grad(loss, leaf)
        momentum_buffer = self.done.momentum_buffer * settings.momentum + gradient
        return self.finish(
            float(loss.detach()), leaf.detach() - self.lr_img * momentum_buffer, momentum_buffer
        )

    def _mean_features(self, images: Tensor) -> Tensor:
        """Return the mean over ``images`` of the classifier's inputs [features]."""
        problem = self.problem
        rounded = precision.storage(problem.engine.precision, images.dtype) != images.dtype
        with torch.autocast(problem.device.type, torch.bfloat16, enabled=rounded):
            features = images
            for block in problem.engine.net.blocks:  # type: ignore[union-attr]
                features = block(features)
        return features.to(images.dtype).flatten(1).mean(0)
