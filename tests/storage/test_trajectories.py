"""Stored trajectories: read a checkpoint at a time, in the order of their numbers, kept half-way
bit by bit.
"""

from __future__ import annotations

import json
import resource
import struct
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pdd_fast.runtime.errors import UsageError
from pdd_fast.runtime.files import save_tensors
from pdd_fast.storage.trajectories import (
    Trajectory,
    list_trajectories,
    partial_path,
    read_partial,
    trajectory_path,
    write_partial,
    write_trajectory,
)


def store(folder: Path, index: int, epochs: int = 2, parameters: int = 3) -> Path:
    """A trajectory whose checkpoint e is filled with 100·index + e."""
    path = trajectory_path(folder, index)
    write_trajectory(
        path,
        [torch.full((parameters,), 100.0 * index + e) for e in range(epochs + 1)],
        {"index": index},
    )
    return path


def test_every_checkpoint_comes_back(tmp_path: Path) -> None:
    checkpoints = [torch.randn(7) for _ in range(4)]
    write_trajectory(tmp_path / "t", checkpoints, {"network": {"width": 3}})
    trajectory = Trajectory(tmp_path / "t")
    assert (trajectory.epochs, trajectory.parameters) == (3, 7)
    assert trajectory.metadata == {"network": {"width": 3}}
    for epoch, expected in enumerate(checkpoints):
        assert torch.equal(trajectory.checkpoint(epoch), expected)


def test_a_pair_is_a_start_and_the_target_ahead_of_it(tmp_path: Path) -> None:
    trajectory = Trajectory(store(tmp_path, 0, epochs=5))
    start, target = trajectory.pair(1, 3)
    assert start.tolist() == [1, 1, 1]
    assert target.tolist() == [4, 4, 4]


def test_checkpoints_are_stored_as_float32(tmp_path: Path) -> None:
    write_trajectory(tmp_path / "t", [torch.ones(2, dtype=torch.float64)], {})
    assert Trajectory(tmp_path / "t").checkpoint(0).dtype == torch.float32


def test_changing_a_checkpoint_leaves_the_file_alone(tmp_path: Path) -> None:
    trajectory = Trajectory(store(tmp_path, 1))
    trajectory.checkpoint(0).zero_()
    assert trajectory.checkpoint(0).tolist() == [100] * 3


def test_a_checkpoint_costs_the_memory_of_its_own_row(tmp_path: Path) -> None:
    epochs, parameters = 1023, 2**18  # 1 GiB, most of it a hole in the file
    shape = [epochs + 1, parameters]
    tensor = {"dtype": "F32", "shape": shape, "data_offsets": [0, 4 * shape[0] * shape[1]]}
    header = json.dumps({"__metadata__": {"pdd_fast": "{}"}, "checkpoints": tensor}).encode()
    path = tmp_path / "large"
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        file.truncate(8 + len(header) + 4 * shape[0] * shape[1])
        file.seek(8 + len(header) + 700 * parameters * 4)
        file.write(struct.pack("<2f", 1.5, -2.5))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start, target = Trajectory(path).pair(700, 1)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before  # kilobytes; bytes on macOS
    assert start[:3].tolist() == [1.5, -2.5, 0]
    assert not target.any()
    assert grown < (2**27 if sys.platform == "darwin" else 2**17)


@pytest.mark.parametrize("epoch", [-1, 3, 100])
def test_an_epoch_that_was_not_stored_is_named(tmp_path: Path, epoch: int) -> None:
    path = store(tmp_path, 0, epochs=2)
    with pytest.raises(UsageError, match=rf"{path}: epoch must lie in \[0, 2\], got {epoch}"):
        Trajectory(path).checkpoint(epoch)


def test_a_target_beyond_the_end_is_named(tmp_path: Path) -> None:
    trajectory = Trajectory(store(tmp_path, 0, epochs=2))
    with pytest.raises(UsageError, match=r"epoch must lie in \[0, 2\], got 3"):
        trajectory.pair(1, 2)


