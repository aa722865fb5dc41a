"""Fingerprints of data, which identify them independently of place and name."""

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
    """Return a digest of decoded pixels, labels and class names as ``CONTENT-ORDER``.

    It covers both splits. CONTENT does not depend on the order of images, and ORDER is that of the
    training images: the same files under other names differ in ORDER alone. 50,000 + 10,000 images
    of 3×32×32 take 0.3 s on one core.
    """
    # macOS decomposes the characters of file names.
    classes = [unicodedata.normalize("NFC", name) for name in pixels.classes]
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
    """Return a digest of each image with its label."""
    found = []
    for image, label in zip(images.numpy(), labels.tolist(), strict=True):
        digest = hashlib.sha256(np.ascontiguousarray(image).data)
        digest.update(str(label).encode())
        found.append(digest.digest())
    return found


def identity(data: ImageData) -> dict[str, Any]:
    """Return the facts about the data that files derived from them store."""
    return {"data": data.name, "fingerprint": data.fingerprint, "classes": list(data.classes)}


def difference(stored: Mapping[str, Any], wanted: Mapping[str, Any], in_order: bool = False) -> str:
    """Return how stored data differ from the wanted data, as "<found>, not <wanted>".

    The result is "" if no difference is known. Folders are compared by fingerprint only. Sets with
    a name of their own, such as cifar10, are compared by name and fingerprint. Files that predate
    fingerprints are compared by name and classes.

    Args:
        stored: result of :func:`identity`, or a part of it.
        wanted: result of :func:`identity`, or a part of it.
        in_order: the order of the images must agree too, because files refer to images by position.
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
