"""MTT's replay_buffer_*.pt as experts, and experts of another run."""

from __future__ import annotations

import shutil
import sys
from collections import OrderedDict
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import pytest
import tiny
import torch
from cases import Harmful
from torch import Tensor

import pdd_fast
from pdd_fast.networks.parameters import parameter_count, views
from pdd_fast.progressive.context import RunContext
from pdd_fast.progressive.experts import make_experts, stored_experts
from pdd_fast.progressive.stages import distill
from pdd_fast.runtime.errors import UsageError
from pdd_fast.settings import resolve
from pdd_fast.storage.replay_buffers import buffer_files, read_buffer
from pdd_fast.storage.run import Run
from pdd_fast.storage.trajectories import Trajectory, list_trajectories, write_trajectory


def checkpoints(
    count: int = 2, epochs: int = 3, sizes: tuple[int, ...] = (4, 3)
) -> list[list[list[Tensor]]]:
    """``count`` trajectories as the scripts have them in memory, of tensors of different
    numbers."""
    draw = torch.Generator().manual_seed(0)
    return [
        [[torch.randn(n, 2, generator=draw) for n in sizes] for _ in range(epochs + 1)]
        for _ in range(count)
    ]


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
        assert (trajectory.path, trajectory.epochs, trajectory.parameters, trajectory.metadata) == (
            path,
            3,
            14,
            {},
        )
        for epoch, tensors in enumerate(expected):
            assert torch.equal(
                trajectory.checkpoint(epoch), torch.cat([t.flatten() for t in tensors])
            )
        start, target = trajectory.pair(1, 2)
        assert torch.equal(start, trajectory.checkpoint(1))
        assert torch.equal(target, trajectory.checkpoint(3))
        with pytest.raises(UsageError, match=r"epoch must lie in \[0, 3\], got 4"):
            trajectory.checkpoint(4)


def test_buffers_are_taken_by_number(tmp_path: Path) -> None:
    for number in (0, 2, 10, 1):
        torch.save(checkpoints(1), tmp_path / f"replay_buffer_{number}.pt")
    (tmp_path / "other.pt").write_bytes(b"")
    assert [path.stem for path in buffer_files(tmp_path)] == [
        f"replay_buffer_{n}" for n in (0, 1, 2, 10)
    ]


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
    "content",
    [
        [],
        [[]],
        [[[]]],
        {},
        torch.zeros(3),
        [[[torch.zeros(2, dtype=torch.int64)]]],
        [[torch.zeros(3)]],
        [3],
    ],
)
def test_what_is_no_list_of_trajectories_is_refused(content: Any, tmp_path: Path) -> None:
    assert "must hold a list of trajectories of lists of tensors" in refused(
        tmp_path / "b.pt", content
    )


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
    assert "got equal ones that share their memory" in refused(
        tmp_path / "b.pt", [[tensors, tensors]]
    )


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "replay_buffer_0.pt"
    torch.save(checkpoints(), path)
    for content in (path.read_bytes()[:200], b"text"):
        path.write_bytes(content)
        with pytest.raises(
            UsageError, match=r"^.*replay_buffer_0\.pt (cannot be read: |is refused)"
        ):
            read_buffer(path)


def test_a_buffer_of_the_format_before_torch_1_6_is_read(tmp_path: Path) -> None:
    content, path = checkpoints(), tmp_path / "replay_buffer_0.pt"
    torch.save(content, path, _use_new_zipfile_serialization=False)
    for trajectory, expected in zip(read_buffer(path), content, strict=True):
        assert torch.equal(trajectory.checkpoint(3), torch.cat([t.flatten() for t in expected[3]]))


def named(content: list[list[list[Tensor]]]) -> list[list[OrderedDict[str, Tensor]]]:
    """The same with state dicts for lists."""
    return [
        [OrderedDict((f"features.{i}.weight", t) for i, t in enumerate(c)) for c in each]
        for each in content
    ]


@pytest.mark.parametrize(
    "kind", ["state dicts", "plain dicts", "parameters", "one trajectory", "half precision"]
)
def test_what_means_the_same_is_converted(kind: str, tmp_path: Path) -> None:
    content, path = checkpoints(), tmp_path / "replay_buffer_0.pt"
    stored: Any = named(content)
    if kind == "plain dicts":
        stored = [[dict(checkpoint) for checkpoint in each] for each in stored]
    elif kind == "parameters":
        stored = [
            [list(map(torch.nn.Parameter, checkpoint)) for checkpoint in each] for each in content
        ]
    elif kind == "one trajectory":
        stored, content = stored[0], content[:1]
    elif kind == "half precision":
        content = [[[t.half() for t in checkpoint] for checkpoint in each] for each in content]
        stored = content
    torch.save(stored, path)
    found = read_buffer(path)
    assert len(found) == len(content)
    for trajectory, expected in zip(found, content, strict=True):
        theta = trajectory.checkpoint(2)
        assert (theta.dtype, theta.requires_grad) == (torch.float32, False)
        assert torch.equal(theta, torch.cat([t.flatten() for t in expected[2]]).float())


