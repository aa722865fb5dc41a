"""Datasets that torchvision reads."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from pdd_fast.data.splits import Pixels
from pdd_fast.runtime.errors import UsageError, first_line
from pdd_fast.runtime.torchvision_import import load

_CLASSES = {
    "cifar10": "CIFAR10",
    "cifar100": "CIFAR100",
    "mnist": "MNIST",
    "fashionmnist": "FashionMNIST",
    "svhn": "SVHN",
}


def read(name: str, data_dir: str) -> Pixels:
    """Return both splits of a torchvision dataset.

    Args:
        name: one of pdd_fast.data.NAMES except "digits".
        data_dir: directory of the files.

    Raises:
        UsageError: torchvision does not import, or the files are not in ``data_dir``.
    """
    datasets = load("datasets", f"dataset {name!r}", ", or use imagefolder:DIR")
    kind = getattr(datasets, _CLASSES[name])
    train, test = (_load(kind, name, data_dir, first) for first in (True, False))
    classes = tuple(str(c) for c in getattr(train, "classes", range(10)))
    return Pixels(classes, _images(train), _labels(train), _images(test), _labels(test))


def _load(kind: Any, name: str, data_dir: str, train: bool) -> Any:
    split = {"split": "train" if train else "test"} if name == "svhn" else {"train": train}
    try:
        return kind(data_dir, download=False, **split)
    # MNIST's files have no checksums: the reader raises any kind of error on damaged ones.
    except Exception as error:
        argument = f"split={split['split']!r}" if name == "svhn" else f"train={train}"
        raise UsageError(
            f"dataset {name!r} is missing or incomplete in {data_dir!r} ({first_line(error)}); "
            "choose another --data-dir, or download it once with "
            f"torchvision.datasets.{kind.__name__}({data_dir!r}, {argument}, download=True)"
        ) from error


def _images(dataset: Any) -> Tensor:
    """Return uint8 [n, C, H, W] from [n, H, W], [n, H, W, C] or [n, C, H, W]."""
    images = torch.as_tensor(np.asarray(dataset.data), device="cpu")
    if images.dim() == 3:
        return images.unsqueeze(1)
    return images.permute(0, 3, 1, 2).contiguous() if images.shape[-1] in (1, 3) else images


def _labels(dataset: Any) -> Tensor:
    labels = dataset.targets if hasattr(dataset, "targets") else dataset.labels
    return torch.as_tensor(np.asarray(labels), device="cpu").long()
