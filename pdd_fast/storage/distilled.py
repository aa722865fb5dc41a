"""Distilled sets: synthetic images with everything that training on them needs."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import TensorDataset

from pdd_fast.augmentation.multi_formation import decode, decode_labels
from pdd_fast.data.normalization import Normalization
from pdd_fast.data.splits import ImageData
from pdd_fast.data.whitening import Whitening
from pdd_fast.networks.arguments import as_labels
from pdd_fast.runtime.errors import UsageError
from pdd_fast.runtime.files import read_tensors, save_tensors
from pdd_fast.runtime.paths import expanded


class DistilledUnion(TensorDataset):
    """Images and labels of the first stages, as a dataset of (image, label) pairs.

    Args:
        images: [n, C, H, W].
        labels: int64 [n] or float [n, classes].
        learning_rate: learning rate to train with.
    """

    def __init__(self, images: Tensor, labels: Tensor, learning_rate: float) -> None:
        super().__init__(images, labels)
        self.images, self.labels, self.learning_rate = images, labels, learning_rate


# Normalized pixels reach about 3, and whitened ones about 20.
_LARGEST = 32.0
_SLACK = 1e-3  # by which rounding may take probabilities out of [0, 1]


@dataclass(frozen=True, eq=False)  # comparing tensors gives no single truth value
class DistilledSet:
    """All stages of a distilled set.

    Labels of other types that mean class indices are converted to int64 [n].

    Raises:
        ValueError: shapes do not fit each other, stages have gaps, values are not finite, or a
            learning rate is not positive.

    Example:
        >>> import torch
        >>> import pdd_fast
        >>> from pdd_fast.data import Normalization
        >>> distilled = pdd_fast.DistilledSet(
        ...     images=torch.randn(4, 1, 8, 8),
        ...     labels=torch.tensor([0, 1, 0, 1]),
        ...     stage=torch.tensor([1, 1, 2, 2]),
        ...     learning_rates=torch.tensor([0.01, 0.02]),
        ...     normalization=Normalization.identity(1),
        ... )
        >>> distilled
        DistilledSet(unknown data: 4 images of 1×8×8 in 2 stages)
        >>> len(distilled.union(1)), len(distilled.union())
        (2, 4)
    """

    # [n, C, H, W] float32, as stored: normalized (and whitened) like the training data
    images: Tensor
    labels: Tensor  # int64 [n], or float [n, classes]
    stage: Tensor  # int64 [n], 1-based
    learning_rates: Tensor  # [S] float32, learning rate to train with on each stage's union
    normalization: Normalization
    # data, fingerprint, classes, augmentation, network, labels, base, seed
    metadata: dict[str, Any] = field(default_factory=dict)
    whitening: Whitening | None = None  # None: the images are not whitened
    # Every stored image holds factor² smaller ones, which networks are trained on once enlarged.
    factor: int = 1

    def __post_init__(self) -> None:
        if self.images.dim() != 4:
            raise ValueError(
                f"DistilledSet: images must have shape [n, C, H, W], got {tuple(self.images.shape)}"
            )
        n, channels = self.images.shape[:2]
        _check_normalized(self.images)
        labels = as_labels("DistilledSet", self.labels, torch.float32)
        hard = labels.dtype == torch.int64 and labels.dim() == 1
        if not hard and not (labels.is_floating_point() and labels.dim() == 2):
            found = f"{labels.dtype} of shape {tuple(labels.shape)}"
            raise ValueError(
                "DistilledSet: labels must be int64 [n] or floating-point [n, classes], got "
                f"{found}"
            )
        # One-hot rows of integers say no more than the class, so they become class indices.
        if not hard:
            labels = labels.float() if self.labels.is_floating_point() else labels.argmax(1)
        object.__setattr__(self, "images", self.images.float())
        object.__setattr__(self, "labels", labels)
        for name in ("stage", "learning_rates"):
            if getattr(self, name).dim() != 1:
                found = f"shape {tuple(getattr(self, name).shape)}"
                raise ValueError(f"DistilledSet: {name} must be a vector, got {found}")
        for name in ("labels", "stage"):
            if len(getattr(self, name)) != n:
                raise ValueError(
                    f"DistilledSet: {name} must have {n} rows, got {len(getattr(self, name))}"
                )
        for name in ("mean", "std"):
            if len(getattr(self.normalization, name)) != channels:
                found = getattr(self.normalization, name)
                raise ValueError(
                    f"DistilledSet: normalization {name} must have {channels} numbers, got {found}"
                )
        if self.whitening is not None and self.whitening.image_shape != tuple(
            self.images.shape[1:]
        ):
            expected = tuple(self.images.shape[1:])
            raise ValueError(
                f"DistilledSet: whitening must be for {expected}, got {self.whitening.image_shape}"
            )
        if not 1 <= self.factor <= min(self.images.shape[2:]):
            most = min(self.images.shape[2:])
            raise ValueError(f"DistilledSet: factor must lie in [1, {most}], got {self.factor}")
        present = sorted(set(self.stage.tolist()))
        if present != list(range(1, self.stages + 1)):
            raise ValueError(
                f"DistilledSet: stage must number 1..{self.stages} without gaps, got {present}"
            )
        for name in ("images", "labels", "learning_rates"):
            if not bool(torch.isfinite(getattr(self, name)).all()):
                raise ValueError(f"DistilledSet: {name} must be finite, got NaN or infinity")
        if not bool((self.learning_rates > 0).all()):
            raise ValueError(
                f"DistilledSet: learning_rates must be above 0, got {self.learning_rates.tolist()}"
            )
        classes = self.metadata.get("classes")
        if reason := labels_outside(
            self.labels, len(classes) if isinstance(classes, list) else None
        ):
            raise ValueError(f"DistilledSet: {reason}")

    def __repr__(self) -> str:
        shape = "×".join(map(str, self.images.shape[1:]))
        name = self.metadata.get("data", "unknown data")
        return f"DistilledSet({name}: {len(self.images)} images of {shape} in {self.stages} stages)"

    @property
    def stages(self) -> int:
        """Number of stages."""
        return len(self.learning_rates)

    def union(self, stage: int | None = None, raw: bool = False) -> DistilledUnion:
        """Return the images of stages 1..``stage`` as a ``torch.utils.data.Dataset``.

        It has a ``learning_rate`` to train with.

        Args:
            stage: last stage; None: all stages.
            raw: return the images as stored. Otherwise, if ``factor`` is not 1, return the factor²
                enlarged images that each of them holds, which are the ones to train on.
        """
        last = self._check_stage(self.stages if stage is None else stage)
        return self._part(self.stage <= last, last, raw)

    def subset(self, stage: int, raw: bool = False) -> DistilledUnion:
        """Return the images of stage ``stage`` alone.

        Args:
            stage: number of the stage, from 1.
            raw: as for :meth:`union`.
        """
        return self._part(self.stage == self._check_stage(stage), stage, raw)

    def _part(self, rows: Tensor, last: int, raw: bool) -> DistilledUnion:
        images, labels, factor = self.images[rows], self.labels[rows], 1 if raw else self.factor
        lr = float(self.learning_rates[last - 1])
        return DistilledUnion(decode(images, factor), decode_labels(labels, factor), lr)

    def _check_stage(self, stage: int) -> int:
        if not 1 <= stage <= self.stages:
            raise ValueError(f"DistilledSet: stage must lie in [1, {self.stages}], got {stage}")
        return stage

    def pixels(self) -> Tensor:
        """Return the stored images [n, C, H, W] as pixels, clipped to [0, 1].

        Whitening and normalization are undone.
        """
        images = self.images if self.whitening is None else self.whitening.invert(self.images)
        return self.normalization.invert(images).clamp(0, 1)

    def transform(self, pixels: Tensor) -> Tensor:
        """Return pixels as a network trained on these images expects them.

        Args:
            pixels: [n, C, H, W] in [0, 1], for example of the test set.

        Returns:
            [n, C, H, W], normalized and, if the set's images are, whitened.
        """
        images = self.normalization.apply(pixels)
        return images if self.whitening is None else self.whitening.apply(images)

    def is_seen_as(self, data: ImageData) -> bool:
        """Return whether :meth:`transform` and ``data`` make the same images of pixels.

        Rounding does not count.
        """
        if not self.normalization.is_close(data.normalization):
            return False
        if self.whitening is None or data.whitening is None:
            return self.whitening is data.whitening
        return self.whitening.is_close(data.whitening)

    def save(self, path: str | Path) -> None:
        """Write a safetensors file; equal sets give equal bytes."""
        tensors = {
            "images": self.images,
            "labels": self.labels,
            "stage": self.stage,
            "learning_rates": self.learning_rates,
            **({} if self.whitening is None else self.whitening.tensors()),
        }
        own = {"normalization": self.normalization.to_dict(), "factor": self.factor}
        save_tensors(expanded(path), tensors, self.metadata | own)


def _check_normalized(images: Tensor) -> None:
    """Raise ValueError if ``images`` are pixels from 0 to 255, as integers or whole floats."""
    kind = "" if images.is_floating_point() else str(images.dtype)
    if (
        not kind
        and images.numel() > 0
        and float(images.amin()) >= 0
        and _LARGEST < float(images.amax()) < math.inf
    ):
        kind = "whole numbers from 0 on" if bool((images == images.round()).all()) else ""
    if kind:
        raise ValueError(
            "DistilledSet: images must be floating-point and normalized like the training data, "
            f"got {kind}; divide pixels by 255, then apply the normalization "
            "(Normalization.apply) and the whitening, if there is one"
        )


def labels_outside(labels: Tensor, classes: int | None) -> str:
    """Return what is wrong with labels, or "" if nothing is.

    Class indices must be in range. Probabilities must lie in [0, 1] and have one column per class.

    Args:
        labels: as :func:`~pdd_fast.networks.arguments.as_labels` returns them.
        classes: number of classes; None: unknown.
    """
    if len(labels) == 0:
        return ""
    low, high = labels.amin().item(), labels.amax().item()
    if labels.dim() == 1:
        bound = "from 0 on" if classes is None else f"in [0, {classes})"
        return (
            ""
            if low >= 0 and (classes is None or high < classes)
            else f"labels must lie {bound}, got {low}..{high}"
        )
    if classes is not None and labels.shape[1] != classes:
        return f"labels must have {classes} columns, one for each class, got {labels.shape[1]}"
    if low < -_SLACK or high > 1 + _SLACK:
        return (
            f"labels must be probabilities in [0, 1], got {low:.4g}..{high:.4g}; if they are "
            "logits, give their "
            'softmax (labels="logits" of read_mtt)'
        )
    return ""


def preprocessing(images: DistilledSet | ImageData) -> str:
    """Return a description of how ``images`` are made from pixels."""
    if images.whitening is None:
        return f"normalization {images.normalization} and without whitening"
    epsilon = f"{images.whitening.epsilon:g}"
    return f"normalization {images.normalization} and then ZCA whitening with epsilon {epsilon}"


def load_distilled(path: str | Path) -> DistilledSet:
    """Return the distilled set in a file, or in the run directory that holds one.

    Args:
        path: a safetensors file, or a directory with ``distilled.safetensors``.

    Raises:
        UsageError: there is no such file, or it is damaged.

    Example:
        >>> import torch
        >>> import pdd_fast
        >>> from pdd_fast.data import Normalization
        >>> distilled = pdd_fast.DistilledSet(
        ...     images=torch.randn(2, 1, 8, 8),
        ...     labels=torch.tensor([0, 1]),
        ...     stage=torch.tensor([1, 1]),
        ...     learning_rates=torch.tensor([0.01]),
        ...     normalization=Normalization.identity(1),
        ... )
        >>> distilled.save("set.safetensors")
        >>> len(pdd_fast.load_distilled("set.safetensors").union())
        2
    """
    file = expanded(path)
    if file.is_dir():
        file = file / "distilled.safetensors"
    tensors, metadata = read_tensors(file)
    names = ("images", "labels", "stage", "learning_rates")
    missing = [name for name in names if name not in tensors]
    missing += [] if "normalization" in metadata else ["normalization"]
    if missing:
        raise UsageError(f"{file} is not a distilled set: it lacks {', '.join(missing)}")
    try:
        normalization = Normalization.from_dict(metadata.pop("normalization"))
        factor = int(metadata.pop("factor", 1))  # older sets have none
        images, labels, stage, lrs = (tensors[name] for name in names)
        whitening = Whitening.of_tensors(tensors)
        return DistilledSet(images, labels, stage, lrs, normalization, metadata, whitening, factor)
    except (KeyError, TypeError, ValueError) as error:
        raise UsageError(f"{file} is not a distilled set: {error}") from error
