"""Images in folders, one per class: DIR/train/<class>/* and DIR/test/<class>/* (or DIR/val/<class>/*)."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from pdd_fast.data.splits import Pixels
from pdd_fast.errors import UsageError

_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".webp", ".ppm", ".pgm", ".tif", ".tiff", ".gif"}
_ANNOTATIONS = "val_annotations.txt"
# Files of a task: what a pool of threads keeps of one, 1.6 KB, is half of the bytes of an image of 3×32×32.
_AT_ONCE = 64


def read(folder: str) -> Pixels:
    """Both splits, decoded into one uint8 tensor each. Grey where every image of both is grey, else RGB.

    Raises:
        UsageError: a folder is missing or empty, classes differ between the splits, a file cannot be decoded or has
            more than 8 bits a channel, or images are not of one size; the message names the first offender.
    """
    root = Path(folder).expanduser()
    if not (root / "train").is_dir():
        raise UsageError(f"imagefolder:{folder} must hold a folder train/, got {_found(root)}")
    # Tiny ImageNet's own test/ has no labels, so an annotated val/ comes first.
    annotated = (root / "val" / _ANNOTATIONS).is_file()
    names = ("val",) if annotated else ("test", "val")
    test = next((root / name for name in names if (root / name).is_dir()), None)
    if test is None:
        raise UsageError(f"imagefolder:{folder} must hold a folder test/ or val/, got {_found(root)}")
    classes, train_files, train_labels = _list(root / "train")
    if annotated:
        test_files, test_labels = _list_annotated(test, classes)
    else:
        test_classes, test_files, test_labels = _list(test)
        if test_classes != classes:
            odd = sorted(set(test_classes) ^ set(classes))[0]
            where = "train/" if odd in classes else f"{test.name}/"
            raise UsageError(
                f"imagefolder:{folder}: train/ and {test.name}/ must hold the same classes, got {odd!r} in {where} only"
            )
    grey, size = _look(train_files + test_files)
    return Pixels(classes, _decode(train_files, grey, size), train_labels, _decode(test_files, grey, size), test_labels)


def _found(folder: Path) -> str:
    if not folder.is_dir():
        return "no such folder"
    return ", ".join(sorted(entry.name for entry in folder.iterdir())[:5]) or "an empty folder"


def _list(folder: Path) -> tuple[tuple[str, ...], list[Path], Tensor]:
    """Class names in alphabetical order, files, labels."""
    classes = tuple(sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and entry.name[0] != "."))
    if not classes:
        raise UsageError(f"{folder} must hold one folder per class, got {_found(folder)}")
    files: list[Path] = []
    labels: list[int] = []
    for label, name in enumerate(classes):
        # Tiny ImageNet keeps a class's images one level deeper, in images/.
        inside = folder / name
        inside = inside / "images" if (inside / "images").is_dir() else inside
        # Hidden files are the system's: macOS leaves a ._NAME.png beside a NAME.png that it copies to a foreign disk.
        own = sorted(p for p in inside.iterdir() if p.suffix.lower() in _SUFFIXES and p.name[0] != ".")
        if not own:
            raise UsageError(f"{inside} holds no images ({', '.join(sorted(_SUFFIXES))})")
        files += own
        labels += [label] * len(own)
    return classes, files, torch.tensor(labels)


def _list_annotated(folder: Path, classes: tuple[str, ...]) -> tuple[list[Path], Tensor]:
    """Tiny ImageNet's val/ as it is shipped: all images in one folder, classes in a tab-separated file."""
    numbers = {name: label for label, name in enumerate(classes)}
    files, labels = [], []
    try:
        lines = (folder / _ANNOTATIONS).read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise UsageError(f"{folder / _ANNOTATIONS} cannot be read as text: {error}") from error
    for line in filter(str.strip, lines):
        name, tab, rest = line.partition("\t")
        label = rest.split("\t")[0]
        if not tab:
            raise UsageError(f"{folder / _ANNOTATIONS} must hold lines of file, tab, class, got {line!r}")
        if label not in numbers:
            raise UsageError(f"{folder / _ANNOTATIONS} names the class {label!r}, which train/ does not hold")
        files.append(folder / "images" / name)
        labels.append(numbers[label])
    return files, torch.tensor(labels)


def _open(path: Path) -> Image.Image:
    """A decoded image of 8 bits a channel at most."""
    try:
        image = Image.open(path)
        image.load()
    except Exception as error:  # damaged files make Pillow's readers raise whatever they stumble over
        raise UsageError(f"{path} cannot be decoded as an image: {error}") from error
    if image.mode[0] in "IF":  # 16 or 32 bits; Pillow's conversion would clip all but the lowest 8 without a word
        raise UsageError(
            f"{path} must have 8 bits a channel, got Pillow's mode {image.mode!r}; convert the images first"
        )
    return image


def _look(files: list[Path]) -> tuple[bool, tuple[int, int]]:
    """Whether all images are grey (read off their headers), and the (width, height) of the first."""
    size = _open(files[0]).size

    def is_grey(path: Path) -> bool:
        try:
            with Image.open(path) as image:
                return image.mode in ("1", "L", "LA")
        except Exception:
            return True  # _decode names it

    return all(map(is_grey, files)), size


def _decode(files: list[Path], grey: bool, size: tuple[int, int]) -> Tensor:
    """[n, C, H, W] uint8."""
    width, height = size
    pixels = np.empty((len(files), 1 if grey else 3, height, width), dtype=np.uint8)

    def decode(i: int) -> None:
        image = _open(files[i])
        if image.size != size:
            found = f"{image.size[0]}x{image.size[1]}"
            raise UsageError(
                f"{files[i]} must be {width}x{height} pixels like the first image, got {found}; resize the images first"
            )
        array = np.asarray(image.convert("L" if grey else "RGB"))
        pixels[i] = array[None] if grey else array.transpose(2, 0, 1)

    def decode_some(first: int) -> None:
        for i in range(first, min(first + _AT_ONCE, len(files))):
            decode(i)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(decode_some, range(0, len(files), _AT_ONCE)))
    return torch.from_numpy(pixels)