def test_state_dicts_have_to_name_the_same(tmp_path: Path) -> None:
    content = named(checkpoints())
    content[1][2] = OrderedDict((f"other.{name}", tensor) for name, tensor in content[1][2].items())
    assert "all checkpoints must be of one network" in refused(tmp_path / "b.pt", content)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_checkpoint_that_is_not_finite_is_named(value: float, tmp_path: Path) -> None:
    content, path = checkpoints(), tmp_path / "replay_buffer_0.pt"
    content[1][2][1][0, 1] = value
    torch.save(content, path)
    first, second = read_buffer(path)
    assert torch.isfinite(first.checkpoint(2)).all()
    assert torch.isfinite(second.checkpoint(1)).all()
    with pytest.raises(UsageError) as caught:
        second.checkpoint(2)
    assert str(caught.value).startswith(
        f"{path}: trajectory 1: checkpoint 2 must be finite, got NaN or infinity: this network "
        "diverged in training; "
    )


# ---- as experts of a run ----


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
    net = RunContext.prepare(trained.settings).engine.net
    for number, trajectory in enumerate(list_trajectories(trained.experts_dir)):
        vectors = [trajectory.checkpoint(epoch) for epoch in range(trajectory.epochs + 1)]
        stored = [[view.clone() for view in views(vector, net.parameters())] for vector in vectors]
        torch.save([stored], tmp_path / f"replay_buffer_{number}.pt")
    return tmp_path


@pytest.mark.parametrize("kind", ["run", "folder", "buffers"])
def test_experts_from_elsewhere_give_the_same_run(
    kind: str, trained: Run, buffers: Path, tmp_path: Path
) -> None:
    folder = {"run": trained.path, "folder": trained.experts_dir, "buffers": buffers}[kind]
    run = Run.create(tmp_path / "new", configured(experts_from=str(folder)))
    distill(run)
    assert not run.experts_dir.exists()
    assert run.distilled_file.read_bytes() == trained.distilled_file.read_bytes()


def test_the_first_experts_are_taken(buffers: Path, tmp_path: Path) -> None:
    run = Run.create(tmp_path / "new", configured(experts_from=str(buffers), num_experts=1))
    make_experts(run)
    (only,) = stored_experts(run)
    assert only.path.name == "replay_buffer_0.pt"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_experts": 3}, r"num_experts must be at most 2, as many as .* holds, got 3$"),
        (
            {"width": 5},
            r"replay_buffer_0\.pt: parameters must be \d+ as in the run's configuration, got \d+$",
        ),
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
    [
        ({"whitening": "zca"}, "whitening must be zca .* got none"),
        ({"width": 5}, "network must be .*'width': 5.*"),
    ],
)
def test_our_own_files_say_more(
    changes: dict[str, Any], message: str, trained: Run, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=message):
        make_experts(
            Run.create(tmp_path / "new", configured(experts_from=str(trained.path), **changes))
        )


