"""Folders of images: what is read from good ones, and what is said about bad ones."""

from __future__ import annotations

import io
import os
import re
import struct
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from imagefolder_support import put, two_classes
from PIL import Image

from pdd_fast import data
from pdd_fast.data.imagefolder import read as read_folder
from pdd_fast.runtime.errors import PddFastWarning, UsageError


@pytest.mark.parametrize("test", ["test", "val"])
def test_gray_folders_give_one_channel_and_labels_in_alphabetical_order(
    tmp_path: Path, test: str
) -> None:
    two_classes(tmp_path, test)
    found = read_folder(str(tmp_path))
    assert found.classes == ("ant", "bee")
    assert found.train.dtype == torch.uint8
    assert found.train.shape == (6, 1, 6, 8)  # height before width
    assert found.train_labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert found.test_labels.tolist() == [0, 0, 1, 1]
    assert found.train[:, 0, 0, 0].tolist() == [10] * 3 + [200] * 3
    assert found.test.flatten(1).float().mean(1).tolist() == [10, 10, 200, 200]


def test_a_folder_loads_as_a_normalized_data_set(tmp_path: Path) -> None:
    two_classes(tmp_path)
    found = data.load(f"imagefolder:{tmp_path}")
    assert found.name == f"imagefolder:{tmp_path.name}"
    assert (len(found.train), len(found.validation), len(found.test)) == (4, 2, 4)
    assert found.normalization.mean[0] == pytest.approx(105 / 255)
    assert sorted(
        set((found.normalization.invert(found.test.images) * 255).round().flatten().tolist())
    ) == [10, 200]


def test_colors_come_as_red_green_and_blue(tmp_path: Path) -> None:
    two_classes(tmp_path, a=(10, 20, 30), b=(200, 210, 220))
    found = read_folder(str(tmp_path))
    assert found.train.shape == (6, 3, 6, 8)
    assert found.train[0, :, 2, 3].tolist() == [10, 20, 30]
    assert found.test[-1, :, 2, 3].tolist() == [200, 210, 220]


@pytest.mark.parametrize("where", ["train", "test"])
def test_one_colored_image_in_either_part_makes_all_of_them_colored(
    tmp_path: Path, where: str
) -> None:
    two_classes(tmp_path)
    (colored,) = put(tmp_path / where / "bee", [(1, 2, 3)], suffix=".bmp")
    found = read_folder(str(tmp_path))
    assert found.train.shape[1] == found.test.shape[1] == 3
    part = found.train if where == "train" else found.test
    assert part[:, :, 0, 0].tolist().count([1, 2, 3]) == 1
    assert part[0, :, 0, 0].tolist() == [10, 10, 10]
    assert colored.exists()


def test_files_that_are_no_images_and_hidden_files_are_passed_over(tmp_path: Path) -> None:
    two_classes(tmp_path)
    (tmp_path / "train" / "ant" / "notes.txt").write_text("not an image")
    (tmp_path / "train" / "ant" / "._0.png").write_bytes(
        b"\0\5\x16\7 what macOS leaves on foreign disks"
    )
    (tmp_path / "train" / ".cache").mkdir()
    put(tmp_path / "train" / "ant", [11], suffix=".PGM")
    with pytest.warns(
        PddFastWarning, match=r"files that are not images are ignored: 1 \.txt, e\.g\. .*notes\.txt"
    ):
        found = read_folder(str(tmp_path))
    assert found.train[:, 0, 0, 0].tolist() == [11, 10, 10, 10, 200, 200, 200]


def test_transparent_and_palette_images_are_read(tmp_path: Path) -> None:
    two_classes(tmp_path, a=(10, 20, 30))
    Image.new("RGBA", (8, 6), (1, 2, 3, 128)).save(tmp_path / "train" / "ant" / "a.png")
    Image.new("RGB", (8, 6), (0, 0, 255)).convert("P").save(tmp_path / "train" / "ant" / "b.gif")
    with pytest.warns(
        PddFastWarning,
        match=r"some transparent images show one color throughout \(1\), e\.g\. .*a\.png",
    ):
        found = read_folder(str(tmp_path))
    # (1·128 + 255·127) / 255 = 127.5 and so on.
    assert found.train[3:5, :, 0, 0].tolist() == [[128, 128, 129], [0, 0, 255]]


