"""Datasets, each as a few tensors in memory."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from pdd_fast.data.fingerprint import difference, fingerprint
from pdd_fast.data.normalization import Normalization, unit
from pdd_fast.data.splits import (
    Fit,
    ImageData,
    Pixels,
    Split,
    normalized,
    prepare,
    require_images_per_class,
)
from pdd_fast.data.whitening import EPSILON, Whitening
from pdd_fast.runtime.errors import UsageError, nearest
from pdd_fast.runtime.paths import FOLDER, expanded, short_dataset
from pdd_fast.settings import choices

__all__ = [
    "NAMES",
    "ImageData",
    "Normalization",
    "Split",
    "Whitening",
    "load",
    "require_images_per_class",
]

NAMES = ("digits", "cifar10", "cifar100", "mnist", "fashionmnist", "svhn")


def load(
    name: str,
    data_dir: str = "data",
    validation_fraction: float = 0.1,
    whitening: str = "none",
    keep_whitening: Path | None = None,
    normalization: str = "fitted",
    whitening_epsilon: float = EPSILON,
) -> ImageData:
    """Return a dataset by name.

    Args:
        name: one of :data:`NAMES`, or ``imagefolder:DIR`` with DIR/train/<class>/ and
            DIR/test/<class>/ (or val/, valid/, validation/).
        data_dir: directory of torchvision's files.
        validation_fraction: share of every class's training images in the validation split, in (0,
            1).
        whitening: "none", or "zca" for ZCA whitening of pixels in [0, 1], which are then not
            normalized.
        keep_whitening: file that the whitening is read from if it exists, and written to if not.
            Fitting takes 14 s for 50,000 images of 3×32×32 on two cores, and many minutes for
            3×64×64. A file of an earlier version is for normalized images and is applied to those.
        normalization: constants for images that are not whitened: "fitted" to all training images,
            or "published" (CIFAR-10, CIFAR-100, and ImageNet's for folders of its classes, such as
            Tiny ImageNet).
        whitening_epsilon: value added to every eigenvalue of the covariance, above 0.

    Raises:
        UsageError: the name is unknown, files are missing, unreadable or inconsistent, or no
            constants were published for the dataset.
    """
    if name == "digits":
        from pdd_fast.data.digits import read

        pixels = read()
    elif name in NAMES:
        from pdd_fast.data.torchvision_sets import read as read_torchvision

        pixels = read_torchvision(name, str(expanded(data_dir)))
    elif name.startswith(FOLDER):
        from pdd_fast.data.imagefolder import read as read_folder

        pixels = read_folder(name.removeprefix(FOLDER))
        # Distilled sets that are shared hold the name, so it is the folder's own, without its place
        # on this disk.
        name = short_dataset(name)
    else:
        known = f"{', '.join(NAMES)} or imagefolder:DIR"
        raise UsageError(f"dataset must be one of {known}, got {name!r}{nearest(name, NAMES)}")
    for setting, value in (("whitening", whitening), ("normalization", normalization)):
        if value not in choices(setting):
            raise UsageError(f"{setting} must be {' or '.join(choices(setting))}, got {value!r}")
    if not 0 < whitening_epsilon < math.inf:
        raise UsageError(
            f"whitening_epsilon must be a finite number above 0, got {whitening_epsilon}"
        )
    mark = fingerprint(pixels)
    fit: Fit = normalized
    whose = {"data": name, "fingerprint": mark, "classes": list(pixels.classes)}
    if whitening == "zca":
        fit = partial(_whitened, whose, keep_whitening, whitening_epsilon)
    elif normalization == "published":
        fit = partial(_published, _constants(name, pixels))
    return replace(prepare(name, pixels, validation_fraction, fit), fingerprint=mark)


def _constants(name: str, pixels: Pixels) -> Normalization:
    found = Normalization.published(name, pixels.classes, pixels.train.shape[1])
    if found is None:
        raise UsageError(
            f"normalization must be fitted for {name}, which has no published constants, got "
            "published"
        )
    return found


def _published(constants: Normalization, pixels: Tensor) -> tuple[Normalization, None]:
    return constants, None


def _whitened(
    whose: dict[str, Any], file: Path | None, epsilon: float, pixels: Tensor
) -> tuple[Normalization, Whitening]:
    """Return the whitening of ``pixels`` in [0, 1], read from ``file`` or fitted.

    Args:
        whose: identity of the data (:func:`pdd_fast.data.fingerprint.identity`).
        file: file to read from, or to write to if it does not exist; None: neither.
        epsilon: value added to every eigenvalue.
        pixels: [n, C, H, W].
    """
    shape = tuple(pixels.shape[1:])
    if file is None or not file.exists():
        unchanged, fitted = (
            Normalization.identity(shape[0]),
            Whitening.fit(pixels, epsilon, convert=unit),
        )
        if file is not None:
            fitted.save(file, whose | {"normalization": unchanged.to_dict()})
        return unchanged, fitted
    kept, metadata = Whitening.load(file)
    if kept.image_shape != shape:
        found = f"{metadata.get('data')} {kept.image_shape}"
        raise UsageError(f"{file} must be for {whose['data']} {shape}, got one for {found}")
    if reason := difference(metadata, whose):
        raise UsageError(f"{file} must be for the run's data, got one for {reason}")
    if kept.epsilon != epsilon:
        raise UsageError(
            f"whitening_epsilon must be {kept.epsilon:g} as in {file}, got {epsilon:g}; choose "
            "another --run-dir"
        )
    # An earlier version wrote the file, and its runs continue as they began.
    if "normalization" not in metadata:
        return Normalization.fit(pixels), kept
    try:
        return Normalization.from_dict(metadata["normalization"]), kept
    except (KeyError, TypeError, ValueError) as error:
        raise UsageError(
            f"{file} is not a whitening file: its normalization is damaged ({error!r})"
        ) from error
