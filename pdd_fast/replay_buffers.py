"""Expert trajectories as MTT's scripts store them.

A file replay_buffer_N.pt is a list of trajectories, each of these a list of checkpoints, each of these the list of a
network's parameters in the order of ``parameters()``.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pdd_fast.errors import UsageError
from pdd_fast.files import read_pickled_tensors
from pdd_fast.trajectories import Trajectory


class BufferTrajectory(Trajectory):
    """One trajectory of a buffer. Its numbers stay in the file, mapped into memory, until a checkpoint is asked for."""

    def __init__(self, path: Path, checkpoints: list[list[Tensor]]) -> None:
        self.path, self.metadata = path, {}
        self.epochs = len(checkpoints) - 1
        self.parameters = sum(tensor.numel() for tensor in checkpoints[0])
        self._checkpoints = checkpoints

    def _read(self, epoch: int) -> Tensor:
        return torch.cat([tensor.reshape(-1) for tensor in self._checkpoints[epoch]]).float()


def buffer_files(folder: Path) -> list[Path]:
    """The buffers in ``folder``, by number; none is none."""

    def number(path: Path) -> tuple[int, str]:
        digits = re.findall(r"\d+", path.stem)
        return (int(digits[-1]) if digits else -1), path.name

    return sorted(folder.glob("replay_buffer*.pt"), key=number)


def read_buffer(path: Path) -> list[BufferTrajectory]:
    """The trajectories of one file. Only tensors and lists are unpickled, and no numbers are read.

    Raises:
        UsageError: the file holds other things (code among them), is damaged, or cannot be mapped; its checkpoints are
            not of one shape, or are one and the same.
    """
    content = read_pickled_tensors(path, mapped=True)
    if not _is_list(content) or not all(_is_list(t) and all(map(_is_checkpoint, t)) for t in content):
        raise UsageError(f"{path} is no replay buffer: it must hold a list of trajectories of lists of tensors")
    shapes = [tensor.shape for tensor in content[0][0]]
    for trajectory in content:
        if len(trajectory) != len(content[0]) or any([t.shape for t in c] != shapes for c in trajectory):
            raise UsageError(f"{path}: all checkpoints must be of one network and all trajectories of one length")
        # Stored from a network on the CPU without a copy, every checkpoint is the memory of the last.
        if len(trajectory) > 1 and trajectory[0][0].data_ptr() == trajectory[-1][0].data_ptr():
            raise UsageError(f"{path}: the checkpoints of a trajectory are one and the same: they were stored uncopied")
    return [BufferTrajectory(path, trajectory) for trajectory in content]


def _is_list(value: Any) -> bool:
    return isinstance(value, list | tuple) and len(value) > 0


def _is_checkpoint(value: Any) -> bool:
    return _is_list(value) and all(isinstance(t, Tensor) and t.is_floating_point() for t in value)
