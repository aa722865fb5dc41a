"""Folders of images: what is read from good ones, and what is said about bad ones."""

from __future__ import annotations

import re
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from imagefolder_support import two_classes
from PIL import Image

from pdd_fast.data.imagefolder import read as read_folder
from pdd_fast.runtime.errors import PddFastWarning, UsageError


def icon(path: Path, color: tuple[int, int, int], kind: str = "RGBA") -> None:
    """A shape of one color, 2×3 pixels of 8×6, on nothing."""
    alpha = np.zeros((6, 8), dtype=np.uint8)
    alpha[2:4, 3:6] = 255
    path.parent.mkdir(parents=True, exist_ok=True)
    if kind == "RGBA":
        Image.merge(
            "RGBA", [*(Image.new("L", (8, 6), level) for level in color), Image.fromarray(alpha)]
        ).save(path)
    elif kind == "LA":
        Image.merge("LA", [Image.new("L", (8, 6), color[0]), Image.fromarray(alpha)]).save(path)
    elif kind == "P":
        image = Image.fromarray(alpha // 255, "P")
        image.putpalette([*color, *color])  # both entries look alike; the first is transparent
        image.save(path, transparency=0)
    else:  # L or RGB with one transparent level
        shape = np.where(alpha[..., None] > 0, np.array(color), 77).astype(np.uint8)
        image = Image.fromarray(shape[..., 0] if kind == "L" else shape)
        image.save(path, transparency=77 if kind == "L" else (77, 77, 77))


def icons(root: Path, *colors: tuple[int, int, int], kind: str = "RGBA") -> None:
    for part in ("train", "test"):
        for name in ("ant", "bee"):
            for i, color in enumerate(colors):
                icon(root / part / name / f"{i}.png", color, kind)


# ---- transparency ----


@pytest.mark.parametrize("kind", ["RGBA", "LA", "P", "L", "RGB"])
def test_black_icons_are_composed_on_white(tmp_path: Path, kind: str) -> None:
    icons(tmp_path, (0, 0, 0), kind=kind)
    with warnings.catch_warnings(action="error"):
        found = read_folder(str(tmp_path))
    assert found.train.shape == (2, 1 if kind in ("LA", "L") else 3, 6, 8)
    assert (
        found.train[0, 0].tolist()
        == [[255] * 8] * 2 + [[255] * 3 + [0] * 3 + [255] * 2] * 2 + [[255] * 8] * 2
    )


@pytest.mark.parametrize("kind", ["RGBA", "LA", "P"])
def test_white_icons_are_composed_on_black_with_a_word(tmp_path: Path, kind: str) -> None:
    icons(tmp_path, (255, 255, 255), kind=kind)
    with pytest.warns(
        PddFastWarning,
        match=r"composed on black, because on white some vanish \(4 of 4\), e\.g\. .*0\.png",
    ):
        found = read_folder(str(tmp_path))
    assert found.test[1, 0, 2].tolist() == [0] * 3 + [255] * 3 + [0] * 2


def test_black_and_white_icons_are_composed_on_gray(tmp_path: Path) -> None:
    icons(tmp_path, (0, 0, 0), (250, 250, 250))  # almost white vanishes on white too
    with pytest.warns(
        PddFastWarning, match=r"composed on gray, because on white some vanish \(4 of 8\)"
    ):
        found = read_folder(str(tmp_path))
    assert found.train[:2, 0, 2].tolist() == [
        [128] * 3 + [level] * 3 + [128] * 2 for level in (0, 250)
    ]


def test_icons_that_vanish_on_every_background_are_refused(tmp_path: Path) -> None:
    icons(tmp_path, (0, 0, 0), (255, 255, 255), (128, 128, 128))
    with pytest.raises(
        UsageError,
        match=r"must be visible on white, black or gray, got .*, e\.g\. .*1\.png on white; ",
    ):
        read_folder(str(tmp_path))


# ---- orientation ----


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp", ".tif"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_are_turned_as_viewers_show_them(
    tmp_path: Path, suffix: str, orientation: int
) -> None:
    two_classes(tmp_path)
    # How a camera stores what is bright in the upper left corner, 8 wide and 6 high.
    stored = {
        1: None,
        2: "FLIP_LEFT_RIGHT",
        3: "ROTATE_180",
        4: "FLIP_TOP_BOTTOM",
        5: "TRANSPOSE",
        6: "ROTATE_90",
        7: "TRANSVERSE",
        8: "ROTATE_270",
    }[orientation]
    levels = np.full((6, 8), 20, dtype=np.uint8)
    levels[:2, :3] = 220
    image = Image.fromarray(levels)
    image = image if stored is None else image.transpose(Image.Transpose[stored])
    exif = Image.Exif()
    exif[0x0112] = orientation
    image.save(
        tmp_path / "train" / "ant" / f"a{suffix}",
        exif=exif,
        **({"lossless": True} if suffix == ".webp" else {}),
    )
    found = read_folder(str(tmp_path)).train[3, 0]
    assert found.shape == (6, 8)
    assert ((found > 120) == torch.from_numpy(levels > 120)).all()