def tiny_imagenet(root: Path, annotations: str) -> None:
    """Folders as Tiny ImageNet is shipped: images one level deeper, val/ annotated, test/ without
    labels.
    """
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
        ("0.png\tn03", r"val_annotations\.txt must name classes in train/, got 'n03'"),
        (
            "0.png n01",
            r"val_annotations\.txt must hold lines of file, tab, class, got '0\.png n01'",
        ),
        ("gone.png\tn01", r"val/images/gone\.png cannot be decoded as an image"),
    ],
)
def test_wrong_annotations_are_named(tmp_path: Path, line: str, message: str) -> None:
    tiny_imagenet(tmp_path, line + "\n")
    with pytest.raises(UsageError, match=message):
        read_folder(str(tmp_path))


def test_annotations_that_are_no_text_or_empty_are_named(tmp_path: Path) -> None:
    tiny_imagenet(tmp_path, "")
    with pytest.raises(
        UsageError,
        match=r"val_annotations\.txt must name every image, got none for .*0\.png \(2 in all\)",
    ):
        data.load(f"imagefolder:{tmp_path}")
    (tmp_path / "val" / "val_annotations.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UsageError, match=r"val_annotations\.txt cannot be read as text"):
        read_folder(str(tmp_path))


@pytest.mark.parametrize(
    ("folders", "message"),
    [
        ([], r"must hold a folder train/, got an empty folder"),
        (["pictures"], r"must hold a folder train/, got pictures"),
        (
            ["train/ant"],
            r"must hold a folder test/ or val/ \(or valid/ or validation/\), got train/",
        ),
        (["train", "test"], r"train must hold one folder per class, got an empty folder"),
        (["train/ant", "test/ant"], r"train/ant must hold images, got an empty folder"),
    ],
)
def test_missing_and_empty_folders_are_named(
    tmp_path: Path, folders: list[str], message: str
) -> None:
    for folder in folders:
        (tmp_path / folder).mkdir(parents=True)
    with pytest.raises(UsageError, match=message):
        read_folder(str(tmp_path))


def test_a_folder_that_does_not_exist_is_named(tmp_path: Path) -> None:
    with pytest.raises(
        UsageError, match=r"imagefolder:.*/nowhere must hold a folder train/, got no such folder"
    ):
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
            b"BM"
            + struct.pack("<IIIIiiHHIIiiII", 99, 0, 54, 40, 10**5, 10**5, 1, 24, 0, 0, 0, 0, 0, 0),
        ),  # a bomb
    ],
    ids=["empty", "text", "cut", "header", "bomb"],
)
@pytest.mark.parametrize("part", ["train", "test"])
def test_a_damaged_image_is_named(tmp_path: Path, part: str, name: str, content: bytes) -> None:
    two_classes(tmp_path)
    (tmp_path / part / "bee" / name).write_bytes(content)
    with pytest.raises(
        UsageError, match=f"{part}/bee/{re.escape(name)} cannot be decoded as an image"
    ):
        read_folder(str(tmp_path))


@pytest.mark.parametrize("mode", ["I", "F"])
def test_images_of_32_bits_are_refused_and_not_clipped(tmp_path: Path, mode: str) -> None:
    two_classes(tmp_path)
    kind = {"I": np.int32, "F": np.float32}[mode]
    Image.fromarray(np.full((6, 8), 1000, dtype=kind)).save(tmp_path / "train" / "ant" / "deep.tif")
    with pytest.raises(
        UsageError, match=f"deep.tif must have 8 or 16 bits per channel, got Pillow's mode '{mode}'"
    ):
        read_folder(str(tmp_path))


def sixteen_bits(path: Path, levels: list[int]) -> None:
    """A binary PGM or PPM whose first row holds ``levels`` (of all channels alike), the others the
    first of them.
    """
    channels = 3 if path.suffix == ".ppm" else 1
    rows = np.full((6, 8), levels[0], dtype=">u2")
    rows[0, : len(levels)] = levels
    header = f"P{6 if channels == 3 else 5}\n8 6\n65535\n".encode()
    path.write_bytes(header + np.repeat(rows, channels).tobytes())


@pytest.mark.parametrize("suffix", [".png", ".tif", ".pgm", ".ppm"])
def test_16_bits_a_channel_are_reduced_to_8_with_a_word(tmp_path: Path, suffix: str) -> None:
    two_classes(tmp_path)
    path = tmp_path / "train" / "ant" / f"deep{suffix}"
    if suffix in (".pgm", ".ppm"):
        sixteen_bits(path, [65535, 0x8000, 0x1234, 0])
    else:
        rows = np.full((6, 8), 65535, dtype=np.uint16)
        rows[0, :4] = [65535, 0x8000, 0x1234, 0]
        Image.fromarray(rows).save(path)
    with pytest.warns(
        PddFastWarning,
        match=rf"images of 16 bits per channel \(1\) are reduced to 8, e\.g\. .*deep\{suffix}",
    ):
        found = read_folder(str(tmp_path))
    assert found.train[3, 0, 0, :4].tolist() == [255, 0x80, 0x12, 0]
    assert found.train.shape[1] == (3 if suffix == ".ppm" else 1)


