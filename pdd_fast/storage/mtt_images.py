"""Distilled images in the format of MTT's scripts, here with a folder per stage.

The scripts store images_best.pt [n, C, H, W] and labels_best.pt [n]. These files do not say how to
use the images, and people got accuracies that differ from the published ones. This module adds that
information in settings.json.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pdd_fast.data.normalization import Normalization
from pdd_fast.data.whitening import Whitening
from pdd_fast.runtime.errors import UsageError
from pdd_fast.runtime.files import atomic_path, read_pickled_tensors, write_json
from pdd_fast.runtime.paths import expanded
from pdd_fast.storage.distilled import DistilledSet

IMAGES, LABELS, SETTINGS = "images_best.pt", "labels_best.pt", "settings.json"


def write_mtt(distilled: DistilledSet, folder: str | Path, raw: bool = False) -> list[Path]:
    """Write stage-1/images_best.pt, stage-1/labels_best.pt, ... and settings.json.

    Images are written as networks see them (normalized and, if the set's are, whitened), as the
    scripts expect.

    Args:
        distilled: the set.
        folder: created if it is missing.
        raw: write multi-formation images as stored. Otherwise write the enlarged images that they
            hold, as the scripts need them.

    Returns:
        The files.

    Raises:
        UsageError: the folder is not empty.
    """
    folder = expanded(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UsageError(f"{folder} exists and is not an empty folder; choose another")
    written = []
    for stage in range(1, distilled.stages + 1):
        subset = distilled.subset(stage, raw)
        for name, tensor in ((IMAGES, subset.images), (LABELS, subset.labels)):
            path = folder / f"stage-{stage}" / name
            with atomic_path(path) as temporary:
                # Cloned, because a view of a larger tensor would be stored with all of it.
                torch.save(tensor.clone(), temporary)
            written.append(path)
    settings: dict[str, Any] = {
        "learning_rates": distilled.learning_rates.tolist(),
        "normalization": distilled.normalization.to_dict(),
        "whitening": "none" if distilled.whitening is None else "zca",
        "whitening_epsilon": None if distilled.whitening is None else distilled.whitening.epsilon,
        "factor": distilled.factor if raw else 1,
    }
    known = ("data", "fingerprint", "classes", "labels", "augmentation", "network")
    settings |= {key: distilled.metadata[key] for key in known if key in distilled.metadata}
    write_json(folder / SETTINGS, settings)
    return [*written, folder / SETTINGS]


def read_mtt(
    folders: Sequence[str | Path],
    learning_rates: Sequence[float],
    normalization: Normalization,
    whitening: Whitening | None = None,
    metadata: dict[str, Any] | None = None,
    factor: int = 1,
    labels: str = "auto",
) -> DistilledSet:
    """Return a distilled set from the files of MTT's scripts.

    Args:
        folders: one folder with images_best.pt and labels_best.pt per stage.
        learning_rates: learned learning rate of each stage; the scripts print them.
        normalization: normalization under which the images were learned, from
            ``pdd_fast.data.load`` of the same data. The scripts of MTT and PDD correspond to
            ``whitening="zca"`` if they used ZCA, and else to ``normalization="published"``.
        whitening: whitening under which the images were learned, from the same call.
        metadata: further facts, as in :class:`DistilledSet`; runs are compared by "data".
        factor: factor in settings.json, for images written as stored.
        labels: content of labels_best.pt: "auto" for class indices or probabilities, "logits" for
            logits, whose softmax is taken.

    Raises:
        UsageError: a file is missing, damaged or holds something else (code is never run), or the
            parts do not fit each other.
    """
    if labels not in ("auto", "logits"):
        raise UsageError(f"labels must be auto or logits, got {labels!r}")
    images, targets, stages = [], [], []
    for number, folder in enumerate(map(expanded, folders), start=1):
        own = _tensor(folder / IMAGES)
        images.append(own.float() if own.is_floating_point() else own)
        targets.append(_targets(folder / LABELS, labels))
        stages.append(torch.full((len(own),), number, device="cpu"))
    lrs = torch.tensor(list(learning_rates), device="cpu").float()
    try:
        return DistilledSet(
            torch.cat(images),
            torch.cat(targets),
            torch.cat(stages),
            lrs,
            normalization,
            dict(metadata or {}),
            whitening,
            factor,
        )
    except (ValueError, RuntimeError) as error:  # torch.cat: different shapes, or nothing to join
        raise UsageError(
            f"{', '.join(map(str, folders)) or 'no folders'} hold no distilled set: {error}"
        ) from error


def _targets(path: Path, kind: str) -> Tensor:
    """Return the labels in a file, and the softmax for logits [n, classes]."""
    found = _tensor(path)
    if kind != "logits":
        return found
    if found.dim() != 2 or not found.is_floating_point() or found.shape[1] < 2:
        shape = tuple(found.shape)
        raise UsageError(
            f"{path} must hold logits, floating-point [n, classes], got {found.dtype} of shape "
            f"{shape}"
        )
    return found.float().softmax(1)


def _tensor(path: Path) -> Tensor:
    found = read_pickled_tensors(path)
    if not isinstance(found, Tensor) or found.dim() == 0:
        raise UsageError(
            f"{path} must hold a tensor with a row for each image, got {type(found).__name__}"
        )
    return found.detach()
