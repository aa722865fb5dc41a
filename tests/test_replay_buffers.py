"""MTT's replay_buffer_*.pt as experts, and experts of another run."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from cases import Harmful
from torch import Tensor

import pdd_fast
from pdd_fast.config import resolve
from pdd_fast.errors import UsageError
from pdd_fast.experts import make_experts, stored_experts
from pdd_fast.networks.parameters import parameter_count, views
from pdd_fast.progressive import distill
from pdd_fast.replay_buffers import buffer_files, read_buffer
from pdd_fast.runs import Run
from pdd_fast.trajectories import list_trajectories
from pdd_fast.workbench import Workbench


def checkpoints(count: int = 2, epochs: int = 3, sizes: tuple[int, ...] = (4, 3)) -> list[list[list[Tensor]]]:
    """``count`` trajectories as the scripts have them in memory, of tensors of different numbers."""
    draw = torch.Generator().manual_seed(0)
    return [[[torch.randn(n, 2, generator=draw) for n in sizes] for _ in range(epochs + 1)] for _ in range(count)]


def refused(path: Path, content: Any, **options: Any) -> str:
    torch.save(content, path, **options)
    with pytest.raises(UsageError) as caught:
        read_buffer(path)
    assert str(caught.value).startswith(str(path))
    return str(caught.value)


def test_every_checkpoint_comes_back_as_one_vector(tmp_path: Path) -> None:
    content, path = checkpoints(), tmp_path / "replay_buffer_0.pt"
    torch.save(content, path)
    found = read_buffer(path)
    assert len(found) == 2
    for trajectory, expected in zip(found, content, strict=True):
        assert (trajectory.path, trajectory.epochs, trajectory.parameters, trajectory.metadata) == (path, 3, 14, {})
        for epoch, tensors in enumerate(expected):
            assert torch.equal(trajectory.checkpoint(epoch), torch.cat([t.flatten() for t in tensors]))
        start, target = trajectory.pair(1, 2)
        assert torch.equal(start, trajectory.checkpoint(1))
        assert torch.equal(target, trajectory.checkpoint(3))
        with pytest.raises(UsageError, match=r"epoch must lie in \[0, 3\], got 4"):
            trajectory.checkpoint(4)


def test_buffers_are_taken_by_number(tmp_path: Path) -> None:
    for number in (0, 2, 10, 1):
        torch.save(checkpoints(1), tmp_path / f"replay_buffer_{number}.pt")
    (tmp_path / "other.pt").write_bytes(b"")
    assert [path.stem for path in buffer_files(tmp_path)] == [f"replay_buffer_{n}" for n in (0, 1, 2, 10)]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_file_is_not_read_before_it_is_needed(tmp_path: Path) -> None:
    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

    path, size = tmp_path / "replay_buffer_0.pt", 4 << 20
    torch.save([[[torch.zeros(size)] for _ in range(4)]], path)
    before = resident()
    (trajectory,) = read_buffer(path)
    assert resident() - before < size  # of 16 of its size in all
    assert trajectory.checkpoint(3).numel() == size


def test_code_is_refused_and_not_run(tmp_path: Path) -> None:
    mark = tmp_path / "it ran"
    message = refused(tmp_path / "replay_buffer_0.pt", [[[Harmful(mark)]]])
    assert message.endswith("is refused: it holds more than tensors, which could be code")
    assert not mark.exists()


@pytest.mark.parametrize(
    "content", [[], [[]], [[[]]], {}, torch.zeros(3), [[[torch.zeros(2, dtype=torch.int64)]]], [[torch.zeros(3)]], [3]]
)
def test_what_is_no_list_of_trajectories_is_refused(content: Any, tmp_path: Path) -> None:
    assert "must hold a list of trajectories of lists of tensors" in refused(tmp_path / "b.pt", content)


def test_checkpoints_have_to_be_alike(tmp_path: Path) -> None:
    longer = checkpoints(2)
    longer[1].append(longer[1][0])
    wider = checkpoints(2)
    wider[1][2][1] = torch.zeros(3, 3)
    for content in (longer, wider):
        message = "all checkpoints must be of one network and all trajectories of one length"
        assert message in refused(tmp_path / "b.pt", content)


def test_checkpoints_that_share_their_memory_are_refused(tmp_path: Path) -> None:
    tensors = checkpoints(1, 0)[0][0]
    assert "one and the same" in refused(tmp_path / "b.pt", [[tensors, tensors]])


def test_damaged_files_and_those_of_old_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "replay_buffer_0.pt"
    assert "cannot be read: " in refused(path, checkpoints(), _use_new_zipfile_serialization=False)
    torch.save(checkpoints(), path)
    for content in (path.read_bytes()[:200], b"", b"text"):
        path.write_bytes(content)
        with pytest.raises(UsageError, match=r"^.*replay_buffer_0\.pt (cannot be read: |is refused)"):
            read_buffer(path)


# ---- as experts of a run ------------------------------------------------------------------------------------------


def configured(**changes: Any) -> Any:
    return resolve(**(tiny.SETTINGS | {"stages": 2, "ipc": 2} | changes))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Run:
    run = Run.create(tmp_path_factory.mktemp("trained") / "run", configured())
    distill(run)
    return run


@pytest.fixture
def buffers(trained: Run, tmp_path: Path) -> Path:
    """The experts of ``trained`` as MTT's scripts would have stored them, one to a file."""
    net = Workbench.prepare(trained.config).engine.net
    for number, trajectory in enumerate(list_trajectories(trained.experts_dir)):
        vectors = [trajectory.checkpoint(epoch) for epoch in range(trajectory.epochs + 1)]
        stored = [[view.clone() for view in views(vector, net.parameters())] for vector in vectors]
        torch.save([stored], tmp_path / f"replay_buffer_{number}.pt")
    return tmp_path


