"""Trajectory matching (MTT; Cazenavette et al., CVPR 2022, arXiv 2203.11932).

The loss is their equation 2, the procedure their algorithm 1.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from contextlib import suppress

import torch
from torch import Tensor

from pdd_fast.augmentation.parameters import PackedAugmentParameters
from pdd_fast.engines import PassShape
from pdd_fast.methods.base import BaseMethod, StageProblem
from pdd_fast.methods.mtt.inputs import MatchingInputs
from pdd_fast.methods.mtt.memory import matching_bytes
from pdd_fast.methods.mtt.progress import ANCHOR, Progress
from pdd_fast.methods.mtt.settings import TrajectoryMatchingSettings
from pdd_fast.methods.mtt.step import MatchingResult, MatchingState, MatchingStep
from pdd_fast.runtime import device_memory
from pdd_fast.runtime.errors import RunError


class RollbackWarning(UserWarning):
    """Warning that the images were rolled back and the step size halved."""


class TrajectoryMatching(BaseMethod):
    """Method that matches training trajectories.

    SGD with momentum on the matching loss updates the images, the inner learning rate and, if
    labels=learned, the labels.

    Args:
        problem: The stage's inputs.

    Raises:
        UsageError: An iteration would take more memory than the GPU has.
    """

    Settings = TrajectoryMatchingSettings
    needs_trajectories = True

    settings: TrajectoryMatchingSettings

    def __init__(self, problem: StageProblem) -> None:
        super().__init__(problem)
        images, labels = problem.images, torch.cat([problem.union.labels, problem.labels])
        self._total = len(labels)
        self._matching = self.settings.of_stage(problem)
        device_memory.require(
            images.device, self._bytes(), f"stage {problem.stage}: an iteration", self._lower()
        )
        # Replaced as a whole at the end of an iteration, so that an interrupt never leaves half an
        # update.
        learned = problem.labels if self._matching.learn_labels else None
        self._done = Progress.start(MatchingState.start(images, problem.settings.inner_lr, learned))
        # An iteration's inputs, prepared while the GPU was busy.
        self._ahead: tuple[int, MatchingInputs] | None = None
        self._step = MatchingStep(problem.engine, labels, problem.union.images, self._matching)

    @property
    def iteration(self) -> int:
        """Number of iterations done."""
        return self._done.iteration

    @property
    def images(self) -> Tensor:
        """Current images of the stage [n, C, H, W], averaged if ``ema_decay`` is not 0."""
        return self._done.average.images

    @property
    def labels(self) -> Tensor:
        """Current labels of the stage, [n] or [n, classes]; learned ones averaged as the images."""
        if not self._matching.learn_labels:
            return self.problem.labels
        return self._done.average.logits.softmax(1)

    @property
    def learning_rate(self) -> float:
        """Learned inner learning rate."""
        return float(self._done.state.lr)

    def _bytes(self) -> int:
        """Return the estimated peak number of bytes of an iteration."""
        problem, matching = self.problem, self._matching
        shape = PassShape.of(problem.images, matching.batch)
        return matching_bytes(
            problem.engine,
            shape,
            steps=matching.steps,
            saved=matching.saved_steps(problem.engine, shape),
            learned=len(problem.labels),
            frozen=len(problem.union.labels),
        )

    def _lower(self) -> str:
        """Return advice that lowers the memory of an iteration, the most effective last."""
        matching, run = self._matching, self.problem.settings
        batch, width = f"inner_batch (now {matching.batch})", f"width (now {run.width})"
        if matching.memory == "auto":
            limit = device_memory.format_bytes(matching.memory_limit or 0)
            return f"{batch}, {width} or memory_limit (now {limit}), or set memory=recompute"
        if matching.memory == "cache":
            return f"{batch} or {width}, or set memory=recompute"
        return f"{batch} or {width}" + (", or set engine=fused" if run.engine == "autograd" else "")

    def step(self) -> dict[str, float]:
        """Run one iteration; roll back and halve the step size as often as it diverges.

        Returns:
            Values to report: "loss", "inner_lr", and after a rollback "halvings".

        Raises:
            RunError: The iteration diverged after ``max_rollbacks`` rollbacks.
        """
        done, own = self._done, self.settings
        iteration = done.iteration
        if self._ahead is None or self._ahead[0] != iteration:
            self._ahead = (iteration, self._inputs(iteration))
        inputs, where = self._ahead[1], f"stage {self.problem.stage}, iteration {iteration + 1}"
        meanwhile: Callable[[], None] | None = self._look_ahead
        while True:
            with device_memory.explained(done.state.images.device, where, self._lower()):
                result = self._step(done.state, inputs, meanwhile, 0.5**done.halvings)
            wrong = self._wrong(result)
            if wrong is None:
                break
            if done.halvings == own.max_rollbacks:
                times = (
                    f", after its steps were halved {done.halvings} times" if done.halvings else ""
                )
                raise RunError(f"{where}: {wrong[0]}{times}; start again with a smaller {wrong[1]}")
            done, meanwhile = done.rolled_back(), None
            warnings.warn(
                f"{where}: {wrong[0]}; continuing from the images of {ANCHOR} to {2 * ANCHOR} "
                f"iterations before, with steps of 1/{2**done.halvings}",
                RollbackWarning,
                stacklevel=2,
            )
        self._done = done.followed_by(result.state, own.ema_decay)
        values = {"loss": result.loss, "inner_lr": result.lr}
        return values | ({"halvings": done.halvings} if done.halvings else {})

    def _look_ahead(self) -> None:
        """Prepare the next iteration's inputs.

        Errors are suppressed: they occur again when the inputs are needed.
        """
        following = self.iteration + 1
        with suppress(Exception):
            self._ahead = (following, self._inputs(following))

    def _inputs(self, iteration: int) -> MatchingInputs:
        """Sample trajectories, batches and augmentation parameters of ``iteration``."""
        problem, own, dsa = self.problem, self.settings, self.problem.dsa
        generator = problem.generator("matching", problem.stage, iteration)
        pairs, batches, sampled = [], [], []
        for _ in range(own.trajectories_per_step):
            trajectory = problem.trajectories[_integer(len(problem.trajectories), generator)]
            first = _integer(own.max_start_epoch + 1, generator)
            pairs.append(trajectory.pair(first, own.expert_epochs))
            steps = self._batches(generator)
            batches.append(torch.stack(steps))
            if dsa.operations:
                sampled += [
                    dsa.sample(len(batch), problem.image_size, generator) for batch in steps
                ]
        aug_params = PackedAugmentParameters.of(sampled) if sampled else None
        if own.trajectories_per_step == 1:
            return MatchingInputs(*pairs[0], batches[0], aug_params)
        starts, targets = (torch.stack(points) for points in zip(*pairs, strict=True))
        return MatchingInputs(starts, targets, torch.stack(batches), aug_params)

    def _batches(self, generator: torch.Generator) -> list[Tensor]:
        """Sample the N batches of an iteration as rows of the union.

        Every pass over the union has a new random order. The rest that does not fill a batch is
        dropped.
        """
        size, steps = self._matching.batch, self._matching.steps
        batches: list[Tensor] = []
        while len(batches) < steps:
            order = torch.randperm(self._total, generator=generator, device="cpu")
            batches += order[: self._total // size * size].split(size)
        return batches[:steps]

    def _wrong(self, result: MatchingResult) -> tuple[str, str] | None:
        """Return how an iteration diverged and the settings to lower; None if it did not."""
        matching = self._matching
        lr_lr = f"lr_lr (now {matching.lr_lr:g})"
        if not math.isfinite(result.loss) or not result.finite:
            lrs, diverged = f"lr_img (now {matching.lr_img:g}), {lr_lr}", "images"
            lrs += f" or inner_lr (now {self.problem.settings.inner_lr:g})"
            if matching.learn_labels:
                lrs = f"lr_label (now {matching.lr_label:g}), {lrs}"
                diverged = "images or labels"
            return (
                f"the matching loss is {result.loss:g} and the {diverged} are no longer finite",
                lrs,
            )
        if not result.lr > 0:
            return f"the learned inner rate became {result.lr:g}", lr_lr
        return None

    def state(self) -> dict[str, Tensor]:
        """Return the state on the CPU; see :meth:`BaseMethod.state`."""
        return {name: tensor.cpu() for name, tensor in self._done.tensors().items()}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Restore a state; see :meth:`BaseMethod.load_state`."""
        self._done = Progress.of_tensors(
            {name: tensor.to(self.images.device) for name, tensor in state.items()}
        )


def _integer(bound: int, generator: torch.Generator) -> int:
    """Return a random integer in [0, bound)."""
    return int(torch.randint(bound, (), generator=generator, device="cpu"))
