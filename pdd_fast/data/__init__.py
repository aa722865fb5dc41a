"""Data sets, each as a few tensors in memory."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

from torch import Tensor

from pdd_fast.config import CHOICES
from pdd_fast.data.normalisation import Normalisation
from pdd_fast.data.splits import ImageData, Split, prepare, require_images_per_class
from pdd_fast.data.whitening import Whitening
from pdd_fast.errors import UsageError, nearest
from pdd_fast.files import readable

__all__ = ["NAMES", "ImageData", "Normalisation", "Split", "Whitening", "load", "require_images_per_class"]

NAMES = ("digits", "cifar10", "cifar100", "mnist", "fashionmnist", "svhn")
_FOLDER = "imagefolder:"


def load(
    name: str,
    data_dir: str = "data",
    validation_fraction: float = 0.1,
    whitening: str = "none",
    keep_whitening: Path | None = None,
) -> ImageData:
    """A data set by name.

    Args:
        name: one of :data:`NAMES`, or ``imagefolder:DIR`` with DIR/train/<class>/ and DIR/test/<class>/
            (or val/, valid/, validation/).
        data_dir: where torchvision's files lie.
        validation_fraction: share of every class's training images that is held out, in (0, 1).
        whitening: "none" or "zca".
        keep_whitening: a file that the whitening is read from where it is there, and written to where it is not:
            fitting takes 15 seconds for 50,000 images of 3×32×32 on two cores, and many minutes for 3×64×64.

    Raises:
        UsageError: an unknown name; files that are missing, unreadable or do not fit together.
    """
    if name == "digits":
        from pdd_fast.data.digits import read

        pixels = read()
    elif name in NAMES:
        from pdd_fast.data.torchvision_sets import read as read_torchvision

        pixels = read_torchvision(name, data_dir)
    elif name.startswith(_FOLDER):
        from pdd_fast.data.imagefolder import read as read_folder

        folder = name.removeprefix(_FOLDER)
        pixels = read_folder(folder)
        # The name goes into distilled sets that are given away: the folder's own, not where it lies on this disk.
        name = _FOLDER + readable(Path(folder).expanduser().resolve().name)
    else:
        known = f"{', '.join(NAMES)} or imagefolder:DIR"
        raise UsageError(f"dataset must be one of {known}, got {name!r}{nearest(name, NAMES)}")
    if whitening not in CHOICES["whitening"]:
        raise UsageError(f"whitening must be {' or '.join(CHOICES['whitening'])}, got {whitening!r}")
    whiten = partial(_whitening, name, keep_whitening) if whitening == "zca" else None
    return prepare(name, pixels, validation_fraction, whiten)


def _whitening(name: str, file: Path | None, pixels: Tensor, normalise: Callable[[Tensor], Tensor]) -> Whitening:
    """Fitted to the images that ``normalise`` makes of ``pixels``, or what was fitted before and kept in ``file``."""
    if file is None or not file.exists():
        fitted = Whitening.fit(pixels, convert=normalise)
        if file is not None:
            fitted.save(file, {"data": name})
        return fitted
    kept, metadata = Whitening.load(file)
    found, wanted = (metadata.get("data"), kept.image_shape), (name, tuple(pixels.shape[1:]))
    if found != wanted:
        raise UsageError(f"{file} must be for {wanted[0]} {wanted[1]}, got one for {found[0]} {found[1]}")
    return kept