def test_what_is_no_trajectory_is_named(tmp_path: Path) -> None:
    save_tensors(tmp_path / "other", {"images": torch.ones(2)}, {})
    with pytest.raises(
        UsageError, match="/other is not a trajectory: it holds no tensor 'checkpoints'"
    ):
        Trajectory(tmp_path / "other")
    for name, wrong in (
        ("flat", torch.ones(4)),
        ("empty", torch.ones(0, 4)),
        ("deep", torch.ones(2, 2, 2)),
    ):
        save_tensors(tmp_path / name, {"checkpoints": wrong}, {})
        with pytest.raises(
            UsageError, match=rf"/{name}: checkpoints must have shape \[epochs \+ 1, P\], got"
        ):
            Trajectory(tmp_path / name)


# ---- a folder of them ----


def test_trajectories_are_listed_by_number_beyond_the_thousandth_too(tmp_path: Path) -> None:
    for index in (1000, 2, 101, 999, 0):
        store(tmp_path, index)
    assert [t.metadata["index"] for t in list_trajectories(tmp_path)] == [0, 2, 101, 999, 1000]


def test_half_made_trajectories_and_other_files_are_not_listed(tmp_path: Path) -> None:
    store(tmp_path, 0)
    write_partial(tmp_path, 1, [torch.ones(3)], {})
    (tmp_path / ".trajectory-002.safetensors.abc.tmp").write_text("left by a kill")
    assert [t.metadata["index"] for t in list_trajectories(tmp_path)] == [0]


@pytest.mark.parametrize("make", [True, False], ids=["empty", "missing"])
def test_a_folder_without_trajectories_is_named(tmp_path: Path, make: bool) -> None:
    folder = tmp_path / "experts"
    if make:
        folder.mkdir()
    with pytest.raises(UsageError, match="/experts must hold trajectories, got none"):
        list_trajectories(folder)


@pytest.mark.parametrize(("epochs", "parameters"), [(3, 3), (2, 4)])
def test_the_first_trajectory_of_another_shape_is_named(
    tmp_path: Path, epochs: int, parameters: int
) -> None:
    store(tmp_path, 0)
    store(tmp_path, 1)
    store(tmp_path, 2, epochs, parameters)
    message = (
        "/trajectory-002.safetensors must have 2 epochs of 3 parameters .* got "
        f"{epochs} of {parameters}"
    )
    with pytest.raises(UsageError, match=message):
        list_trajectories(tmp_path)


# ---- half-made ----


@given(
    st.integers(1, 4),
    st.sampled_from([torch.float32, torch.float64]),
    st.lists(st.floats(width=32), min_size=2, max_size=2),
)
def test_a_half_made_trajectory_comes_back_bit_by_bit(
    count: int, dtype: torch.dtype, odd: list[float]
) -> None:
    checkpoints = [
        torch.cat([torch.randn(3, dtype=dtype), torch.tensor(odd, dtype=dtype)])
        for _ in range(count)
    ]
    state = {"momentum_buffer": torch.randn(5, dtype=dtype), "checkpoints": torch.tensor(3)}
    with TemporaryDirectory() as name:
        write_partial(Path(name), 7, checkpoints, state)
        found = read_partial(Path(name), 7)
    assert found is not None
    assert len(found[0]) == count
    assert found[1].keys() == state.keys()
    pairs = [
        *zip(found[0], checkpoints, strict=True),
        *((found[1][key], state[key]) for key in state),
    ]
    for mine, original in pairs:
        assert (mine.dtype, mine.shape) == (original.dtype, original.shape)
        assert torch.equal(
            mine.reshape(-1).view(torch.uint8), original.reshape(-1).view(torch.uint8)
        )


def test_nothing_half_made_is_none(tmp_path: Path) -> None:
    write_partial(tmp_path, 1, [torch.ones(1)], {})
    assert read_partial(tmp_path, 0) is None


def test_a_damaged_half_made_trajectory_is_named(tmp_path: Path) -> None:
    write_partial(tmp_path, 0, [torch.ones(9)], {})
    path = partial_path(tmp_path, 0)
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(UsageError, match=r"/trajectory-000\.partial is damaged"):
        read_partial(tmp_path, 0)