def test_a_folder_without_experts_is_named(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for folder in ("empty", "missing"):
        with pytest.raises(UsageError, match=f"{folder} must hold trajectories, got none$"):
            make_experts(
                Run.create(
                    tmp_path / f"of {folder}", configured(experts_from=str(tmp_path / folder))
                )
            )


def test_a_vector_is_in_the_order_of_parameters(trained: Run, buffers: Path) -> None:
    net = RunContext.prepare(trained.settings).engine.net
    (trajectory,) = read_buffer(buffers / "replay_buffer_1.pt")
    assert trajectory.parameters == parameter_count(net)
    pdd_fast.load_parameters(net, trajectory.checkpoint(2))
    stored = torch.load(buffers / "replay_buffer_1.pt", weights_only=True)[0][2]
    for parameter, expected in zip(net.parameters(), stored, strict=True):
        assert torch.equal(parameter, expected)


def stored(folder: Path) -> list[list[list[Tensor]]]:
    return torch.load(folder / "replay_buffer_0.pt", weights_only=True)


def refusal(content: Any, folder: Path, **changes: Any) -> str:
    """The error about experts in ``folder`` whose first buffer is ``content``."""
    torch.save(content, folder / "replay_buffer_0.pt")
    with pytest.raises(UsageError) as caught:
        make_experts(
            Run.create(Path(mkdtemp(dir=folder)), configured(experts_from=str(folder), **changes))
        )
    return str(caught.value)


@pytest.mark.parametrize("order", [[4, 5, 0, 1, 2, 3], [0, 1, 2, 3, 5, 4], [1, 0, 2, 3, 4, 5]])
def test_tensors_in_another_order_are_another_network(order: list[int], buffers: Path) -> None:
    content = [
        [[checkpoint[place] for place in order] for checkpoint in each] for each in stored(buffers)
    ]
    place = next(i for i, (a, b) in enumerate(zip(order, range(6), strict=True)) if a != b)
    message = refusal(content, buffers)
    assert f"replay_buffer_0.pt: tensor {place} of a checkpoint must be " in message
    assert "as in the run's ConvNet, got (" in message


def test_tensors_of_other_shapes_with_as_many_numbers_are_another_network(buffers: Path) -> None:
    content = [
        [[t.flatten() for t in checkpoint] for checkpoint in each] for each in stored(buffers)
    ]
    assert "tensor 0 of a checkpoint must be blocks.0.0.weight (4, 1, 3, 3) as" in refusal(
        content, buffers
    )
    content = [
        [[torch.cat([t.flatten() for t in checkpoint])] for checkpoint in each]
        for each in stored(buffers)
    ]
    assert "tensor 0 of a checkpoint must be blocks.0.0.weight (4, 1, 3, 3) as" in refusal(
        content, buffers
    )


def test_more_tensors_with_as_many_numbers_are_another_network(buffers: Path) -> None:
    content = [[[*c[:-1], c[-1][:5], c[-1][5:]] for c in each] for each in stored(buffers)]
    assert (
        "tensor 5 of a checkpoint must be classifier.bias (10,) as in the run's ConvNet, got (5,)"
        in refusal(content, buffers)
    )


NAMES = [
    "features.0.weight",
    "features.0.bias",
    "features.1.weight",
    "features.1.bias",
    "classifier.weight",
    "classifier.bias",
]


def test_names_tell_tensors_of_one_shape_apart(buffers: Path, trained: Run, tmp_path: Path) -> None:
    def with_names(order: list[int], **more: Tensor) -> Any:
        return [[{NAMES[i]: c[i] for i in order} | more for c in each] for each in original]

    original = stored(buffers)
    message = refusal(
        with_names([0, 1, 3, 2, 4, 5]), buffers
    )  # bias and weight of the norm, both of 4 numbers
    assert "tensor 2 of a checkpoint must be blocks.0.1.weight (4,) as" in message
    assert "got features.1.bias (4,)" in message
    message = refusal(
        with_names(list(range(6)), **{"features.1.running_mean": torch.zeros(4)}), buffers
    )
    assert "which has instance norm, got one with batch norm (features.1.running_mean)" in message
    torch.save(with_names(list(range(6))), buffers / "replay_buffer_0.pt")
    run = Run.create(tmp_path / "right", configured(experts_from=str(buffers)))
    distill(run)
    assert run.distilled_file.read_bytes() == trained.distilled_file.read_bytes()


@pytest.mark.parametrize(
    ("epoch", "changes", "seen"),
    [
        (0, {}, True),
        (3, {}, True),
        (4, {}, False),  # matching reaches max_start_epoch + expert_epochs = 3
        (4, {"filter": "forgetting"}, True),
        (4, {"labels": "soft"}, True),
    ],
)
def test_experts_that_diverged_are_named_before_any_work(
    epoch: int, changes: dict[str, Any], seen: bool, buffers: Path, trained: Run, tmp_path: Path
) -> None:
    content = stored(buffers)
    content[0][epoch][4][0, 0] = float("nan")
    if seen:
        named = (
            f"replay_buffer_0.pt: trajectory 0: checkpoint {epoch} must be finite, got "
            "NaN or infinity"
        )
        assert named in refusal(content, buffers, **changes)
    else:
        torch.save(content, buffers / "replay_buffer_0.pt")
        make_experts(Run.create(tmp_path / "new", configured(experts_from=str(buffers), **changes)))


def test_our_own_experts_that_diverged_are_named_too(trained: Run, tmp_path: Path) -> None:
    for kind in ("own", "taken"):
        folder = tmp_path / kind / "experts"
        shutil.copytree(trained.experts_dir, folder)
        second = Trajectory(folder / "trajectory-001.safetensors")
        vectors = [second.checkpoint(epoch) for epoch in range(second.epochs + 1)]
        vectors[1][7] = float("inf")
        write_trajectory(second.path, vectors, second.metadata)
        if kind == "own":
            shutil.copy(trained.path / "config.json", folder.parent)
            run = Run.open(folder.parent)
        else:
            run = Run.create(tmp_path / "new", configured(experts_from=str(folder)))
        with pytest.raises(
            UsageError,
            match=r"trajectory-001\.safetensors: checkpoint 1 must be finite, got NaN or inf",
        ):
            distill(run)