def test_12_bits_in_16_are_refused_because_16_levels_would_be_left(tmp_path: Path) -> None:
    two_classes(tmp_path)
    Image.fromarray(np.full((6, 8), 4095, dtype=np.uint16)).save(
        tmp_path / "train" / "ant" / "deep.png"
    )
    with pytest.raises(
        UsageError,
        match=r"must use their range 0\.\.65535, got none above 4095, e\.g\. .*deep\.png",
    ):
        read_folder(str(tmp_path))


@pytest.mark.parametrize("part", ["train", "test"])
def test_an_image_of_another_size_is_named_with_both_sizes(tmp_path: Path, part: str) -> None:
    two_classes(tmp_path)
    put(tmp_path / part / "bee", [1], size=(9, 6), suffix=".bmp")
    message = (
        rf"{part}/bee/0\.bmp must be 8x6 pixels like the first image, got 9x6; resize "
        rf"the images first"
    )
    with pytest.raises(UsageError, match=message):
        read_folder(str(tmp_path))


# ---- folders ----


@pytest.mark.parametrize("name", ["val", "valid", "validation"])
def test_a_validation_folder_is_tested_on_where_test_is_missing_or_has_no_labels(
    tmp_path: Path, name: str
) -> None:
    two_classes(tmp_path, name)
    assert read_folder(str(tmp_path)).test[:, 0, 0, 0].tolist() == [10, 10, 200, 200]
    put(tmp_path / "test" / "images", [1, 2, 3])
    assert read_folder(str(tmp_path)).test[:, 0, 0, 0].tolist() == [10, 10, 200, 200]


@pytest.mark.parametrize(
    "litter",
    [
        "__MACOSX",
        ".ipynb_checkpoints",
        "@eaDir",
        "lost+found",
        "$RECYCLE.BIN",
        "System Volume Information",
        ".git",
    ],
)
def test_what_systems_leave_behind_is_no_class_and_no_image(tmp_path: Path, litter: str) -> None:
    two_classes(tmp_path)
    for place in ("train", "test", "train/ant"):
        put(tmp_path / place / litter, [99])
    for name in ("Thumbs.db", "desktop.ini", ".DS_Store"):
        (tmp_path / "train" / "bee" / name).write_bytes(b"\0")
    with warnings.catch_warnings(action="error"):
        found = read_folder(str(tmp_path))
    assert found.classes == ("ant", "bee")
    assert found.train[:, 0, 0, 0].tolist() == [10] * 3 + [200] * 3


def test_images_at_any_depth_below_their_class_are_read(tmp_path: Path) -> None:
    two_classes(tmp_path)
    put(tmp_path / "train" / "ant" / "monday" / "morning", [11, 12])
    put(tmp_path / "train" / "bee" / "images", [201])
    (tmp_path / "train" / "bee" / "again").symlink_to(tmp_path / "train" / "bee")
    assert read_folder(str(tmp_path)).train[:, 0, 0, 0].tolist() == [
        10,
        10,
        10,
        11,
        12,
        200,
        200,
        200,
        201,
    ]


@pytest.mark.parametrize("part", ["train", "test"])
def test_images_beside_the_classes_are_named(tmp_path: Path, part: str) -> None:
    two_classes(tmp_path)
    put(tmp_path / part, [1, 2])
    with pytest.raises(
        UsageError,
        match=rf"{part} must hold all images in the folders of their classes, got 2 beside",
    ):
        read_folder(str(tmp_path))


@pytest.mark.parametrize("classes", [["only"], ["only", "__MACOSX"], ["only", ".hidden"]])
def test_a_single_class_is_refused(tmp_path: Path, classes: list[str]) -> None:
    for part in ("train", "test"):
        for name in classes:
            put(tmp_path / part / name, [1, 2, 3])
    with pytest.raises(
        UsageError, match="train must hold 2 classes or more, each in a folder, got 'only' alone"
    ):
        read_folder(str(tmp_path))


