"""Fingerprints: what tells whether two things were made of the same data, wherever these lie and
whatever they are called.
"""

from __future__ import annotations

import hashlib
import json
import unicodedata
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from pdd_fast.runtime.paths import FOLDER

if TYPE_CHECKING:
    from pdd_fast.data.splits import ImageData, Pixels


def fingerprint(pixels: Pixels) -> str:
    """Return a digest of decoded pixels, labels and class names, of both splits, as
    ``CONTENT-ORDER``.

    CONTENT does not depend on the order of images, ORDER does on that of the training images: the
    same files under other names differ in ORDER alone. 50,000 + 10,000 images of 3×32×32 take 0.3 s
    on one core.
    """
    classes = [
        unicodedata.normalize("NFC", name) for name in pixels.classes
    ]  # macOS decomposes names of files
    content, order = hashlib.sha256(json.dumps(classes).encode()), hashlib.sha256()
    train, test = (
        _digests(pixels.train, pixels.train_labels),
        _digests(pixels.test, pixels.test_labels),
    )
    for images, digests in ((pixels.train, train), (pixels.test, test)):
        content.update(f"{images.dtype} {tuple(images.shape)}".encode())
        content.update(b"".join(sorted(digests)))
    order.update(b"".join(train))
    return f"{content.hexdigest()[:32]}-{order.hexdigest()[:16]}"


def _digests(images: Tensor, labels: Tensor) -> list[bytes]:
    """A digest for each image with its label."""
    found = []
    for image, label in zip(images.numpy(), labels.tolist(), strict=True):
        digest = hashlib.sha256(np.ascontiguousarray(image).data)
        digest.update(str(label).encode())
        found.append(digest.digest())
    return found


def identity(data: ImageData) -> dict[str, Any]:
    """Return the facts about the data that files made of them hold."""
    return {"data": data.name, "fingerprint": data.fingerprint, "classes": list(data.classes)}


def difference(stored: Mapping[str, Any], wanted: Mapping[str, Any], in_order: bool = False) -> str:
    """Say how the data that a file was made of differ from those that are wanted, as "<found>, not
    <wanted>"; "" where nothing shows that they do.

    Folders are known by their fingerprint, whatever they are called; sets with a name of their own,
    such as cifar10, by both. Files that were written before there were fingerprints are known by
    name and classes.

    Args:
        stored, wanted: what :func:`identity` gave, or a part of it.
        in_order: the images must lie in the same order too, because they are known by their places.
    """
    found, name = stored.get("data"), wanted.get("data")
    marks = [str(each.get("fingerprint") or "") for each in (stored, wanted)]
    classes = [each.get("classes") for each in (stored, wanted)]
    listed = [each for each in classes if isinstance(each, list)]
    if len(listed) == 2 and len(listed[0]) != len(listed[1]):
        return f"{found} of {len(listed[0])} classes, not {name} of {len(listed[1])}"
    folders = any(str(each).startswith(FOLDER) for each in (found, name))
    if None not in (found, name) and found != name and not (all(marks) and folders):
        return f"{found}, not {name}"
    if len(listed) == 2 and listed[0] != listed[1]:
        odd, own = next((a, b) for a, b in zip(*listed, strict=True) if a != b)
        return f"{found} with class {odd!r}, not {name} with {own!r} in its place"
    if not all(marks):
        return ""
    (content, _, order), (own_content, _, own_order) = (mark.partition("-") for mark in marks)
    if content != own_content:
        return (
            f"{found} with other images or labels (fingerprint {content[:8]}), not {name} "
            f"({own_content[:8]})"
        )
    if in_order and order != own_order:
        return (
            f"{found} with the training images in another order, as under other file "
            f"names, not {name} as it is here"
        )
    return ""
