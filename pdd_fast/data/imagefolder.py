"""Images in folders, one per class: DIR/train/<class>/* and DIR/test/<class>/* (or DIR/val/<class>/*)."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from pdd_fast.data.splits import Pixels
from pdd_fast.errors import UsageError

_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".webp", ".ppm", ".pgm", ".tif", ".tiff", ".gif"}
_ANNOTATIONS = "val_annotations.txt"


def read(folder: str) -> Pixels:
    """Both splits, decoded into one uint8 tensor each. Grey where every image is grey, else RGB.

    Raises:
        UsageError: a folder is missing or empty, classes differ between the splits, a file cannot be decoded, or images
            are not of one size; the message names the first offender.
    """
    root = Path(folder).expanduser()
    if not (root / "train").is_dir():
        raise UsageError(f"imagefolder:{folder} must hold a folder train/, got {_found(root)}")
    test = next((root / name for name in ("test", "val") if (root / name).is_dir()), None)
    if test is None:
        raise UsageError(f"imagefolder:{folder} must hold a folder test/ or val/, got {_found(root)}")
    classes, train_files, train_labels = _list(root / "train")
    if (test / _ANNOTATIONS).is_file():
        test_files, test_labels = _list_annotated(test, classes)
    else:
        names, test_files, test_labels = _list(test)
        if names != classes:
            odd = sorted(set(names) ^ set(classes))[0]
            raise UsageError(
                f"imagefolder:{folder}: train/ and {test.name}/ must hold the same classes; {odd!r} is in one only"
            )
    grey, size = _look(train_files)
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
        own = sorted(path for path in inside.iterdir() if path.suffix.lower() in _SUFFIXES)
        if not own:
            raise UsageError(f"{inside} holds no images ({', '.join(sorted(_SUFFIXES))})")
        files += own
        labels += [label] * len(own)
    return classes, files, torch.tensor(labels)


def _list_annotated(folder: Path, classes: tuple[str, ...]) -> tuple[list[Path], Tensor]:
    """Tiny ImageNet's val/ as it is shipped: all images in one folder, classes in a tab-separated file."""
    numbers = {name: label for label, name in enumerate(classes)}
    files, labels = [], []
    for line in (folder / _ANNOTATIONS).read_text().splitlines():
        name, label = line.split("\t")[:2]
        if label not in numbers:
            raise UsageError(f"{folder / _ANNOTATIONS} names the class {label!r}, which train/ does not hold")
        files.append(folder / "images" / name)
        labels.append(numbers[label])
    return files, torch.tensor(labels)


def _open(path: Path) -> Image.Image:
    try:
        image = Image.open(path)
        image.load()
        return image
    except (UnidentifiedImageError, OSError, SyntaxError) as error:
        raise UsageError(f"{path} cannot be decoded as an image: {error}") from error


def _look(files: list[Path]) -> tuple[bool, tuple[int, int]]:
    """Whether all images are grey (read off their headers), and the (width, height) of the first."""
    size = _open(files[0]).size

    def is_grey(path: Path) -> bool:
        try:
            with Image.open(path) as image:
                return image.mode in ("1", "L", "LA", "I", "I;16")
        except (UnidentifiedImageError, OSError):
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

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(decode, range(len(files)), chunksize=64))
    return torch.from_numpy(pixels)
