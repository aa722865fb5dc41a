"""scikit-learn's 8×8 handwritten digits (UCI Optical Recognition of Handwritten Digits), embedded in that package."""

from __future__ import annotations

import torch

from pdd_fast.data.splits import Pixels

TEST_SHARE = 0.2


def read() -> Pixels:
    """1797 grey images; the last fifth of every class is the test set: the file is in the order of collection, so most
    of it was written by other people than the training images."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = torch.from_numpy(digits.images).float().div(16).unsqueeze(1)  # grey levels 0..16
    labels = torch.from_numpy(digits.target).long()
    test = torch.zeros(len(labels), dtype=torch.bool)
    for label in range(10):
        rows = (labels == label).nonzero().flatten()
        test[rows[len(rows) - round(TEST_SHARE * len(rows)) :]] = True
    return Pixels(tuple(map(str, range(10))), images[~test], labels[~test], images[test], labels[test])
