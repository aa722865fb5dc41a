"""Images in folders, one per class: DIR/train/<class>/* and DIR/test/<class>/*.

DIR/val/, DIR/valid/ and DIR/validation/ may replace DIR/test/.
"""

from __future__ import annotations

import os
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from pdd_fast.data.splits import Pixels
from pdd_fast.runtime.errors import PddFastWarning, UsageError, first_line
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
# These readers start other programs (Ghostscript), need libraries that are missing, or do not read
# still images.
_EXCLUDED_FORMATS = {"EPS", "WMF", "MPEG", "BUFR", "GRIB", "HDF5"}
# Colors that transparent images may be composed on, in order of preference.
_BACKGROUNDS = {"white": 255, "black": 0, "gray": 128}
# An image whose levels all lie within this range (of 0..255) shows nothing, like the edge of a
# white icon on white.
_FLAT = 8
# 12-bit images in 16-bit files stay below this. The upper 8 of their 16 bits have at most 16
# levels.
_FULL_RANGE = 4096
# EXIF's orientations 2 to 8, and Pillow's operation that turns such an image upright.
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# Files per task: a thread pool needs 1.6 KB per task, half of the bytes of an image of 3×32×32.
_AT_ONCE = 64

Levels = NDArray[np.uint8]


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


def _warn(sentence: str) -> None:
    warnings.warn(sentence, PddFastWarning, stacklevel=4)


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


@cache
def _formats() -> tuple[str, ...]:
    """Return the formats that Pillow reads here, also by plug-ins such as pillow_heif."""
    Image.init()
    return tuple(name for name in Image.ID if name not in _EXCLUDED_FORMATS)


@cache
def _suffixes() -> frozenset[str]:
    """Return the suffixes of the images that Pillow reads."""
    formats = set(_formats())
    return frozenset(
        suffix for suffix, name in Image.registered_extensions().items() if name in formats
    )


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
            f"convert these files, for example to PNG, or move them away"
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
            raise UsageError(f"{inside} holds no images, got {_found(inside)}")
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
            f"all)"
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
            raise UsageError(f"{file} names the class {title!r}, which train/ does not hold")
        yield name, labels[title]


# ---- pixels ----


@dataclass(frozen=True)
class _Decoded:
    """Upright image with 8 bits per channel, and facts about its file worth a warning."""

    image: Image.Image
    several: bool  # frames or pages
    # Highest level if the file has 16 bits per channel. Pillow reduces such color images, so theirs
    # is 65535.
    highest: int | None


def _open(path: Path) -> _Decoded:
    try:
        # Opened here, because Pillow maps an 8-bit TIFF given by path and ignores its orientation,
        # which garbles it.
        with path.open("rb") as file, Image.open(file, formats=_formats()) as image:
            # A JPEG with several pictures (MPO: a preview, the other eye's) has the photograph
            # first.
            several = image.format != "MPO" and getattr(image, "is_animated", False)
            highest = 65535 if any(map(_has_16_bits, getattr(image, "tile", ()))) else None
            image.load()
            upright = _upright(image)
            # Pillow has 16-bit gray of PNG and PGM as I;16 or, in some releases, as I. An I of TIFF
            # has 32 bits.
            if upright.mode.startswith("I;16") or (
                upright.mode == "I" and image.format in ("PNG", "PPM")
            ):
                levels = np.asarray(upright).astype(np.int64)
                highest = int(levels.max())
                upright = Image.fromarray((levels >> 8).astype(np.uint8))
    except UnidentifiedImageError as error:
        raise UsageError(
            f"{path} cannot be decoded as an image: Pillow does not know its format"
        ) from error
    # Pillow's readers raise any kind of error on damaged files.
    except Exception as error:
        raise UsageError(f"{path} cannot be decoded as an image: {first_line(error)}") from error
    # Pillow's conversion would silently clip all but the lowest 8 bits.
    if upright.mode[0] in "IF":
        raise UsageError(
            f"{path} must have 8 or 16 bits per channel, got Pillow's mode {upright.mode!r}; "
            f"convert the images first"
        )
    return _Decoded(upright, several, highest)


def _has_16_bits(tile: tuple[Any, ...]) -> bool:
    """Return whether a decoder reads 16 bits per channel.

    Pillow keeps their high bytes in color images.
    """
    decoder, arguments = tile[0], tile[3]
    if decoder.startswith("ppm"):  # layout and highest level
        return int(arguments[1]) > 255
    # BGR;16 has 16 bits for all three channels together.
    return ";16" in str(arguments) and "BGR;16" not in str(arguments)


def _upright(image: Image.Image) -> Image.Image:
    """Return a loaded image as viewers show it."""
    try:
        orientation = image.getexif().get(0x0112)
    except Exception:  # damaged metadata of an intact image
        orientation = None
    turn = _UPRIGHT.get(orientation) if isinstance(orientation, int) else None
    return image.copy() if turn is None else image.transpose(turn)


def _look(files: list[Path]) -> tuple[bool, tuple[int, int]]:
    """Return whether all images are gray, by their headers, and (width, height) of the first."""
    size = _open(files[0]).image.size

    def is_gray(path: Path) -> bool:
        try:
            with Image.open(path, formats=_formats()) as image:
                return image.mode in ("1", "L", "LA", "I") or image.mode.startswith("I;16")
        except Exception:
            return True  # _decode reports it

    return all(map(is_gray, files)), size


