"""Helpers of the tests of mtt."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import pdd_fast
from pdd_fast import engines
from pdd_fast.augmentation.parameters import AugmentParameters, PackedAugmentParameters
from pdd_fast.engines import Engine, FusedEngine
from pdd_fast.methods import TrajectoryMatching
from pdd_fast.methods.mtt.inputs import MatchingInputs
from pdd_fast.methods.mtt.settings import MatchingSettings
from pdd_fast.methods.mtt.step import MatchingResult, MatchingState, MatchingStep
from pdd_fast.training.cuda_graphs import Backend

CPU = torch.device("cpu")


CLASSES, STEPS, BATCH, SIZE = 3, 4, 5, (8, 7)


SINGLE, MULTIPLE = pdd_fast.DSA(), pdd_fast.DSA("color_crop_cutout", mode="multiple")


UPDATE = {"lr_img": 0.5, "lr_lr": 1e-3, "lr_label": 20.0, "momentum": 0.6}


RATES = ("lr_img", "lr_lr", "lr_label")


class Case:
    """A stage in small: a network, m frozen and n learned images, and draws for as many iterations
    as asked for.
    """

    def __init__(
        self,
        device: torch.device = CPU,
        dtype: torch.dtype = torch.float32,
        frozen: int = 4,
        learned: int = 6,
        engine: str = "fused",
        memory: str = "recompute",
        keep: int = 0,
        dsa: pdd_fast.DSA | None = SINGLE,
        labels: str = "hard",
    ) -> None:
        """``keep``: with memory="auto", how many steps the limit has room for."""
        draw = torch.Generator().manual_seed(0)
        net = pdd_fast.ConvNet(3, CLASSES, SIZE, width=6, depth=2).to(dtype)
        self.theta = pdd_fast.flatten_parameters(net) + 0.1
        self.device, self.memory, self.dsa = device, memory, dsa
        self.engine: Engine = engines.choose(net.to(device), engine)
        size = self.engine.saved_bytes(engines.PassShape(BATCH, (3, *SIZE), dtype, device))
        self.memory_limit = keep * size if memory == "auto" else None
        images = torch.randn(frozen + learned, 3, *SIZE, generator=draw, dtype=dtype).to(device)
        self.frozen, self.learned = images.split([frozen, learned])
        self.labels = torch.randint(CLASSES, (frozen + learned,), generator=draw).to(device)
        self.learns_labels = labels == "learned"
        if labels != "hard":
            self.labels = (
                torch.randn(frozen + learned, CLASSES, generator=draw, dtype=dtype)
                .softmax(1)
                .to(device)
            )

    def inputs(self, seed: int) -> tuple[MatchingInputs, list[AugmentParameters] | None]:
        draw = torch.Generator().manual_seed(seed)
        start, target = (
            self.theta + 0.1 * torch.randn(len(self.theta), generator=draw).to(self.theta.dtype)
            for _ in range(2)
        )
        batches = torch.stack(
            [torch.randperm(len(self.labels), generator=draw)[:BATCH] for _ in range(STEPS)]
        )
        if self.dsa is None:
            return MatchingInputs(start, target, batches, None), None
        aug_params = [self.dsa.sample(BATCH, SIZE, draw) for _ in range(STEPS)]
        return MatchingInputs(
            start, target, batches, PackedAugmentParameters.of(aug_params)
        ), aug_params

    def step(self, backend: Backend | None = None, **options: Any) -> MatchingStep:
        if self.dsa is not None:
            drawn = self.dsa.sample(1, SIZE, torch.Generator())
            options = {"operations": len(drawn.operations), "cutout": drawn.cutout_size} | options
        memory = {
            "memory": self.memory,
            "memory_limit": self.memory_limit,
            "learn_labels": self.learns_labels,
        }
        options = {"steps": STEPS, "batch": BATCH} | memory | UPDATE | options
        settings = MatchingSettings(**options)
        return MatchingStep(self.engine, self.labels, self.frozen, settings, backend=backend)

    def first(self) -> MatchingState:
        own = self.labels[len(self.frozen) :] if self.learns_labels else None
        return MatchingState.start(self.learned, 0.03, own)

    def run(self, step: MatchingStep, iterations: int) -> list[MatchingResult]:
        state, results = self.first(), []
        for seed in range(iterations):
            results.append(step(state, self.inputs(seed)[0]))
            state = results[-1].state
        return results

    def by_autograd(self, iterations: int) -> list[MatchingResult]:
        """The same through the public functions and torch's own differentiation of the loss."""
        state, results = self.first(), []
        for seed in range(iterations):
            inputs, aug_params = self.inputs(seed)
            start, target = inputs.start.to(self.device), inputs.target.to(self.device)
            images, lr, logits = (
                t.clone().requires_grad_() for t in (state.images, state.lr, state.logits)
            )
            labels = self.labels
            if self.learns_labels:
                labels = torch.cat([labels[: len(self.frozen)], logits.softmax(1)])
            end = pdd_fast.unroll(
                self.engine.net,
                start,
                torch.cat([self.frozen, images]),
                labels,
                lr,
                list(inputs.batches),
                aug_params,
                engine="fused" if isinstance(self.engine, FusedEngine) else "autograd",
                memory=self.memory,
                memory_limit=self.memory_limit,
                frozen=torch.arange(len(self.labels)) < len(self.frozen),
            )
            loss = pdd_fast.trajectory_matching_loss(end, start, target)
            grads = torch.autograd.grad(loss, [images, lr, logits], materialize_grads=True)
            updated = list[Tensor]()
            for name, gradient, update in zip(
                ("images", "lr", "logits"), grads, RATES, strict=True
            ):
                momentum_buffer = (
                    getattr(state, f"{name}_momentum_buffer") * UPDATE["momentum"] + gradient
                )
                updated += [
                    getattr(state, name) - UPDATE[update] * momentum_buffer,
                    momentum_buffer,
                ]
            state = MatchingState(*updated)
            results.append(MatchingResult(state, float(loss.detach()), float(state.lr), True))
        return results


def assert_same(found: list[MatchingResult], expected: list[MatchingResult]) -> None:
    for i, (one, other) in enumerate(zip(found, expected, strict=True)):
        assert one[1:] == other[1:], i
        for name, tensor in one.state._asdict().items():
            assert torch.equal(tensor, getattr(other.state, name)), (i, name)


CASES = {
    "plain": {},
    "kept activations": {"memory": "cache"},
    "activations kept up to a limit": {"memory": "auto", "keep": 2},
    "several operations": {"dsa": MULTIPLE},
    "no augmentation": {"dsa": None},
    "nothing frozen": {"frozen": 0, "learned": 7},
    "mostly frozen": {"frozen": 30, "learned": 2},
    "autograd": {"engine": "autograd"},
    "autograd, kept": {"engine": "autograd", "memory": "cache"},
    "autograd, kept up to a limit": {"engine": "autograd", "memory": "auto", "keep": 2},
    "float64": {"dtype": torch.float64},
    "soft labels": {"labels": "soft"},
    "learned labels": {"labels": "learned"},
    "learned labels, nothing frozen": {"labels": "learned", "frozen": 0, "dtype": torch.float64},
    "learned labels, autograd": {"labels": "learned", "engine": "autograd"},
}


def kept(method: TrajectoryMatching) -> int:
    return method._step._buffers.specs[0].keep
