"""scikit-learn's 8×8 handwritten digits, embedded in that package.

Source: UCI Optical Recognition of Handwritten Digits.
"""

from __future__ import annotations

import torch

from pdd_fast.data.splits import Pixels, stratified_mask

TEST_SHARE = 0.2


def read() -> Pixels:
    """Return 1797 gray images.

    The set comes without a split. A fifth of every class, chosen once and fixed, is the test set.
    """
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = torch.from_numpy(digits.images).float().div(16).unsqueeze(1)  # gray levels 0..16
    labels = torch.from_numpy(digits.target).long()
    test = stratified_mask(labels, 10, TEST_SHARE)
    return Pixels(
        tuple(map(str, range(10))), images[~test], labels[~test], images[test], labels[test]
    )
