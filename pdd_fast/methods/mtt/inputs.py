"""Random inputs of an iteration of trajectory matching, and where they lie on the device."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from pdd_fast.augmentation.parameters import PackedAugmentParameters
from pdd_fast.methods.mtt.settings import MatchingSettings
from pdd_fast.ops.dsa import AUG_PARAMS, NOTHING
from pdd_fast.runtime.errors import require
from pdd_fast.training.cuda_graphs import Upload

_require = partial(require, "MatchingStep")


class MatchingInputs(NamedTuple):
    """Random inputs of an iteration, on the CPU."""

    start: Tensor  # [P] θ_0, or [K, P] of K > 1 trajectories
    target: Tensor  # [P] θ_T, or [K, P]
    # int64 [N, b] or [K, N, b], rows of the frozen images followed by the learned ones
    batches: Tensor
    # of K·N·b images, batch after batch, as PackedAugmentParameters.of returns them
    aug_params: PackedAugmentParameters | None


class InputBuffers:
    """Inputs of the current iteration at fixed addresses on the device.

    Args:
        settings: Settings of the step.
        images: [m + n, C, H, W], the images that batches refer to. They fix the type and device.
        parameters: P, number of parameters of the network.
    """

    def __init__(self, settings: MatchingSettings, images: Tensor, parameters: int) -> None:
        several, dtype = settings.trajectories, images.dtype
        K, N, b = settings.trajectories_per_step, settings.steps, settings.batch
        shapes: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
            "start": ((*several, parameters), dtype),
            "target": ((*several, parameters), dtype),
            "batches": ((*several, N, b), torch.int64),
            "lrs": ((3,), dtype),
        }
        if settings.operations:
            shapes["values"] = ((K * N, len(AUG_PARAMS), b), torch.float64)
            shapes["operations"] = ((K * N, settings.operations, b), torch.int32)
        self._settings, self._total = settings, len(images)
        self._upload = Upload(shapes, images.device)
        fixed = self._upload.tensors
        self.start = fixed["start"].view(K, parameters)
        self.target = fixed["target"].view(K, parameters)
        # [3], learning rates of the images, the inner learning rate and the logits
        self.lrs = fixed["lrs"]
        # [K][N], int64 [b] each
        self.batches = [own.unbind() for own in fixed["batches"].view(K, N, b)]
        each: list[PackedAugmentParameters | None] = [None] * (K * N)
        if settings.operations:
            each = [
                PackedAugmentParameters(values, operations, settings.cutout)
                for values, operations in zip(fixed["values"], fixed["operations"], strict=True)
            ]
        # [K][N], of b images each; None: no augmentation
        self.aug_params = [each[first : first + N] for first in range(0, K * N, N)]

    def write(self, inputs: MatchingInputs, lrs: Tensor) -> None:
        """Check ``inputs`` and copy them and ``lrs`` [3] to the device.

        Raises:
            ValueError: An input does not fit the settings, or an index is out of range.
        """
        settings, batches = self._settings, inputs.batches
        shape = (*settings.trajectories, settings.steps, settings.batch)
        _require(batches.dtype == torch.int64, "batches", "be torch.int64", batches.dtype)
        found = tuple(batches.shape)
        _require(found == shape, "batches", f"have shape {shape}", found)
        low, high = int(batches.min()), int(batches.max())
        _require(
            low >= 0 and high < self._total,
            "batches",
            f"hold indices in [0, {self._total})",
            f"{low}..{high}",
        )
        sources = {"start": inputs.start, "target": inputs.target, "batches": batches, "lrs": lrs}
        self._upload.write(**sources, **self._augmentations(inputs.aug_params))

    def _augmentations(self, aug_params: PackedAugmentParameters | None) -> dict[str, Tensor]:
        """Return augmentation parameters batch by batch, with as many operations in each."""
        settings = self._settings
        if not settings.operations:
            _require(aug_params is None, "aug_params", "be None where operations is 0", aug_params)
            return {}
        if aug_params is None:
            raise ValueError(
                "MatchingStep: aug_params must be given where operations is not 0, got None"
            )
        most, batch = settings.operations, settings.batch
        steps = settings.trajectories_per_step * settings.steps
        k, images = aug_params.operations.shape
        _require(images == steps * batch, "aug_params", f"be of {steps * batch} images", images)
        _require(k <= most, "aug_params", f"apply at most {most} operations", k)
        size = aug_params.cutout_size
        _require(size == settings.cutout, "aug_params", f"have cutout_size {settings.cutout}", size)
        operations = aug_params.operations.new_full((most, images), NOTHING)
        operations[:k] = aug_params.operations
        return {
            "values": aug_params.values.view(len(AUG_PARAMS), steps, batch).transpose(0, 1),
            "operations": operations.view(most, steps, batch).transpose(0, 1),
        }
