"""Train in eager PyTorch as an experienced user would: torch.optim.SGD on whole batches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pdd_fast.benchmarks.plain_dsa import PlainAugment


class Sampler(Protocol):
    """Source of augmentation parameters."""

    def sample(self, batch: int, size: tuple[int, int]) -> PlainAugment:
        """Return the parameters of a batch of images of ``size``."""
        ...


class PlainTraining:
    """Train one network.

    Args:
        net: changed in place; moved to channels-last memory if ``channels_last``.
        sampler: source of DSA parameters; None: no augmentation.
        generator: generator for the order of images, on their device.
        batch: images per step.
        lr: learning rate.
        momentum: momentum of SGD.
        decay: weight decay.
        channels_last: use channels-last memory.
        compiled: compile network and loss with torch.compile.
    """

    def __init__(
        self,
        net: nn.Module,
        sampler: Sampler | None,
        generator: torch.Generator,
        *,
        batch: int,
        lr: float = 0.01,
        momentum: float = 0.0,
        decay: float = 0.0,
        channels_last: bool = False,
        compiled: bool = False,
    ) -> None:
        self.format = torch.channels_last if channels_last else torch.contiguous_format
        self.net = net.to(memory_format=self.format) if channels_last else net
        self.sampler, self.generator, self.batch = sampler, generator, batch
        self.optimizer = torch.optim.SGD(self.net.parameters(), lr, momentum, weight_decay=decay)
        self.loss: Callable[[Tensor, Tensor], Tensor] = self._loss
        if compiled:
            on_gpu = generator.device.type == "cuda"
            self.loss = torch.compile(self._loss, mode="reduce-overhead" if on_gpu else None)

    def _loss(self, images: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(self.net(images), labels)

    def step(self, images: Tensor, labels: Tensor) -> None:
        """Take one step on a batch."""
        if self.sampler is not None:
            images = self.sampler.sample(len(images), (images.shape[2], images.shape[3]))(images)
        self.optimizer.zero_grad()
        self.loss(images.contiguous(memory_format=self.format), labels).backward()
        self.optimizer.step()

    def steps(self, images: Tensor, labels: Tensor, count: int) -> None:
        """Take ``count`` steps, with a new order of images in every epoch."""
        done = 0
        while done < count:
            order = torch.randperm(
                len(images), generator=self.generator, device=self.generator.device
            )
            for index in order.split(self.batch)[: count - done]:
                self.step(images[index], labels[index])
                done += 1

    def run(self, images: Tensor, labels: Tensor, lr: float, count: int) -> None:
        """Take ``count`` steps at ``lr``, the second half of them at a tenth of it."""
        half = (count + 1) // 2
        for share, number in ((lr, half), (lr / 10, count - half)):
            for group in self.optimizer.param_groups:
                group["lr"] = share
            self.steps(images, labels, number)

    def accuracy(self, images: Tensor, labels: Tensor, batch: int = 1000) -> float:
        """Return the top-1 accuracy (%) of the network."""
        with torch.no_grad():
            parts = zip(images.split(batch), labels.split(batch), strict=True)
            right = [
                (self.net(x.contiguous(memory_format=self.format)).argmax(1) == y).sum()
                for x, y in parts
            ]
        return 100.0 * float(torch.stack(right).sum()) / len(images)
