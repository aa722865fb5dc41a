"""Both engines' two computations, each against autograd and against finite differences."""

from __future__ import annotations

import pytest
import torch
from engines_support import BOTH
from torch import Tensor

import pdd_fast
from pdd_fast import engines
from pdd_fast.engines import Engine
from pdd_fast.networks.parameters import initial_parameters


class Several:
    """K networks with batches of their own."""

    def __init__(
        self, networks: int, dtype: torch.dtype, device: torch.device, soft: bool = False
    ) -> None:
        self.net = pdd_fast.ConvNet(2, 4, (9, 7), width=5, depth=2).to(dtype)
        self.theta = torch.stack([initial_parameters(self.net, k) for k in range(networks)])
        self.theta += 0.2 * torch.randn_like(self.theta)
        self.images = torch.randn(networks, 6, 2, 9, 7, dtype=dtype)
        self.labels = torch.randint(4, (networks, 6))
        if soft:
            self.labels = torch.randn(networks, 6, 4, dtype=dtype).softmax(2)
        self.net.to(device)
        self.theta, self.images, self.labels = (
            t.to(device) for t in (self.theta, self.images, self.labels)
        )

    def one_at_a_time(self, engine: Engine) -> tuple[Tensor, Tensor, Tensor]:
        alone = [
            engine.gradient(*each)
            for each in zip(self.theta, self.images, self.labels, strict=True)
        ]
        logits = torch.stack([engine.logits(theta, self.images[0]) for theta in self.theta])
        return torch.stack([a[0] for a in alone]), torch.stack([a[1] for a in alone]), logits


# ---- networks side by side ----


@BOTH
@pytest.mark.parametrize("soft", [False, True], ids=["hard", "soft"])
@pytest.mark.parametrize("networks", [1, 2, 3, 5])
@pytest.mark.parametrize(
    ("dtype", "precision"),
    [(torch.float64, "float32"), (torch.float32, "float32"), (torch.float32, "bfloat16")],
)
def test_networks_in_parallel_have_the_bits_of_one_at_a_time(
    name: str, networks: int, soft: bool, dtype: torch.dtype, precision: str, device: torch.device
) -> None:
    several = Several(networks, dtype, device, soft)
    engine = engines.choose(several.net, name, precision)
    losses, gradients = engine.gradients(several.theta, several.images, several.labels)
    logits = engine.logits_of(several.theta, several.images[0])
    assert losses.shape == (networks, 6)
    assert logits.shape == (networks, 6, 4)
    for found, expected in zip(
        (losses, gradients, logits), several.one_at_a_time(engine), strict=True
    ):
        assert found.dtype == dtype
        assert torch.equal(found, expected)


@BOTH
def test_networks_side_by_side_leave_their_arguments_alone(name: str) -> None:
    several = Several(3, torch.float32, torch.device("cpu"), soft=True)
    copies = [t.clone() for t in (several.theta, several.images, several.labels)]
    engine = engines.choose(several.net, name)
    losses, gradients = engine.gradients(several.theta, several.images, several.labels)
    assert not losses.requires_grad
    assert not gradients.requires_grad
    assert not engine.logits_of(several.theta, several.images[0]).requires_grad
    for tensor, copy in zip((several.theta, several.images, several.labels), copies, strict=True):
        assert torch.equal(tensor, copy)


@BOTH
def test_networks_that_do_not_fit_their_images_are_refused(name: str) -> None:
    several = Several(3, torch.float32, torch.device("cpu"))
    engine = engines.choose(several.net, name)
    theta, images, labels = several.theta, several.images, several.labels
    for arguments, message in (
        ((theta[0], images, labels), r"theta must have shape \[K, P\], got \(\d+,\)"),
        ((theta[:0], images, labels), r"theta must have shape \[K, P\], got \(0, \d+\)"),
        (
            (theta, images[0], labels),
            r"images must have shape \[3, B, C, H, W\], got \(6, 2, 9, 7\)",
        ),
        (
            (theta[:2], images, labels),
            r"images must have shape \[2, B, C, H, W\], got \(3, 6, 2, 9, 7\)",
        ),
        ((theta, images, labels[:, :5]), r"labels must have shape \[3, 6\], got \(3, 5\)"),
        (
            (theta, images, labels.float()),
            r"labels must have shape \[3, 6, classes\], got \(3, 6\)",
        ),
    ):
        with pytest.raises(ValueError, match=f"^engine: {message}$"):
            engine.gradients(*arguments)
    with pytest.raises(ValueError, match=r"^engine: theta must have shape \[K, P\]"):
        engine.logits_of(theta[0], images[0])
