"""Matching training trajectories (MTT; Cazenavette et al., CVPR 2022, arXiv 2203.11932, equation 2 and algorithm 1)."""

from __future__ import annotations

import math
from contextlib import suppress

import torch
from torch import Tensor

from pdd_fast import memory
from pdd_fast.augmentation import PackedDraws
from pdd_fast.engines import PassShape
from pdd_fast.errors import RunError
from pdd_fast.matching.base import StageProblem
from pdd_fast.matching.step import MatchingInputs, MatchingResult, MatchingState, MatchingStep, can_capture
from pdd_fast.seeds import generator
from pdd_fast.unrolling import kept_steps


def trajectory_matching_loss(theta_N: Tensor, start: Tensor, target: Tensor) -> Tensor:
    """‖θ_N − θ_T‖² / ‖θ_0 − θ_T‖², a 0-d tensor; all arguments [P].

    Raises:
        ValueError: the shapes differ.
    """
    if not theta_N.shape == start.shape == target.shape or theta_N.dim() != 1:
        raise ValueError(
            "trajectory_matching_loss: theta_N, start and target must be vectors of one length, got "
            f"{tuple(theta_N.shape)}, {tuple(start.shape)} and {tuple(target.shape)}"
        )
    return (theta_N - target).square().sum() / (start - target).square().sum()


class TrajectoryMatching:
    """MTT as a base method: images and inner rate by SGD with momentum on the matching loss.

    Raises:
        UsageError: an iteration would take more memory than the GPU has.
    """

    def __init__(self, problem: StageProblem) -> None:
        self._problem = problem
        config, images = problem.config, problem.initial_images
        self._total = len(problem.frozen_labels) + len(problem.labels)
        self._batch = min(config.inner_batch or len(problem.labels), self._total)
        memory.require(images.device, self._bytes(), f"stage {problem.stage}: an iteration", self._lower())
        # Replaced as a whole at the end of an iteration, so that an interrupt never leaves half of one.
        self._done = (0, MatchingState.start(images, config.inner_lr))
        self._ahead: tuple[int, MatchingInputs] | None = None  # the inputs of an iteration, made while a GPU was busy
        drawn = problem.dsa.sample(1, self._image_size, torch.Generator())  # what every draw has in common
        self._step = MatchingStep(
            problem.engine,
            torch.cat([problem.frozen_labels, problem.labels]),
            problem.frozen_images,
            steps=config.inner_steps,
            batch=self._batch,
            operations=len(drawn.operations),
            cutout=drawn.cutout_size,
            memory=config.memory,
            memory_limit=self._memory_limit(),
            lr_img=config.lr_img,
            lr_lr=config.lr_lr,
            momentum=config.momentum,
            graph=config.graph != "off" and can_capture(problem.engine, images.device),
        )

    @property
    def iteration(self) -> int:
        return self._done[0]

    @property
    def images(self) -> Tensor:
        return self._done[1].images

    @property
    def learning_rate(self) -> float:
        return float(self._done[1].rate)

    @property
    def _image_size(self) -> tuple[int, int]:
        H, W = self._problem.initial_images.shape[2:]
        return H, W

    def _memory_limit(self) -> int | None:
        """Bytes that kept activations may take: of the whole device, not of what is free at the moment. Steps that are
        kept and steps that are made again round differently, and a run gives the same bits whatever else runs."""
        config = self._problem.config
        if config.memory != "auto":
            return None
        if config.memory_limit:
            return int(min(config.memory_limit * 1e9, 2.0**62))
        return memory.total(self._problem.initial_images.device) // 2

    def _bytes(self) -> int:
        """What an iteration takes at its peak."""
        problem, config = self._problem, self._problem.config
        shape = PassShape.of(problem.initial_images, self._batch)
        steps = [shape] * config.inner_steps
        return memory.matching_bytes(
            problem.engine,
            shape,
            steps=config.inner_steps,
            kept=kept_steps("matching", problem.engine, steps, config.memory, self._memory_limit()),
            learned=len(problem.labels),
            frozen=len(problem.frozen_labels),
        )

    def _lower(self) -> str:
        """What makes an iteration take less, the most effective last."""
        config = self._problem.config
        batch, width = f"inner_batch (now {self._batch})", f"width (now {config.width})"
        if config.memory == "auto":
            limit = memory.in_words(self._memory_limit() or 0)
            return f"{batch}, {width} or memory_limit (now {limit}), or set memory=recompute"
        if config.memory == "cache":
            return f"{batch} or {width}, or set memory=recompute"
        return f"{batch} or {width}" + (", or set engine=fused" if config.engine == "autograd" else "")

    def step(self) -> dict[str, float]:
        iteration, state = self._done
        if self._ahead is None or self._ahead[0] != iteration:
            self._ahead = (iteration, self._inputs(iteration))
        where = f"stage {self._problem.stage}, iteration {iteration + 1}"
        with memory.explained(state.images.device, where, self._lower()):
            result = self._step(state, self._ahead[1], meanwhile=self._look_ahead)
        self._guard(where, result)
        self._done = (iteration + 1, result.state)
        return {"loss": result.loss, "inner_lr": result.rate}

    def _look_ahead(self) -> None:
        """Makes the next iteration's inputs. What goes wrong with them goes wrong again when they are needed."""
        following = self.iteration + 1
        with suppress(Exception):
            self._ahead = (following, self._inputs(following))

    def _inputs(self, iteration: int) -> MatchingInputs:
        problem, config = self._problem, self._problem.config
        draw = generator(config.seed, "matching", problem.stage, iteration)
        trajectory = problem.trajectories[self._integer(len(problem.trajectories), draw)]
        first = self._integer(config.max_start_epoch + 1, draw)
        start, target = trajectory.pair(first, config.expert_epochs)
        batches = self._batches(draw)
        draws = None
        if problem.dsa.operations:
            draws = PackedDraws.of([problem.dsa.sample(self._batch, self._image_size, draw) for _ in batches])
        return MatchingInputs(start, target, torch.stack(batches), draws)

    def _guard(self, where: str, result: MatchingResult) -> None:
        config = self._problem.config
        if not math.isfinite(result.loss) or not result.finite:
            raise RunError(
                f"{where}: the matching loss is {result.loss:g} and the images are no longer finite; start again with "
                f"a smaller lr_img (now {config.lr_img:g}), lr_lr (now {config.lr_lr:g}) or inner_lr (now "
                f"{config.inner_lr:g})"
            )
        if not result.rate > 0:
            raise RunError(
                f"{where}: the learned inner rate became {result.rate:g}; start again with a smaller lr_lr (now "
                f"{config.lr_lr:g})"
            )

    def _batches(self, draw: torch.Generator) -> list[Tensor]:
        """N batches: the union in random order, again and again, in whole batches of the stage's own size."""
        size, steps = self._batch, self._problem.config.inner_steps
        batches: list[Tensor] = []
        while len(batches) < steps:
            order = torch.randperm(self._total, generator=draw)
            batches += order[: self._total // size * size].split(size)
        return batches[:steps]

    @staticmethod
    def _integer(bound: int, draw: torch.Generator) -> int:
        return int(torch.randint(bound, (), generator=draw))

    def state(self) -> dict[str, Tensor]:
        iteration, state = self._done
        return {"iteration": torch.tensor(iteration)} | {name: t.cpu() for name, t in state._asdict().items()}

    def load_state(self, state: dict[str, Tensor]) -> None:
        device = self.images.device
        loaded = MatchingState(*(state[name].to(device) for name in MatchingState._fields))
        self._done = (int(state["iteration"]), loaded)
