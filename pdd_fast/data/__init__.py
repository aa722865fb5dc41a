"""Data sets, each as a few tensors in memory."""

from __future__ import annotations

from pathlib import Path

from pdd_fast.data.normalisation import Normalisation
from pdd_fast.data.splits import ImageData, Split, prepare, require_images_per_class
from pdd_fast.errors import UsageError, nearest

__all__ = ["NAMES", "ImageData", "Normalisation", "Split", "load", "require_images_per_class"]

NAMES = ("digits", "cifar10", "cifar100", "mnist", "fashionmnist", "svhn")
_FOLDER = "imagefolder:"


def load(name: str, data_dir: str = "data", validation_fraction: float = 0.1) -> ImageData:
    """A data set by name.

    Args:
        name: one of :data:`NAMES`, or ``imagefolder:DIR`` with DIR/train/<class>/ and DIR/test/<class>/ (or DIR/val).
        data_dir: where torchvision's files lie.
        validation_fraction: share of every class's training images that is held out, in (0, 1).

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
        name = _FOLDER + Path(folder).expanduser().resolve().name
    else:
        known = f"{', '.join(NAMES)} or imagefolder:DIR"
        raise UsageError(f"dataset must be one of {known}, got {name!r}{nearest(name, NAMES)}")
    return prepare(name, pixels, validation_fraction)
