"""Training trajectories on disk: one safetensors file per network, read a checkpoint at a time."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pdd_fast.runtime.errors import UsageError
from pdd_fast.runtime.files import open_tensors, read_tensors, save_tensors


def trajectory_path(folder: Path, index: int) -> Path:
    return folder / f"trajectory-{index:03d}.safetensors"


def partial_path(folder: Path, index: int) -> Path:
    return folder / f"trajectory-{index:03d}.partial"


def write_trajectory(path: Path, checkpoints: list[Tensor], metadata: dict[str, Any]) -> None:
    """Stores checkpoints ([P] each, epoch 0 first) as "checkpoints" [T+1, P] float32."""
    save_tensors(path, {"checkpoints": torch.stack(checkpoints).float()}, metadata)


class Trajectory:
    """One network's stored weights; a checkpoint is read when it is asked for."""

    def __init__(self, path: Path) -> None:
        """Raises UsageError where the file is not a trajectory."""
        self.path = path
        with open_tensors(path) as (file, metadata):
            if "checkpoints" not in file.keys():  # noqa: SIM118
                raise UsageError(f"{path} is not a trajectory: it holds no tensor 'checkpoints'")
            shape = file.get_slice("checkpoints").get_shape()
            if len(shape) != 2 or shape[0] < 1:
                raise UsageError(
                    f"{path}: checkpoints must have shape [epochs + 1, P], got {shape}"
                )
            self.metadata: dict[str, Any] = metadata
            self.epochs: int = shape[0] - 1
            self.parameters: int = shape[1]

    @property
    def title(self) -> str:
        """The trajectory in words: its file, and its number there where a file holds several."""
        return str(self.path)

    def checkpoint(self, epoch: int) -> Tensor:
        """Weights [P] after ``epoch`` epochs; reads these and no others.

        Raises:
            UsageError: the trajectory is shorter, or these weights are not finite.
        """
        if not 0 <= epoch <= self.epochs:
            raise UsageError(f"{self.title}: epoch must lie in [0, {self.epochs}], got {epoch}")
        theta = self._read(epoch)
        if not is_finite(theta):
            raise UsageError(
                f"{self.title}: checkpoint {epoch} must be finite, got NaN or infinity: this "
                f"network diverged in "
                "training; train it again at a lower learning rate, or take it out"
            )
        return theta

    def _read(self, epoch: int) -> Tensor:
        with open_tensors(self.path) as (file, _):
            return file.get_slice("checkpoints")[epoch : epoch + 1][0].clone()

    def pair(self, epoch: int, ahead: int) -> tuple[Tensor, Tensor]:
        """Checkpoints ``epoch`` and ``epoch + ahead``."""
        return self.checkpoint(epoch), self.checkpoint(epoch + ahead)


def is_finite(theta: Tensor) -> bool:
    """Whether all numbers are finite: their sum in float64 is then, and only then. One pass and no
    mask.
    """
    return math.isfinite(float(theta.sum(dtype=torch.float64)))


def list_trajectories(folder: Path) -> list[Trajectory]:
    """The trajectories in ``folder``, by number.

    Raises:
        UsageError: there are none, or they are not of one shape.
    """
    # The thousandth name has a digit more, hence length first.
    paths = sorted(
        folder.glob("trajectory-*.safetensors"), key=lambda path: (len(path.name), path.name)
    )
    found = [Trajectory(path) for path in paths]
    if not found:
        raise UsageError(f"{folder} holds no trajectories")
    require_alike(found)
    return found


def require_alike(found: Sequence[Trajectory]) -> None:
    """Raises UsageError where trajectories are not of one length and size."""
    first = found[0]
    for other in found[1:]:
        if (other.epochs, other.parameters) != (first.epochs, first.parameters):
            raise UsageError(
                f"{other.path} must have {first.epochs} epochs of {first.parameters} parameters "
                f"like the first "
                f"trajectory beside it, got {other.epochs} of {other.parameters}"
            )


def write_partial(
    folder: Path, index: int, checkpoints: list[Tensor], state: dict[str, Tensor]
) -> None:
    """Keeps a trajectory that is still being made: its checkpoints and what training needs to go
    on.
    """
    tensors = {
        "checkpoints": torch.stack(checkpoints),
        **{f"state.{name}": t for name, t in state.items()},
    }
    save_tensors(partial_path(folder, index), tensors, {})


def read_partial_start(folder: Path, index: int, place: int) -> Tensor:
    """Weights [P] after no epoch of network ``place`` of those in the group's partial file; reads
    these and no others.

    Raises:
        UsageError: the file is missing or damaged.
    """
    with open_tensors(partial_path(folder, index)) as (file, _):
        return file.get_slice("checkpoints")[0:1, place : place + 1][0, 0].clone()


def read_partial(folder: Path, index: int) -> tuple[list[Tensor], dict[str, Tensor]] | None:
    """What :func:`write_partial` kept, or None."""
    path = partial_path(folder, index)
    if not path.exists():
        return None
    tensors, _ = read_tensors(path)
    checkpoints = [row.clone() for row in tensors.pop("checkpoints")]
    return checkpoints, {name.removeprefix("state."): tensor for name, tensor in tensors.items()}
