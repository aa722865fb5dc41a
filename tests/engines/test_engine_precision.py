"""Both engines' two computations, each against autograd and against finite differences."""

from __future__ import annotations

import pytest
import torch
import torch.nn.utils.prune
from cases import relative_error
from engines_support import BOTH, KEEP, Point
from torch import Tensor
from torch.nn import functional as F

import pdd_fast
from pdd_fast import engines
from pdd_fast.engines.convolution import conv, conv_input_grad, conv_weight_grad, operand


class Rounded:
    """A network in float32 and its passes in two precisions."""

    def __init__(self, name: str, keep: bool, device: torch.device, soft: bool = True) -> None:
        self.net = pdd_fast.ConvNet(3, 10, 16, width=16, depth=2).to(device)
        self.theta = pdd_fast.flatten_parameters(self.net)
        self.images, self.direction = (
            torch.randn(10, 3, 16, 16).to(device),
            torch.randn(len(self.theta)).to(device),
        )
        self.labels = torch.randn(10, 10).softmax(1).to(device)
        self.name, self.keep = name, keep

    def passes(self, precision: str) -> dict[str, Tensor]:
        engine = engines.choose(self.net, self.name, precision)
        losses, gradient, saved = engine.gradient(self.theta, self.images, self.labels, self.keep)
        dual = engine.dual(self.theta, self.images, self.labels, self.direction, saved)
        logits = engine.logits(self.theta, self.images)
        found = {"losses": losses, "gradient": gradient, "logits": logits, "slope": dual.slope}
        for key in ("theta", "images", "labels"):
            tensor = getattr(dual, key)
            assert tensor is not None
            found[f"tangent of {key}"] = tensor
        return found


# ---- precision ----


@BOTH
@KEEP
def test_bfloat16_is_close_to_float32_and_gives_float32(
    name: str, keep: bool, device: torch.device
) -> None:
    """A bfloat16 number is good to 2^-9 = 0.2 %; logits add a few hundred of them. Gradients lose
    more, because some activations change sides of the ReLU: 2 to 5 % here, 10 % in what is
    differentiated twice.
    """
    point = Rounded(name, keep, device)
    full, rounded = point.passes("float32"), point.passes("bfloat16")
    bounds = {"losses": 1e-2, "logits": 1e-2, "gradient": 0.06, "slope": 0.06}
    for key, found in rounded.items():
        assert found.dtype == torch.float32, key
        error = relative_error(found, full[key])
        assert 1e-4 < error < bounds.get(key, 0.15), (key, error)


def test_bfloat16_stores_activations_in_16_bits_and_nothing_else() -> None:
    point = Rounded("fused", True, torch.device("cpu"))
    engine = engines.choose(point.net, "fused", "bfloat16")
    saved = engine.gradient(point.theta, point.images, point.labels, keep=True)[2]
    for block in saved.blocks:
        assert {t.dtype for t in (block.x, block.z, block.grad_out, block.grad_z)} == {
            torch.bfloat16
        }
        assert {block.mean.dtype, block.rstd.dtype} == {torch.float32}
    assert {saved.features.dtype, saved.logits.dtype} == {torch.float32}


def test_bfloat16_rounds_operands_and_results_and_no_sum() -> None:
    """Against float64 on the rounded operands: one rounding to 8 bits at the end, and what float32
    adds to it.
    """
    x, w, grad = (
        torch.randn(shape).bfloat16() for shape in ((4, 32, 6, 6), (8, 32, 3, 3), (4, 8, 6, 6))
    )
    found = conv(x, w), conv_input_grad(grad, w, x), conv_weight_grad(grad, x, w)
    exact = x.double().requires_grad_(), w.double().requires_grad_()
    truth = F.conv2d(*exact, padding=1)
    expected = truth.detach(), *torch.autograd.grad(truth, exact, grad.double())
    for result, wanted in zip(found, expected, strict=True):
        assert result.dtype == torch.bfloat16
        assert ((result.double() - wanted).abs() <= 2**-8 * wanted.abs() + 1e-5).all()


@BOTH
def test_bfloat16_needs_float32_parameters(name: str) -> None:
    point = Point()
    engine = engines.choose(point.net, name, "bfloat16")
    message = r"^parameters must be torch\.float32 for precision 'bfloat16', got torch\.float64$"
    many = (point.theta[None], point.images[None], point.labels[None])
    for call in (
        lambda: engine.gradient(point.theta, point.images, point.labels),
        lambda: engine.dual(point.theta, point.images, point.labels, point.direction, None),
        lambda: engine.logits(point.theta, point.images),
        lambda: engine.gradients(*many),
        lambda: engine.logits_of(many[0], point.images),
    ):
        with pytest.raises(TypeError, match=message):
            call()


@BOTH
def test_tf32_changes_nothing_in_float64_and_nothing_on_the_cpu(
    name: str, device: torch.device
) -> None:
    point = Point(device)
    first, second = (
        engines.choose(point.net, name, p).gradient(point.theta, point.images, point.labels)[1]
        for p in ("float32", "tf32")
    )
    assert torch.equal(first, second)
    if device.type == "cpu":
        single = Rounded(name, False, device)
        for one, other in zip(
            single.passes("float32").values(), single.passes("tf32").values(), strict=True
        ):
            assert torch.equal(one, other)


@BOTH
@pytest.mark.parametrize("precision", ["float32", "tf32", "bfloat16"])
def test_same_bits_twice(name: str, precision: str, device: torch.device) -> None:
    point = Rounded(name, False, device)
    for one, other in zip(
        point.passes(precision).values(), point.passes(precision).values(), strict=True
    ):
        assert torch.equal(one, other)


def test_weights_are_brought_into_cudnns_order_before_a_pass(device: torch.device) -> None:
    weight = torch.randn(8, 4, 3, 3).to(device)
    for dtype in (torch.float32, torch.bfloat16):
        found = operand(weight, dtype)
        assert torch.equal(found, weight.to(dtype))
        assert found.is_contiguous(memory_format=torch.channels_last) == (device.type == "cuda")
