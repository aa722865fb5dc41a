"""Both engines' two computations, each against autograd and against finite differences."""

from __future__ import annotations

import pytest
import torch
import torch.nn.utils.prune
from cases import relative_error
from engines_support import BOTH
from torch import Tensor
from torch.nn import functional as F

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
def test_networks_side_by_side_are_those_one_at_a_time(
    name: str, networks: int, soft: bool, device: torch.device
) -> None:
    """Sums of the same numbers in another order: 1e-12 in float64; in float32 2e-5, as for the
    operators.
    """
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 2e-5)):
        several = Several(networks, dtype, device, soft)
        engine = engines.choose(several.net, name)
        losses, gradients = engine.gradients(several.theta, several.images, several.labels)
        logits = engine.logits_of(several.theta, several.images[0])
        assert losses.shape == (networks, 6)
        assert logits.shape == (networks, 6, 4)
        for found, expected in zip(
            (losses, gradients, logits), several.one_at_a_time(engine), strict=True
        ):
            assert found.dtype == dtype
            for one, alone in zip(found, expected, strict=True):
                assert relative_error(one, alone) <= tolerance


@BOTH
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_one_network_alone_has_the_same_bits(
    name: str, precision: str, device: torch.device
) -> None:
    several = Several(1, torch.float32, device)
    engine = engines.choose(several.net, name, precision)
    losses, gradients, logits = several.one_at_a_time(engine)
    found = engine.gradients(several.theta, several.images, several.labels)
    assert torch.equal(found[0], losses)
    assert torch.equal(found[1], gradients)
    assert torch.equal(engine.logits_of(several.theta, several.images[0]), logits)


def test_networks_side_by_side_in_bfloat16(device: torch.device) -> None:
    """float32 sums in another order are rounded to the neighboring bfloat16 now and then: 2^-8 of
    single numbers.
    """
    several = Several(3, torch.float32, device)
    engine = engines.choose(several.net, "fused", "bfloat16")
    found = (
        *engine.gradients(several.theta, several.images, several.labels),
        engine.logits_of(several.theta, several.images[0]),
    )
    for one, expected in zip(found, several.one_at_a_time(engine), strict=True):
        assert relative_error(one, expected) <= 2**-8


@pytest.mark.usefixtures("composed")
def test_networks_side_by_side_take_one_convolution_a_layer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[tuple[int, ...]] = []
    original = F.conv2d

    def remember(x: Tensor, w: Tensor, **options: int) -> Tensor:
        seen.append((x.shape[1], w.shape[0], options["groups"]))
        return original(x, w, **options)

    several = Several(3, torch.float32, torch.device("cpu"))
    engine = engines.choose(several.net)
    monkeypatch.setattr(F, "conv2d", remember)
    engine.gradients(several.theta, several.images, several.labels)
    assert seen == [(6, 15, 3), (15, 15, 3)]
    seen.clear()
    engine.logits_of(
        several.theta, several.images[0]
    )  # all look at the same images, which are not copied
    assert seen == [(2, 15, 1), (15, 15, 3)]


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
