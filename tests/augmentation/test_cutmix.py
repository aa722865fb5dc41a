"""CutMix: boxes, mixed labels, and several networks at once."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from pdd_fast.augmentation.cutmix import CutMix, CutMixParameters, label_weights


def mixed_batch(images: Tensor, labels: Tensor, cutmix: CutMix, seed: int) -> tuple[Tensor, Tensor]:
    H, W = images.shape[2:]
    parameters = cutmix.sample(len(images), (H, W), torch.Generator().manual_seed(seed))
    mixed, weights = parameters.apply(images[None], labels[None])
    return mixed[0], weights[0]


@given(st.integers(1, 9), st.integers(2, 9), st.integers(2, 9), st.integers(0, 1000))
def test_a_mixed_image_is_a_box_of_another_in_its_own_and_labels_follow_the_area(
    n: int, h: int, w: int, s: int
) -> None:
    images = torch.arange(1.0, n + 1).view(n, 1, 1, 1).expand(n, 2, h, w)
    labels = torch.eye(n)
    mixed, weights = mixed_batch(images, labels, CutMix(1.0), s)
    torch.testing.assert_close(weights.sum(1), torch.ones(n))
    changed = (mixed != images).any(0).any(0)
    if changed.any():  # one box, the same for all, filled by one other image each
        rows, columns = changed.any(1).nonzero().flatten(), changed.any(0).nonzero().flatten()
        assert int(changed.sum()) == len(rows) * len(columns)
        assert int(rows[-1] - rows[0]) == len(rows) - 1
        assert int(columns[-1] - columns[0]) == len(columns) - 1
        inside = mixed[:, :, rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
        assert torch.equal(inside, inside[:, :1, :1, :1].expand_as(inside))
        other = inside[:, 0, 0, 0].long() - 1
        assert sorted(other.tolist()) == list(range(n))
    # A label's share of a class is that class's share of the image's pixels.
    share = torch.stack([(mixed[:, 0] == k + 1).float().mean((1, 2)) for k in range(n)], 1)
    torch.testing.assert_close(weights, share)


def test_a_share_of_the_batches_is_mixed_and_the_others_stay_bit_for_bit() -> None:
    images, labels = torch.randn(6, 3, 5, 7), torch.rand(6, 4)
    batches = [mixed_batch(images, labels, CutMix(0.25), seed) for seed in range(200)]
    same = [bool(torch.equal(x, images) and torch.equal(y, labels)) for x, y in batches]
    # A mixed batch is unchanged if its box is empty or every image is its own partner (7 in 200).
    assert 0.65 < sum(same) / 200 < 0.9
    assert all(
        torch.equal(x, images) and torch.equal(y, labels)
        for x, y in (mixed_batch(images, labels, CutMix(0.0), seed) for seed in range(20))
    )


def test_networks_are_mixed_together_as_they_would_be_alone() -> None:
    images, labels = torch.randn(3, 4, 2, 6, 5), torch.rand(3, 4, 2)
    sampled = [
        CutMix(0.7).sample(4, (6, 5), torch.Generator().manual_seed(seed)) for seed in range(3)
    ]
    mixed, weights = CutMixParameters.cat(sampled).apply(images, labels)
    for k, own in enumerate(sampled):
        x, y = own.apply(images[k : k + 1], labels[k : k + 1])
        assert torch.equal(mixed[k], x[0])
        assert torch.equal(weights[k], y[0])


def test_labels_become_weights_and_weights_stay() -> None:
    weights = label_weights(torch.tensor([2, 0]), 3, torch.float64)
    assert torch.equal(weights, torch.tensor([[0, 0, 1], [1, 0, 0]], dtype=torch.float64))
    assert label_weights(weights, 3, torch.float32) is weights
