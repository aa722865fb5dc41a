"""Matching training trajectories (MTT; Cazenavette et al., CVPR 2022, arXiv 2203.11932, equation 2 and algorithm 1)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from pdd_fast.errors import RunError
from pdd_fast.matching.base import StageProblem
from pdd_fast.seeds import generator
from pdd_fast.unrolling import unroll


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


@dataclass(frozen=True)
class _State:
    """Replaced as a whole at the end of an iteration, so that an interrupt never leaves half of one."""

    iteration: int
    images: Tensor  # [n, C, H, W]
    images_velocity: Tensor
    rate: Tensor  # [] learned inner learning rate
    rate_velocity: Tensor


class TrajectoryMatching:
    """MTT as a base method: images and inner rate by SGD with momentum on the matching loss."""

    def __init__(self, problem: StageProblem) -> None:
        self._problem = problem
        images = problem.initial_images
        rate = torch.tensor(problem.config.inner_lr, dtype=images.dtype, device=images.device)
        self._state = _State(0, images.clone(), torch.zeros_like(images), rate, torch.zeros_like(rate))
        self._labels = torch.cat([problem.frozen_labels, problem.labels])
        self._frozen = torch.arange(len(self._labels)) < len(problem.frozen_labels)

    @property
    def iteration(self) -> int:
        return self._state.iteration

    @property
    def images(self) -> Tensor:
        return self._state.images

    @property
    def learning_rate(self) -> float:
        return float(self._state.rate)

    def step(self) -> dict[str, float]:
        problem, config, state = self._problem, self._problem.config, self._state
        draw = generator(config.seed, "matching", problem.stage, state.iteration)
        trajectory = problem.trajectories[self._integer(len(problem.trajectories), draw)]
        first = self._integer(config.max_start_epoch + 1, draw)
        device = state.images.device
        start, target = (row.to(device) for row in trajectory.pair(first, config.expert_epochs))
        batches = self._batches(draw)
        size = (state.images.shape[2], state.images.shape[3])
        augmentations = [problem.dsa.sample(len(batch), size, draw) for batch in batches]

        images = state.images.detach().requires_grad_()
        rate = state.rate.detach().requires_grad_()
        theta_N = unroll(
            problem.engine.net,
            start,
            torch.cat([problem.frozen_images, images]),
            self._labels,
            rate,
            batches,
            augmentations,
            engine=config.engine,
            memory=config.memory,
            frozen=self._frozen,
        )
        loss = trajectory_matching_loss(theta_N, start, target)
        images_grad, rate_grad = torch.autograd.grad(loss, [images, rate])

        images_velocity = state.images_velocity * config.momentum + images_grad
        rate_velocity = state.rate_velocity * config.momentum + rate_grad
        new = _State(
            state.iteration + 1,
            state.images - config.lr_img * images_velocity,
            images_velocity,
            state.rate - config.lr_lr * rate_velocity,
            rate_velocity,
        )
        value = float(loss.detach())
        self._guard(value, new)
        self._state = new
        return {"loss": value, "inner_lr": float(new.rate)}

    def _guard(self, loss: float, new: _State) -> None:
        where = f"stage {self._problem.stage}, iteration {new.iteration}"
        config = self._problem.config
        if not math.isfinite(loss) or not bool(torch.isfinite(new.images).all()):
            raise RunError(
                f"{where}: the matching loss is {loss:g} and the images are no longer finite; start again with a "
                f"smaller lr_img (now {config.lr_img:g}), lr_lr (now {config.lr_lr:g}) or inner_lr (now "
                f"{config.inner_lr:g})"
            )
        rate = float(new.rate)
        if not rate > 0:
            raise RunError(
                f"{where}: the learned inner rate became {rate:g}; start again with a smaller lr_lr (now "
                f"{config.lr_lr:g})"
            )

    def _batches(self, draw: torch.Generator) -> list[Tensor]:
        """N batches: the union in random order, again and again, in whole batches of the stage's own size."""
        config, total = self._problem.config, len(self._labels)
        size = min(config.inner_batch or len(self._problem.labels), total)
        batches: list[Tensor] = []
        while len(batches) < config.inner_steps:
            order = torch.randperm(total, generator=draw)
            batches += order[: total // size * size].split(size)
        return batches[: config.inner_steps]

    @staticmethod
    def _integer(bound: int, draw: torch.Generator) -> int:
        return int(torch.randint(bound, (), generator=draw))

    def state(self) -> dict[str, Tensor]:
        state = self._state
        return {
            "iteration": torch.tensor(state.iteration),
            "images": state.images.cpu(),
            "images_velocity": state.images_velocity.cpu(),
            "rate": state.rate.cpu(),
            "rate_velocity": state.rate_velocity.cpu(),
        }

    def load_state(self, state: dict[str, Tensor]) -> None:
        device = self._state.images.device
        self._state = _State(
            int(state["iteration"]),
            *(state[name].to(device) for name in ("images", "images_velocity", "rate", "rate_velocity")),
        )
