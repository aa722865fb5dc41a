"""Images in folders, one per class: DIR/train/<class>/* and DIR/test/<class>/*.

DIR/val/, DIR/valid/ and DIR/validation/ may replace DIR/test/.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image

from pdd_fast.data.image_files import _Decoder, _formats, _suffixes, _warn
from pdd_fast.data.splits import Pixels
from pdd_fast.runtime.errors import UsageError
from pdd_fast.runtime.paths import expanded, readable

TEST_FOLDERS = ("test", "val", "valid", "validation")
_ANNOTATIONS = "val_annotations.txt"
# Folders and files that systems and archives leave behind. Hidden ones (.DS_Store, ._0.png,
# .ipynb_checkpoints) are ignored too.
_LITTER = {
    "__macosx",
    "@eadir",
    "@recycle",
    "#recycle",
    "#snapshot",
    "lost+found",
    "$recycle.bin",
    "recycler",
    "system volume information",
    "thumbs.db",
    "ehthumbs.db",
    "desktop.ini",
    "icon\r",
}
# Files that describe images. Every other file in a class's folder is read as an image or refused.
_TEXTS = {
    ".txt",
    ".csv",
    ".tsv",
    ".json",
    ".jsonl",
    ".xml",
    ".md",
    ".html",
    ".htm",
    ".yaml",
    ".yml",
    ".log",
    ".pbtxt",
}


def read(folder: str) -> Pixels:
    r"""Return both splits as one uint8 tensor each.

    Images are gray if every image of both splits is gray, else RGB. They are turned upright (EXIF).
    Four cases give a :class:`~pdd_fast.runtime.errors.PddFastWarning`: of several frames the first
    is taken; 16-bit levels are reduced to 8 bits; transparent images that vanish on white are
    composed on black or else on gray; files that are not images are ignored. Bytes of class names
    that are not UTF-8 are written as \xNN.

    Raises:
        UsageError: a folder is missing or empty, there is only one class, classes differ between
            the splits, a file cannot be decoded as an image or has floating-point or 32-bit levels,
            or sizes differ. The message names the first such file or folder.
    """
    root = expanded(folder)
    if not (root / "train").is_dir():
        raise UsageError(f"imagefolder:{folder} must hold a folder train/, got {_found(root)}")
    present = [root / name for name in TEST_FOLDERS if (root / name).is_dir()]
    if not present:
        raise UsageError(
            f"imagefolder:{folder} must hold a folder test/ or val/ (or valid/ or validation/), "
            f"got {_found(root)}"
        )
    texts: list[Path] = []
    train = _sorted_into_classes(root / "train", texts)
    if len(train.classes) < 2:
        raise UsageError(
            f"{root / 'train'} must hold 2 classes or more, each in a folder, got "
            f"{readable(train.classes[0])!r} alone"
        )
    test = _test_part(folder, present, train.classes, texts)
    if texts:
        counts = Counter(path.suffix.lower() for path in texts)
        found = ", ".join(f"{count} {suffix}" for suffix, count in sorted(counts.items()))
        _warn(
            f"imagefolder:{folder}: files that are not images are ignored: {found}, e.g. {texts[0]}"
        )
    files = train.files + test.files
    pixels = _Decoder(f"imagefolder:{folder}", files).run()
    classes = tuple(map(readable, train.classes))
    count = len(train.files)
    return Pixels(
        classes,
        pixels[:count],
        torch.tensor(train.labels, device="cpu"),
        pixels[count:],
        torch.tensor(test.labels, device="cpu"),
    )


# ---- files ----


@dataclass(frozen=True)
class _Part:
    """Images of a split with their labels, which index ``classes``."""

    classes: tuple[str, ...]  # names of the folders, in alphabetical order
    files: list[Path]
    labels: list[int]


def _is_litter(name: str) -> bool:
    return name.startswith(".") or name.lower() in _LITTER


def _entries(folder: Path) -> list[Path]:
    """Return the entries that a person put into a folder, in alphabetical order."""
    return sorted(entry for entry in folder.iterdir() if not _is_litter(entry.name))


def _found(folder: Path) -> str:
    if not folder.is_dir():
        return "no such folder"
    names = [entry.name + "/" * entry.is_dir() for entry in _entries(folder)]
    return ", ".join(names[:5]) + ", ..." * (len(names) > 5) or "an empty folder"


def _walk(folder: Path, above: frozenset[str] = frozenset()) -> Iterator[Path]:
    """Yield all files below a folder, following links except to a folder above."""
    place = os.path.realpath(folder)
    if place in above:
        return
    for entry in _entries(folder):
        if entry.is_dir():
            yield from _walk(entry, above | {place})
        else:
            yield entry


def _is_image(path: Path) -> bool:
    """Return whether the suffix or, if it is unknown, the content is that of an image."""
    if path.suffix.lower() in _suffixes():
        return True
    try:
        with Image.open(path, formats=_formats()):
            return True
    except Exception:
        return False


def _images(folder: Path, files: Iterator[Path], texts: list[Path]) -> list[Path]:
    """Return the images of a class among ``files``, and add files that describe them to ``texts``.

    Raises:
        UsageError: a file is neither.
    """
    images: list[Path] = []
    odd: list[Path] = []
    for path in files:
        if path.suffix.lower() in _TEXTS:
            # Tiny ImageNet's bounding boxes are expected and not reported.
            texts += [] if path.name.endswith("_boxes.txt") else [path]
        else:
            (images if _is_image(path) else odd).append(path)
    if odd:
        counts = Counter(path.suffix.lower() or "no suffix" for path in odd)
        found = ", ".join(f"{suffix} ({count})" for suffix, count in sorted(counts.items()))
        raise UsageError(
            f"{folder} must hold images that Pillow can read, got {found}, e.g. {odd[0].name}; "
            "convert these files, for example to PNG, or move them away"
        )
    return images


def _class_folders(folder: Path) -> list[str]:
    return [entry.name for entry in _entries(folder) if entry.is_dir()]


def _sorted_into_classes(
    folder: Path, texts: list[Path], wanted: tuple[str, ...] | None = None
) -> _Part:
    """Return the images of a folder that holds one folder per class, with images at any depth.

    Args:
        folder: the folder.
        texts: list that receives the files that describe images.
        wanted: classes of train/. An empty folder with another name is ignored: scripts that sort
            images into classes leave such folders behind.
    """
    classes = tuple(
        name
        for name in _class_folders(folder)
        if wanted is None or name in wanted or any(_walk(folder / name))
    )
    if not classes:
        raise UsageError(f"{folder} must hold one folder per class, got {_found(folder)}")
    loose = [entry for entry in _entries(folder) if not entry.is_dir() and _is_image(entry)]
    if loose:
        raise UsageError(
            f"{folder} must hold all images in the folders of their classes, got {len(loose)} "
            f"beside them, e.g. {loose[0].name}; sort them in or move them away"
        )
    part = _Part(classes, [], [])
    for label, name in enumerate(classes):
        inside = folder / name
        own = _images(inside, _walk(inside), texts)
        if not own:
            raise UsageError(f"{inside} must hold images, got {_found(inside)}")
        part.files.extend(own)
        part.labels.extend([label] * len(own))
    return part


def _test_part(
    folder: str, present: list[Path], classes: tuple[str, ...], texts: list[Path]
) -> _Part:
    """Return the first of the folders ``present`` that has labels.

    Labels come from an annotation file or from class folders. Tiny ImageNet's test/ has neither.
    """
    root = present[0].parent
    validation = [path for path in present if path.name != "test"]
    for annotated in validation:
        # At its place in the archive, or moved up, out of the way of readers that expect folders
        # only.
        for file in (
            annotated / _ANNOTATIONS,
            annotated / "images" / _ANNOTATIONS,
            root / _ANNOTATIONS,
        ):
            if file.is_file():
                return _annotated_part(annotated, file, classes)
    # An unzipped Tiny ImageNet may have its classes in val/images/.
    places = [place for path in present for place in (path, path / "images") if place.is_dir()]
    chosen = next((p for p in places if not set(classes).isdisjoint(_class_folders(p))), present[0])
    part = _sorted_into_classes(chosen, texts, classes)
    if part.classes != classes:
        odd = sorted(set(part.classes) ^ set(classes))[0]
        name = chosen.relative_to(root).as_posix()
        where = "train/" if odd in classes else f"{name}/"
        raise UsageError(
            f"imagefolder:{folder}: train/ and {name}/ must hold the same classes, got {odd!r} in "
            f"{where} only"
        )
    return part


def _annotated_part(folder: Path, annotations: Path, classes: tuple[str, ...]) -> _Part:
    """Return Tiny ImageNet's val/, by its annotation file or by class folders.

    As shipped, all images are in one folder and a tab-separated file names their classes. A script
    may have sorted them into folders and left the file behind. Folders decide if every class has
    images in one.
    """
    labels = {name: label for label, name in enumerate(classes)}
    sorted_in: dict[tuple[int, str], Path] = {}
    loose: dict[str, Path] = {}
    for path in _images(folder, _walk(folder), []):
        above = path.relative_to(folder).parts[:-1]
        label = next((labels[name] for name in above[:2] if name in labels), None)
        if label is None:
            loose[path.name] = path
        else:
            sorted_in[label, path.name] = path
    if {label for label, _ in sorted_in} == set(labels.values()):
        names = {name for _, name in sorted_in}
        # The others were copied, not moved.
        left = [path for name, path in loose.items() if name not in names]
        if left:
            raise UsageError(
                f"{folder} must hold all images in the folders of their classes or none, got "
                f"{len(left)} beside them, e.g. {left[0]}; sort them in or move them away"
            )
        files = sorted((label, path) for (label, _), path in sorted_in.items())
        return _Part(classes, [path for _, path in files], [label for label, _ in files])
    part = _Part(classes, [], [])
    for name, label in _annotation_lines(annotations, labels):
        usual = folder / "images" / name
        part.files.append(sorted_in.get((label, name)) or loose.get(name) or usual)
        part.labels.append(label)
    unnamed = sorted((set(sorted_in.values()) | set(loose.values())) - set(part.files))
    if unnamed and all(path.exists() for path in part.files):
        raise UsageError(
            f"{annotations} must name every image, got none for {unnamed[0]} ({len(unnamed)} in "
            "all)"
        )
    return part


def _annotation_lines(file: Path, labels: dict[str, int]) -> Iterator[tuple[str, int]]:
    """Yield file names of images with their labels."""
    try:
        lines = file.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise UsageError(f"{file} cannot be read as text: {error}") from error
    for line in filter(str.strip, lines):
        name, tab, rest = line.partition("\t")
        title = rest.split("\t")[0].strip()
        if not tab:
            raise UsageError(f"{file} must hold lines of file, tab, class, got {line!r}")
        if title not in labels:
            raise UsageError(f"{file} must name classes in train/, got {title!r}")
        yield name, labels[title]


# ---- pixels ----
