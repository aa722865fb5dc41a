"""scikit-learn's 8×8 handwritten digits (UCI Optical Recognition of Handwritten Digits), embedded
in that package.
"""

from __future__ import annotations

import torch

from pdd_fast.data.splits import Pixels, stratified_mask

TEST_SHARE = 0.2


def read() -> Pixels:
    """1797 gray images. The set comes without a split: a fifth of every class is the test set,
    drawn once for good.
    """
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = torch.from_numpy(digits.images).float().div(16).unsqueeze(1)  # gray levels 0..16
    labels = torch.from_numpy(digits.target).long()
    test = stratified_mask(labels, 10, TEST_SHARE)
    return Pixels(
        tuple(map(str, range(10))), images[~test], labels[~test], images[test], labels[test]
    )
