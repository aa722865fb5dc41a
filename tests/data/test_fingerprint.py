"""Fingerprints of data: the same for the same images wherever and however they lie, and no
others."""

from __future__ import annotations

import shutil
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from photographs import photographs
from PIL import Image

from pdd_fast import data
from pdd_fast.data.fingerprint import difference, fingerprint, identity
from pdd_fast.data.splits import Pixels


def pixels() -> Pixels:
    draw = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (10, 3, 4, 5), dtype=torch.uint8, generator=draw)
    labels = torch.arange(10) % 2
    return Pixels(("ant", "bee"), images[:6], labels[:6], images[6:], labels[6:])


def mark(folder: Path, **options: Any) -> str:
    return data.load(f"imagefolder:{folder}", **options).fingerprint


def swapped(tensor: torch.Tensor) -> torch.Tensor:
    return tensor[[1, 0, *range(2, len(tensor))]]


def test_digits_have_the_fingerprint_of_every_machine() -> None:
    assert (
        data.load("digits").fingerprint == data.load("digits", validation_fraction=0.3).fingerprint
    )
    assert data.load("digits").fingerprint == "961d6dee6b22a6572ceb19cc55e451ba-451868d2f07f306a"


def test_every_pixel_label_and_class_counts() -> None:
    original = pixels()
    brighter = original.test.clone()
    brighter[3, 2, 3, 4] ^= 1
    others = [
        replace(original, test=brighter),
        replace(original, train_labels=1 - original.train_labels),
        replace(original, classes=("ant", "wasp")),
        replace(original, train=original.train[:5], train_labels=original.train_labels[:5]),
        replace(original, train=original.train.float() / 255, test=original.test.float() / 255),
        replace(
            original, train=original.train.view(6, 3, 5, 4), test=original.test.view(4, 3, 5, 4)
        ),
        replace(
            original,
            train=original.test,
            train_labels=original.test_labels,
            test=original.train,
            test_labels=original.train_labels,
        ),
    ]
    contents = [fingerprint(each).partition("-")[0] for each in (original, *others)]
    assert len(set(contents)) == len(contents)


def test_the_order_of_training_images_counts_apart_and_that_of_test_images_does_not() -> None:
    original = pixels()
    content, _, order = fingerprint(original).partition("-")
    other = replace(
        original, train=swapped(original.train), train_labels=swapped(original.train_labels)
    )
    assert fingerprint(other).partition("-")[0] == content
    assert fingerprint(other).partition("-")[2] != order
    other = replace(
        original, test=swapped(original.test), test_labels=swapped(original.test_labels)
    )
    assert fingerprint(other) == fingerprint(original)


def test_memory_format_does_not_count() -> None:
    original = pixels()
    other = replace(original, train=original.train.contiguous(memory_format=torch.channels_last))
    assert fingerprint(other) == fingerprint(original)


def test_a_name_that_a_mac_has_decomposed_is_the_same() -> None:
    composed, decomposed = (
        replace(pixels(), classes=("ant", name)) for name in ("b\u00e9e", "be\u0301e")
    )
    assert fingerprint(composed) == fingerprint(decomposed)


def test_copies_of_a_folder_are_known_wherever_they_lie(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = photographs(tmp_path / "birds")
    expected = mark(original)
    archive = tmp_path / "birds.zip"
    with zipfile.ZipFile(archive, "w") as file:
        for path in sorted(
            original.rglob("*.png"), reverse=True
        ):  # the file system sees them in another order
            file.write(path, path.relative_to(original))
    with zipfile.ZipFile(archive) as file:
        file.extractall(tmp_path / "unzipped")
    assert mark(tmp_path / "unzipped") == expected
    for path in (tmp_path / "unzipped").rglob("*.png"):  # other bytes, the same pixels
        image = Image.open(path)
        image.load()
        path.unlink()
        image.save(path.with_suffix(".bmp"))
    assert mark(tmp_path / "unzipped") == expected
    shutil.move(tmp_path / "unzipped" / "test", tmp_path / "unzipped" / "val")
    assert mark(tmp_path / "unzipped") == expected
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert mark(Path("birds")) == mark(Path("~/birds")) == expected
    for path in (tmp_path / "birds" / "train" / "ant").iterdir():
        path.rename(path.with_stem(str(9 - int(path.stem))))
    assert mark(original).partition("-")[0] == expected.partition("-")[0]
    assert mark(original) != expected


def test_what_is_made_of_the_pixels_does_not_count(tmp_path: Path) -> None:
    folder = photographs(tmp_path / "birds")
    assert mark(folder, whitening="zca", validation_fraction=0.5) == mark(folder)


BIRDS = {"data": "imagefolder:birds", "fingerprint": "aaaa-11", "classes": ["ant", "bee"]}


@pytest.mark.parametrize(
    ("stored", "said"),
    [
        ({}, ""),
        ({"fingerprint": "aaaa-22"}, ""),
        ({"data": "imagefolder:renamed"}, ""),
        (
            {"data": "imagefolder:renamed", "fingerprint": None},
            "imagefolder:renamed, not imagefolder:birds",
        ),
        ({"fingerprint": ""}, ""),
        (
            {"fingerprint": "bbbb-11"},
            "imagefolder:birds with other images or labels (fingerprint bbbb), not .* (aaaa)",
        ),
        (
            {"classes": ["ant", "bee", "cat"]},
            "imagefolder:birds of 3 classes, not imagefolder:birds of 2",
        ),
        (
            {"classes": ["ant", "wasp"]},
            "imagefolder:birds with class 'wasp', not imagefolder:birds with 'bee'",
        ),
        ({"classes": None}, ""),
        ({"data": "cifar10"}, ""),  # the fingerprint of an exported copy says so
    ],
)
def test_differences_are_said_and_old_files_known_by_name(
    stored: dict[str, Any], said: str
) -> None:
    found = difference(BIRDS | stored, BIRDS)
    parts = said.split(".*")
    assert bool(found) == bool(said)
    assert all(part in found for part in parts)
    assert difference({}, BIRDS) == ""


def test_sets_with_a_name_are_known_by_it_too_and_order_where_it_matters() -> None:
    digits, other = BIRDS | {"data": "digits"}, BIRDS | {"data": "mnist"}
    assert difference(other, digits) == "mnist, not digits"
    assert "in another order" in difference(
        BIRDS | {"fingerprint": "aaaa-22"}, BIRDS, in_order=True
    )
    assert identity(data.load("digits"))["classes"] == list("0123456789")
