"""Folders of images: what is read from good ones, and what is said about bad ones."""

from __future__ import annotations

import io
import re
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pdd_fast import data
from pdd_fast.data.imagefolder import read as read_folder
from pdd_fast.errors import UsageError

Colour = int | tuple[int, int, int]


def put(folder: Path, colours: list[Colour], size: tuple[int, int] = (8, 6), suffix: str = ".png") -> list[Path]:
    """Images of one colour each, width and height ``size``; their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for i, colour in enumerate(colours):
        path = folder / f"{i}{suffix}"
        Image.new("L" if isinstance(colour, int) else "RGB", size, colour).save(path)
        paths.append(path)
    return paths


def two_classes(root: Path, test: str = "test", a: Colour = 10, b: Colour = 200) -> None:
    for part, count in (("train", 3), (test, 2)):
        put(root / part / "ant", [a] * count)
        put(root / part / "bee", [b] * count)


@pytest.mark.parametrize("test", ["test", "val"])
def test_grey_folders_give_one_channel_and_labels_in_alphabetical_order(tmp_path: Path, test: str) -> None:
    two_classes(tmp_path, test)
    found = read_folder(str(tmp_path))
    assert found.classes == ("ant", "bee")
    assert found.train.dtype == torch.uint8
    assert found.train.shape == (6, 1, 6, 8)  # height before width
    assert found.train_labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert found.test_labels.tolist() == [0, 0, 1, 1]
    assert found.train[:, 0, 0, 0].tolist() == [10] * 3 + [200] * 3
    assert found.test.flatten(1).float().mean(1).tolist() == [10, 10, 200, 200]


def test_a_folder_loads_as_a_normalised_data_set(tmp_path: Path) -> None:
    two_classes(tmp_path)
    found = data.load(f"imagefolder:{tmp_path}")
    assert found.name == f"imagefolder:{tmp_path.name}"
    assert (len(found.train), len(found.validation), len(found.test)) == (4, 2, 4)
    assert found.normalisation.mean[0] == pytest.approx(105 / 255)
    assert sorted(set((found.normalisation.invert(found.test.images) * 255).round().flatten().tolist())) == [10, 200]


def test_colours_come_as_red_green_and_blue(tmp_path: Path) -> None:
    two_classes(tmp_path, a=(10, 20, 30), b=(200, 210, 220))
    found = read_folder(str(tmp_path))
    assert found.train.shape == (6, 3, 6, 8)
    assert found.train[0, :, 2, 3].tolist() == [10, 20, 30]
    assert found.test[-1, :, 2, 3].tolist() == [200, 210, 220]


@pytest.mark.parametrize("where", ["train", "test"])
def test_one_coloured_image_in_either_part_makes_all_of_them_coloured(tmp_path: Path, where: str) -> None:
    two_classes(tmp_path)
    (coloured,) = put(tmp_path / where / "bee", [(1, 2, 3)], suffix=".bmp")
    found = read_folder(str(tmp_path))
    assert found.train.shape[1] == found.test.shape[1] == 3
    part = found.train if where == "train" else found.test
    assert part[:, :, 0, 0].tolist().count([1, 2, 3]) == 1
    assert part[0, :, 0, 0].tolist() == [10, 10, 10]
    assert coloured.exists()


def test_files_that_are_no_images_and_hidden_files_are_passed_over(tmp_path: Path) -> None:
    two_classes(tmp_path)
    (tmp_path / "train" / "ant" / "notes.txt").write_text("not an image")
    (tmp_path / "train" / "ant" / "._0.png").write_bytes(b"\0\5\x16\7 what macOS leaves on foreign disks")
    (tmp_path / "train" / ".cache").mkdir()
    put(tmp_path / "train" / "ant", [11], suffix=".PGM")
    assert read_folder(str(tmp_path)).train[:, 0, 0, 0].tolist() == [11, 10, 10, 10, 200, 200, 200]


def test_transparent_and_palette_images_are_read(tmp_path: Path) -> None:
    two_classes(tmp_path, a=(10, 20, 30))
    Image.new("RGBA", (8, 6), (1, 2, 3, 128)).save(tmp_path / "train" / "ant" / "a.png")
    Image.new("RGB", (8, 6), (0, 0, 255)).convert("P").save(tmp_path / "train" / "ant" / "b.gif")
    assert read_folder(str(tmp_path)).train[3:5, :, 0, 0].tolist() == [[1, 2, 3], [0, 0, 255]]


def tiny_imagenet(root: Path, annotations: str) -> None:
    """Folders as Tiny ImageNet is shipped: images one level deeper, val/ annotated, test/ without labels."""
    put(root / "train" / "n01" / "images", [1, 2, 3])
    put(root / "train" / "n02" / "images", [4, 5, 6])
    put(root / "val" / "images", [7, 8])
    put(root / "test" / "images", [9])
    (root / "val" / "val_annotations.txt").write_text(annotations)


def test_tiny_imagenet_is_read_as_it_is_shipped(tmp_path: Path) -> None:
    tiny_imagenet(tmp_path, "0.png\tn02\t0\t0\t63\t63\n1.png\tn01\t0\t0\t63\t63\n\n")
    found = read_folder(str(tmp_path))
    assert found.classes == ("n01", "n02")
    assert found.train[:, 0, 0, 0].tolist() == [1, 2, 3, 4, 5, 6]
    assert found.test[:, 0, 0, 0].tolist() == [7, 8]
    assert found.test_labels.tolist() == [1, 0]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("0.png\tn03", r"val_annotations\.txt names the class 'n03', which train/ does not hold"),
        ("0.png n01", r"val_annotations\.txt must hold lines of file, tab, class, got '0\.png n01'"),
        ("gone.png\tn01", r"val/images/gone\.png cannot be decoded as an image"),
    ],
)
def test_wrong_annotations_are_named(tmp_path: Path, line: str, message: str) -> None:
    tiny_imagenet(tmp_path, line + "\n")
    with pytest.raises(UsageError, match=message):
        read_folder(str(tmp_path))


def test_annotations_that_are_no_text_or_empty_are_named(tmp_path: Path) -> None:
    tiny_imagenet(tmp_path, "")
    with pytest.raises(UsageError, match="there are no test images"):
        data.load(f"imagefolder:{tmp_path}")
    (tmp_path / "val" / "val_annotations.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UsageError, match=r"val_annotations\.txt cannot be read as text"):
        read_folder(str(tmp_path))


@pytest.mark.parametrize(
    ("folders", "message"),
    [
        ([], r"must hold a folder train/, got an empty folder"),
        (["pictures"], r"must hold a folder train/, got pictures"),
        (["train/ant"], r"must hold a folder test/ or val/, got train"),
        (["train", "test"], r"train must hold one folder per class, got an empty folder"),
        (["train/ant", "test/ant"], r"train/ant holds no images \(\.bmp, .*\.png"),
    ],
)
def test_missing_and_empty_folders_are_named(tmp_path: Path, folders: list[str], message: str) -> None:
    for folder in folders:
        (tmp_path / folder).mkdir(parents=True)
    with pytest.raises(UsageError, match=message):
        read_folder(str(tmp_path))


def test_a_folder_that_does_not_exist_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"imagefolder:.*/nowhere must hold a folder train/, got no such folder"):
        data.load(f"imagefolder:{tmp_path}/nowhere")


@pytest.mark.parametrize(("part", "where"), [("train", "train/"), ("test", "test/")])
def test_a_class_of_one_part_only_is_named(tmp_path: Path, part: str, where: str) -> None:
    two_classes(tmp_path)
    put(tmp_path / part / "wasp", [1])
    with pytest.raises(UsageError, match=f"must hold the same classes, got 'wasp' in {where} only"):
        read_folder(str(tmp_path))


def png() -> bytes:
    buffer = io.BytesIO()
    Image.new("L", (8, 6), 7).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.png", b""),
        ("a.png", b"this is text"),
        ("a.png", png()[:50]),
        ("a.ppm", b"P6\n8 x 255\n" + bytes(144)),  # Pillow: ValueError
        (
            "a.bmp",
            b"BM" + struct.pack("<IIIIiiHHIIiiII", 99, 0, 54, 40, 10**5, 10**5, 1, 24, 0, 0, 0, 0, 0, 0),
        ),  # a bomb
    ],
    ids=["empty", "text", "cut", "header", "bomb"],
)
@pytest.mark.parametrize("part", ["train", "test"])
def test_a_damaged_image_is_named(tmp_path: Path, part: str, name: str, content: bytes) -> None:
    two_classes(tmp_path)
    (tmp_path / part / "bee" / name).write_bytes(content)
    with pytest.raises(UsageError, match=f"{part}/bee/{re.escape(name)} cannot be decoded as an image"):
        read_folder(str(tmp_path))


@pytest.mark.parametrize("mode", ["I;16", "I", "F"])
def test_images_of_more_than_8_bits_are_refused_and_not_clipped(tmp_path: Path, mode: str) -> None:
    two_classes(tmp_path)
    kind = {"I;16": np.uint16, "I": np.int32, "F": np.float32}[mode]
    Image.fromarray(np.full((6, 8), 1000, dtype=kind)).save(tmp_path / "train" / "ant" / "deep.tif")
    with pytest.raises(UsageError, match=f"deep.tif must have 8 bits a channel, got Pillow's mode '{mode}'"):
        read_folder(str(tmp_path))


@pytest.mark.parametrize("part", ["train", "test"])
def test_an_image_of_another_size_is_named_with_both_sizes(tmp_path: Path, part: str) -> None:
    two_classes(tmp_path)
    put(tmp_path / part / "bee", [1], size=(9, 6), suffix=".bmp")
    message = rf"{part}/bee/0\.bmp must be 8x6 pixels like the first image, got 9x6; resize the images first"
    with pytest.raises(UsageError, match=message):
        read_folder(str(tmp_path))