def test_damaged_metadata_do_not_keep_an_image_from_being_read(tmp_path: Path) -> None:
    two_classes(tmp_path)
    Image.new("L", (8, 6), 33).save(
        tmp_path / "train" / "ant" / "a.png", exif=b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12garbage"
    )
    assert read_folder(str(tmp_path)).train[3].unique().tolist() == [33]


# ---- formats ----


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("a.jfif", "JPEG"),
        ("a.JPE", "JPEG"),
        ("a.jp2", "JPEG2000"),
        ("a.tga", "TGA"),
        ("a.qoi", "QOI"),
        ("a", "PNG"),
        ("a.img", "BMP"),
        ("a.pbm", "PPM"),
        ("a.avif", "AVIF"),
    ],
)
def test_whatever_pillow_reads_is_read(tmp_path: Path, name: str, kind: str) -> None:
    Image.init()
    if kind not in Image.SAVE:
        pytest.skip(f"this Pillow cannot write {kind}")
    two_classes(tmp_path, a=(10, 20, 30))
    Image.new(
        "1" if name == "a.pbm" else "RGB", (8, 6), 1 if name == "a.pbm" else (90, 90, 90)
    ).save(tmp_path / "train" / "ant" / name, kind)
    found = read_folder(str(tmp_path)).train[:, :, 0, 0]
    assert found.shape[0] == 7
    level = [row for row in found.tolist() if row not in ([10, 20, 30], [200] * 3)]
    assert level == [pytest.approx([255 if name == "a.pbm" else 90] * 3, abs=3)]


@pytest.mark.parametrize("name", ["a.heic", "a.svg", "a.npy", "a.mp4", "a.eps", "README"])
def test_files_that_pillow_cannot_read_are_refused_by_their_suffixes(
    tmp_path: Path, name: str
) -> None:
    two_classes(tmp_path)
    for part in ("ant", "bee"):
        (tmp_path / "train" / part / name).write_bytes(
            b"%!PS-Adobe-3.0 EPSF-3.0\n" if name == "a.eps" else b"what is this?"
        )
    suffix = re.escape(Path(name).suffix or "no suffix")
    with pytest.raises(
        UsageError,
        match=rf"train/ant must hold images that Pillow can read, got {suffix} \(1\), e\.g\. "
        rf"{name}",
    ):
        read_folder(str(tmp_path))


@pytest.mark.parametrize("kind", ["GIF", "TIFF", "WEBP", "PNG"])
def test_of_several_frames_the_first_is_taken_with_a_word(tmp_path: Path, kind: str) -> None:
    two_classes(tmp_path, a=(10, 20, 30))
    frames = [Image.new("RGB", (8, 6), color) for color in ((250, 0, 0), (0, 250, 0), (0, 0, 250))]
    options = {"lossless": True} if kind == "WEBP" else {}
    frames[0].save(
        tmp_path / "test" / "ant" / f"z.{kind}",
        kind,
        save_all=True,
        append_images=frames[1:],
        **options,
    )
    with pytest.warns(
        PddFastWarning,
        match=r"only the first frame of images with several frames is used \(1\), "
        rf"e\.g\. .*z\.{kind}",
    ):
        found = read_folder(str(tmp_path))
    assert found.test[2, :, 3, 3].tolist() == [250, 0, 0]


def test_inks_become_colors(tmp_path: Path) -> None:
    two_classes(tmp_path, a=(10, 20, 30))
    Image.new("CMYK", (8, 6), (255, 0, 0, 0)).save(
        tmp_path / "train" / "ant" / "a.jpg", quality=100
    )
    assert read_folder(str(tmp_path)).train[3, :, 2, 2].tolist() == pytest.approx(
        [0, 255, 255], abs=3
    )
