"""Gradient matching (IDC; Kim et al., ICML 2022, arXiv 2205.14959), in PDD's stages."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from pdd_fast.augmentation.cutmix import label_weights
from pdd_fast.functional.gradient_distance import (
    GradientDistance,
    class_gradients,
    matched_gradients,
)
from pdd_fast.methods.base import StageProblem
from pdd_fast.methods.class_matching import ClassMatching, ClassMatchingSettings
from pdd_fast.networks.parameters import parameter_count
from pdd_fast.runtime.choices import Distance
from pdd_fast.training.sgd import Loop, TrainState


class GradientMatchingSettings(ClassMatchingSettings):
    """Settings of IDC; defaults are those of its published runs at 10 images per class.

    MTT's learning rate of the images would drive pixels to 0 and 1. No error would report this,
    because the pixels stay finite.
    """

    run_defaults: ClassVar[Mapping[str, Any]] = MappingProxyType(
        {
            "iterations": 2000,
            "augment": "color_crop_cutout",
            "augment_mode": "multiple",
            "eval_every": 0,
            "eval_epochs": 500,
            "transition_epochs": 200,
        }
    )

    lr_img: float = Field(1e-3, ge=0, description="Learning rate of the images.")
    distance: Distance = Field(
        "squared", description="Distance of gradients: squared, or cosine layer by layer."
    )
    inner_loops: int = Field(
        100,
        ge=1,
        description="Updates of the images in an iteration, each followed by one of its network.",
    )
    network_images: int = Field(
        2000,
        ge=0,
        description="Real images that the network is trained on after each update, in steps of "
        "union_batch.",
    )


class GradientMatching(ClassMatching):
    """Method that matches the parameter gradients of real and synthetic images per class.

    Every iteration takes a start network, trained on the earlier unions, and repeats two updates
    ``inner_loops`` times. The first is an SGD update of the images on the distance between the
    network's gradients on real and on synthetic images of a class, summed over classes. The second
    trains the network on ``network_images`` real images. Pixels are clamped to [0, 1] after every
    iteration.

    The published code updates the classes one after another, and every update applies momentum to
    all images. Images of a class affect no other class's distance. With C classes, momentum m and
    momentum buffer v, an image therefore moves by lr·v·(1 − mᶜ)/(1 − m) between two updates of its
    class, and the buffer decays to mᶜ·v. Here one update does this for all classes at once.
    """

    Settings = GradientMatchingSettings
    settings: GradientMatchingSettings

    def __init__(self, problem: StageProblem) -> None:
        super().__init__(problem)
        self._distance = GradientDistance(problem.engine.net, self.settings.distance)
        count, images = parameter_count(problem.engine.net), problem.images
        # The network that is matched on. It stays in place, so that its steps are captured once.
        self._network = TrainState.start(
            torch.zeros(1, count, dtype=images.dtype, device=problem.device)
        )
        weights = label_weights(problem.real.labels, problem.num_classes, images.dtype)
        self._loop = Loop(
            self.starts.sgd,
            self._network,
            problem.real.images,
            weights,
            epoch_images=self.settings.network_images,
        )

    def iterate(self) -> dict[str, float]:
        """Run one iteration: ``inner_loops`` updates of the images and of the network."""
        problem, settings = self.problem, self.settings
        generator = problem.generator("matching", problem.stage, self.iteration)
        self._network.theta.copy_(self.starts.parameters(self.iteration))
        self._network.momentum_buffer.zero_()
        stays = settings.momentum**problem.num_classes
        length = self.lr_img * (1 - stays) / (1 - settings.momentum)
        _, pixels, momentum_buffer = self.done
        losses = []
        for _ in range(settings.inner_loops):
            loss, gradient = self._matched(self._network.theta[0], pixels, generator)
            momentum_buffer = momentum_buffer * stays + gradient
            pixels = pixels - length * momentum_buffer
            losses.append(loss)
            if settings.network_images:
                self._loop.epoch(problem.settings.inner_lr, [generator])
        return self.finish(float(torch.stack(losses).mean()), pixels, momentum_buffer)

    def _matched(
        self, theta: Tensor, pixels: Tensor, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """Return the distance, summed over classes [], and its gradient for ``pixels``."""
        engine = self.problem.engine
        leaf = pixels.detach().requires_grad_()
        real, synthetic = self.batches.drawn(leaf, generator)
        labels = [
            [
                torch.full((len(images),), c, device=pixels.device)
                for c, images in enumerate(batches)
            ]
            for batches in (real, [each.images for each in synthetic])
        ]
        targets = class_gradients(engine, theta, real, labels[0])
        found = [
            matched_gradients(
                engine, theta, target, x.images.detach(), y, self._distance, rows=x.learned
            )
            for target, x, y in zip(targets, synthetic, labels[1], strict=True)
        ]
        # A class whose batch holds no image of this stage contributes no gradient.
        followed = [(x, each) for x, each in zip(synthetic, found, strict=True) if len(x.learned)]
        if followed:
            parts = [x.images[x.learned] for x, _ in followed]
            (gradient,) = torch.autograd.grad(parts, leaf, [each.images for _, each in followed])
        else:
            gradient = torch.zeros_like(leaf)
        return torch.stack([each.loss for each in found]).sum(), gradient