def _is_transparent(image: Image.Image) -> bool:
    palette = image.palette.mode if image.mode == "P" and image.palette is not None else ""
    return (
        "transparency" in image.info
        or image.mode in ("LA", "La", "PA", "RGBa", "RGBA")
        or palette.endswith("A")
    )


def _composed(rgba: Levels, background: int) -> Levels:
    """Return [H, W, 4] composed on a gray of level ``background``: [H, W, 3]."""
    alpha = rgba[..., 3:].astype(np.uint32)
    return ((rgba[..., :3] * alpha + background * (255 - alpha) + 127) // 255).astype(np.uint8)


def _contrast(levels: Levels) -> int:
    """Return the largest range of a channel of [H, W, C]."""
    return int((levels.max((0, 1)) - levels.min((0, 1))).max())


class _Decoder:
    """Decoder of the files of both splits, which share background and number of channels."""

    def __init__(self, name: str, files: list[Path]) -> None:
        self.name, self.files = name, files
        self.gray, self.size = _look(files)
        self.background = next(iter(_BACKGROUNDS.values()))
        width, height = self.size
        self.pixels: Levels = np.empty(
            (len(files), 1 if self.gray else 3, height, width), dtype=np.uint8
        )
        self.several: dict[int, bool] = {}  # by row; written by many threads at once
        self.highest: dict[int, int] = {}
        self.contrasts: dict[int, list[int]] = {}  # of transparent images, on each background

    def run(self) -> Tensor:
        self._decode(range(len(self.files)))
        self._choose_background()
        self._tell()
        return torch.from_numpy(self.pixels)

    def _decode(self, rows: Sequence[int]) -> None:
        def decode_some(first: int) -> None:
            for i in rows[first : first + _AT_ONCE]:
                self._decode_one(i)

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(decode_some, range(0, len(rows), _AT_ONCE)))

    def _decode_one(self, i: int) -> None:
        path, found = self.files[i], _open(self.files[i])
        if found.image.size != self.size:
            (width, height), (w, h) = self.size, found.image.size
            raise UsageError(
                f"{path} must be {width}x{height} pixels like the first image, got {w}x{h}; "
                f"resize the images first"
            )
        if found.several:
            self.several[i] = True
        if found.highest is not None:
            self.highest[i] = found.highest
        try:
            if _is_transparent(found.image):
                rgba = np.asarray(found.image.convert("RGBA"))
                self.contrasts[i] = [
                    _contrast(_composed(rgba, level)) for level in _BACKGROUNDS.values()
                ]
                array = _composed(rgba, self.background)
                array = array[..., 0] if self.gray else array
            else:
                array = np.asarray(found.image.convert("L" if self.gray else "RGB"))
        # Pillow cannot convert every color space that it reads, for example LAB.
        except ValueError as error:
            raise UsageError(f"{path} cannot be converted to RGB: {first_line(error)}") from error
        self.pixels[i] = array[None] if self.gray else array.transpose(2, 0, 1)

    def _choose_background(self) -> None:
        """Compose transparent images again if some vanish on the first background.

        White icons on white are the usual case.
        """
        if not self.contrasts:
            return
        rows = sorted(self.contrasts)
        contrasts = np.array([self.contrasts[i] for i in rows])  # [images, backgrounds]
        empty: NDArray[np.bool_] = np.all(contrasts <= _FLAT, axis=1)
        vanishes: NDArray[np.bool_] = (contrasts <= _FLAT) & ~empty[:, None]
        if empty.any():
            first = self.files[rows[int(empty.argmax())]]
            _warn(
                f"{self.name}: some transparent images show one color throughout ({empty.sum()}), "
                f"e.g. {first}"
            )
        titles = list(_BACKGROUNDS)
        first = self.files[rows[int(vanishes[:, 0].argmax())]]
        chosen = next((k for k in range(len(titles)) if not vanishes[:, k].any()), None)
        if chosen is None:
            raise UsageError(
                f"{self.name}: transparent images must show something on {', '.join(titles[:-1])} "
                f"or {titles[-1]}, got some that vanish on each of them, on {titles[0]} e.g. "
                f"{first}; compose the images first"
            )
        if chosen > 0:
            _warn(
                f"{self.name}: transparent images are composed on {titles[chosen]}, because on "
                f"{titles[0]} some vanish "
                f"({vanishes[:, 0].sum()} of {len(rows)}), e.g. {first}"
            )
            self.background = _BACKGROUNDS[titles[chosen]]
            self._decode(rows)

    def _tell(self) -> None:
        if self.several:
            first = self.files[min(self.several)]
            _warn(
                f"{self.name}: the first frame is used of images with several frames "
                f"({len(self.several)}), e.g. {first}"
            )
        if self.highest:
            first, level = self.files[min(self.highest)], max(self.highest.values())
            if level < _FULL_RANGE:
                raise UsageError(
                    f"{self.name}: images of 16 bits per channel must use their range 0..65535, "
                    f"got none above {level}, e.g. {first}; scale the images to 8 bits first"
                )
            _warn(
                f"{self.name}: images of 16 bits per channel ({len(self.highest)}) are reduced to "
                f"8, e.g. {first}"
            )