@pytest.mark.parametrize("kind", ["run", "folder", "buffers"])
def test_experts_from_elsewhere_give_the_same_run(kind: str, trained: Run, buffers: Path, tmp_path: Path) -> None:
    folder = {"run": trained.path, "folder": trained.experts_dir, "buffers": buffers}[kind]
    run = Run.create(tmp_path / "new", configured(experts_from=str(folder)))
    distill(run)
    assert not run.experts_dir.exists()
    assert run.distilled_file.read_bytes() == trained.distilled_file.read_bytes()


def test_the_first_experts_are_taken(buffers: Path, tmp_path: Path) -> None:
    run = Run.create(tmp_path / "new", configured(experts_from=str(buffers), experts=1))
    make_experts(run)
    (only,) = stored_experts(run)
    assert only.path.name == "replay_buffer_0.pt"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"experts": 3}, r"experts must be at most 2, as many as .* holds, got 3$"),
        ({"width": 5}, r"replay_buffer_0\.pt: parameters must be \d+ as in the run's configuration, got \d+$"),
        (
            {"max_start_epoch": 3, "expert_train_epochs": 5},
            r"at least max_start_epoch \+ expert_epochs epochs \(5\), got 4$",
        ),
    ],
)
def test_experts_that_do_not_serve_are_named(
    changes: dict[str, Any], message: str, buffers: Path, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=message):
        make_experts(Run.create(tmp_path / "new", configured(experts_from=str(buffers), **changes)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"whitening": "zca"}, "whitening must be zca .* got none"), ({"width": 5}, "network must be .*'width': 5.*")],
)
def test_our_own_files_say_more(changes: dict[str, Any], message: str, trained: Run, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=message):
        make_experts(Run.create(tmp_path / "new", configured(experts_from=str(trained.path), **changes)))


def test_a_folder_without_experts_is_named(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for folder in ("empty", "missing"):
        with pytest.raises(UsageError, match=f"{folder} holds no trajectories$"):
            make_experts(Run.create(tmp_path / f"of {folder}", configured(experts_from=str(tmp_path / folder))))


def test_a_vector_is_in_the_order_of_parameters(trained: Run, buffers: Path) -> None:
    net = Workbench.prepare(trained.config).engine.net
    (trajectory,) = read_buffer(buffers / "replay_buffer_1.pt")
    assert trajectory.parameters == parameter_count(net)
    pdd_fast.load_parameters(net, trajectory.checkpoint(2))
    stored = torch.load(buffers / "replay_buffer_1.pt", weights_only=True)[0][2]
    for parameter, expected in zip(net.parameters(), stored, strict=True):
        assert torch.equal(parameter, expected)