@pytest.mark.skipif(sys.platform != "linux", reason="other systems' file names are Unicode")
def test_class_names_that_are_no_utf_8_differ_and_can_be_written(tmp_path: Path) -> None:
    root = os.fsencode(tmp_path) + b"/caf\xe9s"
    for part, count in (("train", 3), ("test", 2)):
        for k, name in enumerate((b"caf\xe8", b"caf\xe9", "café".encode())):
            put(Path(os.fsdecode(root)) / part / os.fsdecode(name), [10 * k] * count)
    found = data.load(f"imagefolder:{os.fsdecode(root)}")
    assert found.classes == ("café", r"caf\xe8", r"caf\xe9")
    assert found.name == r"imagefolder:caf\xe9s"
    assert " ".join((found.name, *found.classes)).encode()


LINES = "a.png\tn02\t0\t0\t63\t63\nb.png\tn01\t0\t0\t63\t63\nc.png\tn02\t0\t0\t63\t63\n"


def tiny(root: Path, places: dict[str, str], annotations: str | None) -> None:
    """train/ and the unlabeled test/ as shipped; val/'s images a (7), b (8) and c (9) in
    ``places``.
    """
    put(root / "train" / "n01" / "images", [1, 2, 3])
    (root / "train" / "n01" / "n01_boxes.txt").write_text("0.png\t0\t0\t9\t9\n")
    put(root / "train" / "n02" / "images", [4, 5, 6])
    put(root / "test" / "images", [99])
    for name, place in places.items():
        (root / "val" / place).mkdir(parents=True, exist_ok=True)
        Image.new("L", (8, 6), {"a": 7, "b": 8, "c": 9}[name]).save(
            root / "val" / place / f"{name}.png"
        )
    if annotations is not None:
        (root / annotations / "val_annotations.txt").write_text(LINES)


SORTED = {"a": "n02", "b": "n01", "c": "n02"}


# ---- what people make of Tiny ImageNet ----


@pytest.mark.parametrize("annotations", ["val", ".", None], ids=["in place", "moved up", "removed"])
@pytest.mark.parametrize(
    "places",
    [
        dict.fromkeys("abc", "images"),
        dict.fromkeys("abc", "."),
        SORTED,
        {name: f"{place}/images" for name, place in SORTED.items()},
        {name: f"images/{place}" for name, place in SORTED.items()},
    ],
    ids=["shipped", "flat", "sorted", "sorted in images", "sorted below images"],
)
def test_tiny_imagenet_in_every_arrangement(
    tmp_path: Path, places: dict[str, str], annotations: str | None
) -> None:
    tiny(tmp_path, places, annotations)
    (tmp_path / "val" / "images").mkdir(
        exist_ok=True
    )  # scripts that move the images leave it behind
    if annotations is None and places["a"] in ("images", "."):
        with pytest.raises(UsageError, match="must hold"):  # nothing says what is on them
            read_folder(str(tmp_path))
        return
    with warnings.catch_warnings(action="error"):
        found = read_folder(str(tmp_path))
    levels = found.test[:, 0, 0, 0].tolist()
    assert dict(zip(levels, found.test_labels.tolist(), strict=True)) == {7: 1, 8: 0, 9: 1}


def test_tiny_imagenet_sorted_by_copying_counts_every_image_once(tmp_path: Path) -> None:
    tiny(tmp_path, SORTED, "val")
    tiny(tmp_path, dict.fromkeys("abc", "images"), "val")
    found = read_folder(str(tmp_path))
    assert (found.test[:, 0, 0, 0].tolist(), found.test_labels.tolist()) == ([8, 7, 9], [0, 1, 1])


def test_tiny_imagenet_sorted_in_part_is_read_by_its_annotations_or_refused(tmp_path: Path) -> None:
    tiny(
        tmp_path, {"a": "n02", "b": "images", "c": "images"}, "val"
    )  # no image of n01 was moved yet
    found = read_folder(str(tmp_path))
    assert (found.test[:, 0, 0, 0].tolist(), found.test_labels.tolist()) == ([7, 8, 9], [1, 0, 1])
    put(tmp_path / "val" / "n01", [8])
    with pytest.raises(
        UsageError,
        match=r"val must hold all images in the folders of their classes or none, got 2 beside",
    ):
        read_folder(str(tmp_path))


def test_an_image_that_the_annotations_do_not_name_is_refused(tmp_path: Path) -> None:
    tiny(tmp_path, dict.fromkeys("abc", "images"), "val")
    put(tmp_path / "val" / "images", [1])
    with pytest.raises(
        UsageError,
        match=r"val_annotations\.txt must name every image, got none for .*0\.png \(1 in all\)",
    ):
        read_folder(str(tmp_path))
