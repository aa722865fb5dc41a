"""Matching gradients (IDC; Kim et al., ICML 2022, arXiv 2205.14959), as PDD runs it in stages."""

from __future__ import annotations

import torch
from torch import Tensor

from pdd_fast.functional.gradient_matching import (
    GradientDistance,
    class_gradients,
    matched_gradients,
)
from pdd_fast.methods.base import StageProblem
from pdd_fast.methods.class_matching import PixelMethod
from pdd_fast.progressive.start_networks import NetworkSgd
from pdd_fast.training.sgd import Students


class GradientMatching(PixelMethod):
    """IDC as a base method.

    An iteration takes a network that was trained through the earlier unions and ``inner_loops``
    times does two things: it moves the images along the gradient of the distance, summed over
    classes, between the network's gradients on real and on synthetic images of a class; and it
    trains the network on ``network_images`` real images. Pixels are clamped to [0, 1] after every
    iteration.

    The published code gives the classes their turns one after another, and momentum moves all
    images in each. Images of a class are in no other class's distance. So from one turn of theirs
    to the next they move by lr·v·(1 − mᶜ)/(1 − m) with C classes, and mᶜ of their velocity v stays:
    here that is done at once, for all classes.
    """

    def __init__(self, problem: StageProblem) -> None:
        super().__init__(problem)
        bench = problem.bench
        self._distance = GradientDistance(bench.engine.net, problem.config.distance)
        self._sgd = NetworkSgd(bench)
        self._real_weights = self._sgd.weights(problem.real.labels)

    def iterate(self) -> dict[str, float]:
        problem, config = self.problem, self.problem.config
        draw = problem.bench.generator("matching", problem.stage, self.iteration)
        students = Students.start(self.starts.parameters(self.iteration)[None])
        stays = config.momentum**problem.bench.data.num_classes
        length = self.lr_img * (1 - stays) / (1 - config.momentum)
        _, pixels, velocity = self.done
        losses = []
        for _ in range(config.inner_loops):
            loss, gradient = self._matched(students.theta[0], pixels, draw)
            velocity = velocity * stays + gradient
            pixels = pixels - length * velocity
            losses.append(loss)
            self._train(students, draw)
        return self.finish(float(torch.stack(losses).mean()), pixels, velocity)

    def _matched(
        self, theta: Tensor, pixels: Tensor, draw: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """The distance, summed over classes [], and its gradient with respect to ``pixels``."""
        engine = self.problem.bench.engine
        leaf = pixels.detach().requires_grad_()
        real, synthetic = self.batches.drawn(leaf, draw)
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
        # Where a class's draw has none of this stage's images there is nothing to follow.
        followed = [(x, each) for x, each in zip(synthetic, found, strict=True) if len(x.learned)]
        if followed:
            parts = [x.images[x.learned] for x, _ in followed]
            (gradient,) = torch.autograd.grad(parts, leaf, [each.images for _, each in followed])
        else:
            gradient = torch.zeros_like(leaf)
        return torch.stack([each.loss for each in found]).sum(), gradient

    def _train(self, students: Students, draw: torch.Generator) -> None:
        """The network on ``network_images`` real images, in steps of ``union_batch``."""
        problem, config = self.problem, self.problem.config
        if not config.network_images:
            return
        order = torch.randperm(len(problem.real), generator=draw, device="cpu")[
            : config.network_images
        ]
        for rows in order.split(config.union_batch):
            self._sgd.step(
                students, problem.real.images, self._real_weights, [rows], config.inner_lr, [draw]
            )
