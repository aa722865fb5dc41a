"""Decode image files into pixels: formats, orientation, transparency and bit depth."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
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

from pdd_fast.runtime.errors import PddFastWarning, UsageError, first_line

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


def _warn(sentence: str) -> None:
    warnings.warn(sentence, PddFastWarning, stacklevel=4)


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
            "convert the images first"
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
                "resize the images first"
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
                f"{self.name}: transparent images must be visible on {', '.join(titles[:-1])} "
                f"or {titles[-1]}, got some that vanish on each, e.g. {first} on {titles[0]}; "
                "compose the images first"
            )
        if chosen > 0:
            _warn(
                f"{self.name}: transparent images are composed on {titles[chosen]}, because on "
                f"{titles[0]} some vanish ({vanishes[:, 0].sum()} of {len(rows)}), e.g. {first}"
            )
            self.background = _BACKGROUNDS[titles[chosen]]
            self._decode(rows)

    def _tell(self) -> None:
        if self.several:
            first = self.files[min(self.several)]
            _warn(
                f"{self.name}: only the first frame of images with several frames is used "
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
