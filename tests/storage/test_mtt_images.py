"""Distilled images in MTT's files: written as its scripts would, and read back whole."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from cases import Harmful

from pdd_fast.cli.main import run
from pdd_fast.data.normalization import Normalization
from pdd_fast.data.whitening import Whitening
from pdd_fast.runtime.errors import UsageError
from pdd_fast.storage.distilled import DistilledSet, load_distilled
from pdd_fast.storage.mtt_images import read_mtt, write_mtt

NORMALIZATION = Normalization((0.4, 0.5, 0.6), (0.2, 0.25, 0.3))
FILES = [
    "settings.json",
    *(f"stage-{s}/{kind}_best.pt" for s in (1, 2) for kind in ("images", "labels")),
]


def distilled(soft: bool = False) -> DistilledSet:
    """Two stages, of two and of three images."""
    draw = torch.Generator().manual_seed(0)
    images = torch.randn(5, 3, 4, 6, generator=draw)
    labels = torch.rand(5, 2, generator=draw) if soft else torch.tensor([0, 1, 0, 1, 1])
    metadata = {
        "data": "photographs",
        "classes": ["a", "b"],
        "augmentation": {"strategy": "flip", "mode": "single"},
    }
    return DistilledSet(
        images,
        labels,
        torch.tensor([1, 2, 1, 2, 2]),
        torch.tensor([0.1, 0.2]),
        NORMALIZATION,
        metadata,
    )


@pytest.mark.parametrize("soft", [False, True], ids=["hard", "soft"])
def test_files_are_what_the_scripts_read(soft: bool, tmp_path: Path) -> None:
    expected = distilled(soft)
    written = write_mtt(expected, tmp_path / "out")
    assert sorted(str(path.relative_to(tmp_path / "out")) for path in written) == FILES
    for stage, count in ((1, 2), (2, 3)):
        folder = tmp_path / "out" / f"stage-{stage}"
        images, labels = (
            torch.load(folder / f"{kind}_best.pt", weights_only=True)
            for kind in ("images", "labels")
        )
        assert torch.equal(images, expected.subset(stage).images)
        assert torch.equal(labels, expected.subset(stage).labels)
        assert (
            folder / "images_best.pt"
        ).stat().st_size < 4 * count * 72 + 3000  # its own images alone
    settings = json.loads((tmp_path / "out" / "settings.json").read_text())
    assert settings["learning_rates"] == pytest.approx([0.1, 0.2])
    assert (settings["data"], settings["whitening"]) == ("photographs", "none")
    assert settings["normalization"] == NORMALIZATION.to_dict()
    assert settings["augmentation"] == {"strategy": "flip", "mode": "single"}


def test_what_was_written_comes_back(tmp_path: Path) -> None:
    whitening = Whitening.fit(torch.randn(9, 3, 4, 6))
    expected = replace(distilled(), whitening=whitening)
    write_mtt(expected, tmp_path)
    assert json.loads((tmp_path / "settings.json").read_text())["whitening"] == "zca"
    folders = [tmp_path / "stage-1", tmp_path / "stage-2"]
    found = read_mtt(folders, [0.1, 0.2], NORMALIZATION, whitening, {"data": "photographs"})
    for stage in (1, 2):
        assert torch.equal(found.subset(stage).images, expected.subset(stage).images)
        assert torch.equal(found.subset(stage).labels, expected.subset(stage).labels)
    assert torch.equal(found.learning_rates, expected.learning_rates)
    assert found.whitening is whitening
    found.save(tmp_path / "set.safetensors")
    assert load_distilled(tmp_path / "set.safetensors").metadata == {"data": "photographs"}


def test_a_folder_that_is_not_empty_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("")
    for folder in (tmp_path, tmp_path / "mine"):
        with pytest.raises(UsageError, match=r"exists and is not an empty folder; choose another$"):
            write_mtt(distilled(), folder)
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_what_cannot_be_read_is_named(tmp_path: Path) -> None:
    write_mtt(distilled(), tmp_path / "out")
    stage = tmp_path / "out" / "stage-1"

    def read(*folders: Path, lrs: tuple[float, ...] = (0.1,)) -> str:
        with pytest.raises(UsageError) as caught:
            read_mtt(folders, lrs, NORMALIZATION)
        return str(caught.value)

    assert read(tmp_path / "none").endswith("images_best.pt does not exist")
    assert read().startswith("no folders hold no distilled set: ")
    assert "stage-1 hold no distilled set: DistilledSet: stage must number 1..2" in read(
        stage, lrs=(0.1, 0.2)
    )
    mark = tmp_path / "it ran"
    for content, message in (
        (Harmful(mark), "is refused: it holds more than tensors"),
        ({"a": 1}, "must hold a tensor"),
        (torch.tensor(1), "must hold a tensor"),
        (torch.zeros(3, dtype=torch.int64), "hold no distilled set"),
    ):
        torch.save(content, stage / "labels_best.pt")
        assert message in read(stage), content
    assert not mark.exists()
    (stage / "labels_best.pt").write_bytes(b"nothing")
    assert "labels_best.pt" in read(stage)


def test_the_command_writes_a_runs_images(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = distilled()
    (tmp_path / "run").mkdir()
    expected.save(tmp_path / "run" / "distilled.safetensors")
    call = ["export", str(tmp_path / "run"), "--output"]
    assert run([*call, str(tmp_path / "out")]) == 0
    assert len(capsys.readouterr().out.splitlines()) == len(FILES)
    assert run([*call, str(tmp_path / "other"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["files"] == [
        str(tmp_path / "other" / name) for name in (*FILES[1:], FILES[0])
    ]
    assert run([*call, str(tmp_path / "out")]) == 2
    assert "is not an empty folder" in capsys.readouterr().err
    assert run(["export", str(tmp_path / "missing"), "--output", str(tmp_path / "new")]) == 2
    assert not (tmp_path / "new").exists()


def test_what_images_hold_is_written_and_raw_what_is_stored(tmp_path: Path) -> None:
    draw = torch.Generator().manual_seed(0)
    stored = DistilledSet(
        torch.randn(4, 3, 8, 8, generator=draw),
        torch.arange(4),
        torch.ones(4, dtype=torch.int64),
        torch.tensor([0.1]),
        Normalization((0.5,) * 3, (0.25,) * 3),
        factor=2,
    )
    for raw, expected in ((False, stored.union()), (True, stored.union(raw=True))):
        folder = tmp_path / str(raw)
        write_mtt(stored, folder, raw)
        assert torch.equal(torch.load(folder / "stage-1/images_best.pt"), expected.images)
        assert torch.equal(torch.load(folder / "stage-1/labels_best.pt"), expected.labels)
        assert json.loads((folder / "settings.json").read_text())["factor"] == (2 if raw else 1)
    again = read_mtt([tmp_path / "True/stage-1"], [0.1], stored.normalization, factor=2)
    assert torch.equal(again.union().images, stored.union().images)
    stored.save(tmp_path / "set.safetensors")
    arguments = [
        "export",
        str(tmp_path / "set.safetensors"),
        "--output",
        str(tmp_path / "called"),
        "--raw",
    ]
    assert run(arguments) == 0
    assert torch.equal(torch.load(tmp_path / "called/stage-1/images_best.pt"), stored.images)


# ---- labels and images of other kinds ----


def rewritten(folder: Path, **content: torch.Tensor) -> Path:
    """A folder of one stage with other images or labels."""
    write_mtt(distilled(), folder)
    for kind, tensor in content.items():
        torch.save(tensor, folder / "stage-1" / f"{kind}_best.pt")
    return folder / "stage-1"


def test_logits_are_refused_unless_they_are_said_to_be(tmp_path: Path) -> None:
    logits = torch.tensor([[4.0, -1.5], [-2.0, 0.5]])
    stage = rewritten(tmp_path, labels=logits)
    with pytest.raises(UsageError) as caught:
        read_mtt([stage], [0.1], NORMALIZATION)
    assert (
        "labels must be probabilities in [0, 1], got -2..4; if they are logits, give their "
        'softmax (labels="logits"' in (str(caught.value))
    )
    found = read_mtt([stage], [0.1], NORMALIZATION, labels="logits")
    torch.testing.assert_close(found.labels, logits.exp() / logits.exp().sum(1, keepdim=True))
    for labels in (logits.double(), logits.half()):
        torch.save(labels, stage / "labels_best.pt")
        torch.testing.assert_close(
            read_mtt([stage], [0.1], NORMALIZATION, labels="logits").labels, found.labels
        )


@pytest.mark.parametrize("labels", [torch.tensor([0, 1]), torch.zeros(2), torch.zeros(2, 1)])
def test_what_cannot_be_logits_is_not_read_as_them(labels: torch.Tensor, tmp_path: Path) -> None:
    stage = rewritten(tmp_path, labels=labels)
    with pytest.raises(
        UsageError,
        match=r"labels_best\.pt must hold logits, floating-point \[n, classes\], got torch\.",
    ):
        read_mtt([stage], [0.1], NORMALIZATION, labels="logits")
    with pytest.raises(UsageError, match=r"^labels must be auto or logits, got 'soft'$"):
        read_mtt([stage], [0.1], NORMALIZATION, labels="soft")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"labels": torch.tensor([0, 2])}, r"labels must lie in \[0, 2\), got 0\.\.2"),
        (
            {"labels": torch.tensor([-1, 1], dtype=torch.int32)},
            r"labels must lie in \[0, 2\), got -1\.\.1",
        ),
        ({"labels": torch.rand(2, 3)}, "labels must have 2 columns, one for each class, got 3"),
        ({"labels": torch.rand(2, 1)}, "labels must be class indices .* of 2 classes or more"),
        (
            {"images": torch.zeros(2, 3, 4, 6, dtype=torch.uint8)},
            r"images must be .*, got torch\.uint8; divide pixels by",
        ),
    ],
)
def test_what_cannot_be_right_is_refused(
    content: dict[str, torch.Tensor], said: str, tmp_path: Path
) -> None:
    stage = rewritten(tmp_path, **content)
    with pytest.raises(UsageError, match=f"stage-1 hold no distilled set: DistilledSet: {said}"):
        read_mtt([stage], [0.1], NORMALIZATION, metadata={"classes": ["a", "b"]})


@pytest.mark.parametrize(
    "labels",
    [
        torch.tensor([1, 0], dtype=torch.int32),
        torch.tensor([1.0, 0.0]),
        torch.tensor([[0, 1], [1, 0]]),
        torch.tensor([[False, True], [True, False]]),
    ],
    ids=["int32", "float", "one-hot", "mask"],
)
def test_class_indices_in_other_forms_are_read(labels: torch.Tensor, tmp_path: Path) -> None:
    found = read_mtt([rewritten(tmp_path, labels=labels)], [0.1], NORMALIZATION)
    assert found.labels.dtype == torch.int64
    assert found.labels.tolist() == [1, 0]


def test_pointers_and_empty_files_are_named(tmp_path: Path) -> None:
    stage = rewritten(tmp_path)
    for content, said in (
        (b"", "it is empty"),
        (b"version https://git-lfs.github.com/spec/v1\n", "it is a Git LFS pointer"),
    ):
        (stage / "images_best.pt").write_bytes(content)
        with pytest.raises(UsageError, match=rf"images_best\.pt cannot be read: {said}"):
            read_mtt([stage], [0.1], NORMALIZATION)
