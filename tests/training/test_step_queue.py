"""Precomputed inputs of training steps."""

from __future__ import annotations

import pytest
import torch

from pdd_fast.augmentation.cutmix import CutMix, CutMixParameters
from pdd_fast.augmentation.dsa import DSA, augment
from pdd_fast.training import step_queue as queue

EVERYTHING = DSA("color_crop_cutout_flip_scale_rotate")


@pytest.mark.parametrize(
    "dsa", [EVERYTHING, DSA("flip_crop", mode="multiple"), DSA("none")], ids=["one", "all", "none"]
)
def test_a_step_that_counts_on_the_device_reads_the_same(dsa: DSA, device: torch.device) -> None:
    """A captured step, written twice, the second time with fewer steps."""
    images, labels = torch.randn(6, 2, 8, 6).to(device), torch.rand(2, 3, 4).to(device)
    generator, cutmix = torch.Generator().manual_seed(7), CutMix(0.8)
    queues = [
        queue.StepQueue(3, 2, 3, dsa, cutmix, torch.float32, device, counted)
        for counted in (True, False)
    ]
    for lrs in ((0.5, 0.25, 0.125), (2.0, 1.0)):
        drawn = [
            queue.Drawn(
                torch.randint(9, (2, 3)),
                [dsa.sample(3, (8, 6), generator) for _ in range(2)],
                CutMixParameters.cat([cutmix.sample(3, (8, 6), generator) for _ in range(2)]),
            )
            for _ in lrs
        ]
        for one in queues:
            one.write(drawn, lrs)
        for step, lr in zip(drawn, lrs, strict=True):
            expected = torch.cat(
                [augment(images[3 * k : 3 * k + 3], step.augmentations[k]) for k in range(2)]
            )
            assert step.cutmix is not None
            on_device = CutMixParameters(*(values.to(device) for values in step.cutmix))
            mixed = on_device.apply(expected.view(2, 3, 2, 8, 6), labels)
            for one in queues:
                assert torch.equal(one.indices().cpu(), step.indices.flatten())
                assert one.lr().dim() == 0
                assert float(one.lr()) == lr
                x = one.augment(images)
                assert torch.equal(x, expected)
                x, y = one.mix(x.view(2, 3, 2, 8, 6), labels)
                assert torch.equal(x, mixed[0])
                assert torch.equal(y, mixed[1])
                one.advance()
