"""Helpers of the tests of imagefolder."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

Color = int | tuple[int, int, int]


def put(
    folder: Path, colors: list[Color], size: tuple[int, int] = (8, 6), suffix: str = ".png"
) -> list[Path]:
    """Images of one color each, width and height ``size``; their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for i, color in enumerate(colors):
        path = folder / f"{i}{suffix}"
        Image.new("L" if isinstance(color, int) else "RGB", size, color).save(path)
        paths.append(path)
    return paths


def two_classes(root: Path, test: str = "test", a: Color = 10, b: Color = 200) -> None:
    for part, count in (("train", 3), (test, 2)):
        put(root / part / "ant", [a] * count)
        put(root / part / "bee", [b] * count)
