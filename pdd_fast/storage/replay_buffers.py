"""Expert trajectories in the format of MTT's scripts.

A file replay_buffer_N.pt is a list of trajectories. A trajectory is a list of checkpoints, and a
checkpoint is the list of a network's parameters in the order of ``parameters()``. A state dict is
accepted as a checkpoint, and a list of state dicts as one trajectory.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pdd_fast.runtime.errors import UsageError
from pdd_fast.runtime.files import read_pickled_tensors
from pdd_fast.storage.trajectories import Trajectory

# Entries of state dicts that are not parameters, all of batch norm.
_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


class BufferTrajectory(Trajectory):
    """One trajectory of a buffer, mapped into memory; checkpoints are read on request.

    Args:
        path: file of the buffer.
        number: position of the trajectory in the file.
        checkpoints: lists of tensors, or state dicts.
    """

    def __init__(self, path: Path, number: int, checkpoints: Sequence[Any]) -> None:
        self.path, self.metadata = path, {}
        self.names, self.statistics = _names(checkpoints[0])
        self._number, self._checkpoints = (
            number,
            [_parameters(checkpoint) for checkpoint in checkpoints],
        )
        self.epochs = len(checkpoints) - 1
        self.shapes = [tuple(tensor.shape) for tensor in self._checkpoints[0]]
        self.parameters = sum(tensor.numel() for tensor in self._checkpoints[0])

    @property
    def title(self) -> str:
        """File and number of the trajectory, for messages."""
        return f"{self.path}: trajectory {self._number}"

    def _read(self, epoch: int) -> Tensor:
        return torch.cat(
            [tensor.detach().reshape(-1) for tensor in self._checkpoints[epoch]]
        ).float()

    def require_fits(self, net: nn.Module) -> None:
        """Raise UsageError unless the stored tensors have the shapes of the parameters of ``net``.

        Networks with equally many parameters in another order read the same vector differently.
        Names are compared too if the buffer has them, because many tensors of a ConvNet have the
        same shape.
        """
        kind = type(net).__name__
        if self.statistics:
            raise UsageError(
                f"{self.path}: checkpoints must be of the run's {kind}, which has instance norm, "
                f"got one with batch norm ({self.statistics[0]})"
            )
        wanted = [(name, tuple(parameter.shape)) for name, parameter in net.named_parameters()]
        found = list(zip(self.names or [""] * len(self.shapes), self.shapes, strict=True))
        for place, ((name, shape), (own, expected)) in enumerate(
            zip_longest(found, wanted, fillvalue=("", ()))
        ):
            role, own_role = (each.rpartition(".")[2] for each in (name, own))
            if shape == expected and (
                not role or role == own_role or {role, own_role} != {"weight", "bias"}
            ):
                continue
            got = f"{name + ' ' if name else ''}{shape if place < len(found) else 'none'}"
            raise UsageError(
                f"{self.path}: tensor {place} of a checkpoint must be {own or 'absent'} "
                f"{expected} as in the run's {kind}, got {got}: the experts must be networks of "
                "its width, depth and order of parameters"
            )


def buffer_files(folder: Path) -> list[Path]:
    """Return the buffers in ``folder``, sorted by number; there may be none."""

    def number(path: Path) -> tuple[int, str]:
        digits = re.findall(r"\d+", path.stem)
        return (int(digits[-1]) if digits else -1), path.name

    return sorted(folder.glob("replay_buffer*.pt"), key=number)


def read_buffer(path: Path) -> list[BufferTrajectory]:
    """Return the trajectories of one file without reading their elements.

    Only tensors, lists and dictionaries are unpickled.

    Raises:
        UsageError: the file holds other things (code among them) or is damaged, or its checkpoints
            differ in shape or share their memory.
    """
    content = read_pickled_tensors(path, mapped=True)
    if _is_list(content) and all(isinstance(each, Mapping) for each in content):
        content = [content]  # one trajectory of state dicts
    if not _is_list(content) or not all(
        _is_list(t) and all(map(_is_checkpoint, t)) for t in content
    ):
        raise UsageError(
            f"{path} is not a replay buffer: it must hold a list of trajectories of lists of "
            "tensors (or of state dicts)"
        )
    found = [
        BufferTrajectory(path, number, trajectory) for number, trajectory in enumerate(content)
    ]
    shapes, names = found[0].shapes, found[0].names
    for trajectory, checkpoints in zip(found, content, strict=True):
        alike = all(
            [tuple(t.shape) for t in _parameters(c)] == shapes and _names(c)[0] == names
            for c in checkpoints
        )
        if trajectory.epochs != found[0].epochs or not alike:
            raise UsageError(
                f"{path}: all checkpoints must be of one network and all trajectories of one length"
            )
        # A checkpoint that was stored without a copy from a network on the CPU shares its memory
        # with the others.
        first, last = (_parameters(checkpoints[place])[0] for place in (0, -1))
        if trajectory.epochs > 0 and first.data_ptr() == last.data_ptr():
            raise UsageError(
                f"{path}: checkpoints of a trajectory must differ, got equal ones that share their "
                "memory; store copies"
            )
    return found


def _is_list(value: Any) -> bool:
    return isinstance(value, list | tuple) and len(value) > 0


def _is_checkpoint(value: Any) -> bool:
    if isinstance(value, Mapping):
        if not all(
            isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in value.items()
        ):
            return False
    elif not _is_list(value):
        return False
    parameters = _parameters(value)
    return len(parameters) > 0 and all(
        isinstance(t, Tensor) and t.is_floating_point() for t in parameters
    )


def _parameters(checkpoint: Any) -> list[Tensor]:
    """Return the parameters of a checkpoint, without the statistics of batch norm."""
    if isinstance(checkpoint, Mapping):
        return [tensor for name, tensor in checkpoint.items() if not name.endswith(_STATISTICS)]
    return list(checkpoint)


def _names(checkpoint: Any) -> tuple[list[str], list[str]]:
    """Return the names of a state dict's parameters and statistics; none for a list."""
    if not isinstance(checkpoint, Mapping):
        return [], []
    names, statistics = list[str](), list[str]()
    for name in checkpoint:
        (statistics if name.endswith(_STATISTICS) else names).append(name)
    return names, statistics
