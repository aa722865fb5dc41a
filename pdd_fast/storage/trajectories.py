"""Training trajectories on disk: a safetensors file per network, read by checkpoint."""

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
    """Return the file of trajectory ``index``."""
    return folder / f"trajectory-{index:03d}.safetensors"


def partial_path(folder: Path, index: int) -> Path:
    """Return the file of an unfinished trajectory ``index``."""
    return folder / f"trajectory-{index:03d}.partial"


def write_trajectory(path: Path, checkpoints: list[Tensor], metadata: dict[str, Any]) -> None:
    """Write checkpoints ([P] each, epoch 0 first) as "checkpoints" [T+1, P] float32."""
    save_tensors(path, {"checkpoints": torch.stack(checkpoints).float()}, metadata)


class Trajectory:
    """Stored parameters of one network; a checkpoint is read on request."""

    def __init__(self, path: Path) -> None:
        """Open a trajectory.

        Raises:
            UsageError: the file is not a trajectory.
        """
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
        """File of the trajectory, for messages, and its number if the file holds several."""
        return str(self.path)

    def checkpoint(self, epoch: int) -> Tensor:
        """Return the parameters [P] after ``epoch`` epochs, reading no others.

        Raises:
            UsageError: the trajectory is shorter, or these parameters are not finite.
        """
        if not 0 <= epoch <= self.epochs:
            raise UsageError(f"{self.title}: epoch must lie in [0, {self.epochs}], got {epoch}")
        theta = self._read(epoch)
        if not is_finite(theta):
            raise UsageError(
                f"{self.title}: checkpoint {epoch} must be finite, got NaN or infinity: this "
                "network diverged in training; train it again at a lower learning rate, or take "
                "it out"
            )
        return theta

    def _read(self, epoch: int) -> Tensor:
        with open_tensors(self.path) as (file, _):
            return file.get_slice("checkpoints")[epoch : epoch + 1][0].clone()

    def pair(self, epoch: int, ahead: int) -> tuple[Tensor, Tensor]:
        """Return checkpoints ``epoch`` and ``epoch + ahead``."""
        return self.checkpoint(epoch), self.checkpoint(epoch + ahead)


def is_finite(theta: Tensor) -> bool:
    """Return whether all elements are finite.

    Their sum in float64 is finite if and only if they are, which takes one pass and no mask.
    """
    return math.isfinite(float(theta.sum(dtype=torch.float64)))


def list_trajectories(folder: Path) -> list[Trajectory]:
    """Return the trajectories in ``folder``, sorted by number.

    Raises:
        UsageError: there are none, or they differ in shape.
    """
    # Length first, because the thousandth name has one more digit.
    paths = sorted(
        folder.glob("trajectory-*.safetensors"), key=lambda path: (len(path.name), path.name)
    )
    found = [Trajectory(path) for path in paths]
    if not found:
        raise UsageError(f"{folder} must hold trajectories, got none")
    require_alike(found)
    return found


def require_alike(found: Sequence[Trajectory]) -> None:
    """Raise UsageError unless all trajectories have the same length and size."""
    first = found[0]
    for other in found[1:]:
        if (other.epochs, other.parameters) != (first.epochs, first.parameters):
            raise UsageError(
                f"{other.path} must have {first.epochs} epochs of {first.parameters} parameters "
                f"like the first trajectory beside it, got {other.epochs} of {other.parameters}"
            )


def write_partial(
    folder: Path, index: int, checkpoints: list[Tensor], state: dict[str, Tensor]
) -> None:
    """Write an unfinished trajectory: its checkpoints and the state to resume training."""
    tensors = {
        "checkpoints": torch.stack(checkpoints),
        **{f"state.{name}": t for name, t in state.items()},
    }
    save_tensors(partial_path(folder, index), tensors, {})


def read_partial_start(folder: Path, index: int, place: int) -> Tensor:
    """Return the initial parameters [P] of one network of an unfinished group, reading no others.

    Args:
        folder: folder of the trajectories.
        index: number of the group's partial file.
        place: position of the network in the group.

    Raises:
        UsageError: the file is missing or damaged.
    """
    with open_tensors(partial_path(folder, index)) as (file, _):
        return file.get_slice("checkpoints")[0:1, place : place + 1][0, 0].clone()


def read_partial(folder: Path, index: int) -> tuple[list[Tensor], dict[str, Tensor]] | None:
    """Return the checkpoints and the state that :func:`write_partial` wrote, or None."""
    path = partial_path(folder, index)
    if not path.exists():
        return None
    tensors, _ = read_tensors(path)
    checkpoints = [row.clone() for row in tensors.pop("checkpoints")]
    return checkpoints, {name.removeprefix("state."): tensor for name, tensor in tensors.items()}
