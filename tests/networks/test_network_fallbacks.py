"""ConvNet's forward pass on the compiled kernel, under autograd, against its own layers."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from network_kernels_support import CALLED, assert_close, batch, network
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.functional import jacobian
from torch.overrides import TorchFunctionMode
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils.flop_counter import FlopCounterMode

import pdd_fast
from pdd_fast.networks import kernels
from pdd_fast.ops import convnet

pytestmark = pytest.mark.skipif(not convnet.available(), reason="the CPU kernels are not built")


def batched(net: pdd_fast.ConvNet, images: Tensor) -> list[Tensor]:
    inputs = [images, *net.parameters()]
    return list(
        torch.autograd.grad(net(images)[0], inputs, torch.eye(4).double(), is_grads_batched=True)
    )


def by_vmap(net: pdd_fast.ConvNet, images: Tensor) -> list[Tensor]:
    inputs, logits = [images, *net.parameters()], net(images)
    each = torch.func.vmap(lambda v: torch.autograd.grad(logits[0], inputs, v, retain_graph=True))(
        torch.eye(4).double()
    )
    return list(each)


def by_rows(net: pdd_fast.ConvNet, images: Tensor) -> list[Tensor]:
    inputs, logits = [images, *net.parameters()], net(images)
    rows = [torch.autograd.grad(logits[0, k], inputs, retain_graph=True) for k in range(4)]
    return [torch.stack(parts) for parts in zip(*rows, strict=True)]


@pytest.mark.parametrize("use", [batched, by_vmap])
def test_many_gradients_at_once_are_those_one_by_one(
    use: Callable[[pdd_fast.ConvNet, Tensor], list[Tensor]],
) -> None:
    net = network()
    images = batch(net)
    found = use(net, images)
    assert CALLED == ["forward"]
    assert not any(tensor.requires_grad for tensor in found)
    assert_close(found, by_rows(net, images))
    vectorized = jacobian(net, images.detach(), vectorize=True)
    torch.testing.assert_close(vectorized, jacobian(net, images.detach()), rtol=1e-9, atol=1e-10)


class Doubled(TorchFunctionMode):
    """Gives a function of torch another meaning."""

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        return 2 * result if function is nn.functional.relu else result


def leaky(module: nn.Module, images: Tensor) -> Tensor:
    return nn.functional.leaky_relu(images, 0.1)


def signs(module: nn.Module, images: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return nn.functional.conv2d(images, weight.sign(), bias, padding=1)


@pytest.mark.parametrize(
    ("owner", "name", "value"),
    [
        (nn.ReLU, "forward", leaky),
        (nn.Conv2d, "_conv_forward", signs),
        (nn.functional, "relu", lambda images, inplace=False: nn.functional.elu(images)),
        (nn.Linear, "forward", lambda module, images: images[:, :4]),
    ],
    ids=["a layer", "what a layer calls", "a function", "the last layer"],
)
def test_torch_may_be_patched(
    owner: Any, name: str, value: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As guided backpropagation does with ReLU."""
    net = network()
    images, theta, labels = batch(net), pdd_fast.flatten_parameters(net), torch.arange(5) % 4
    before = net(images)
    monkeypatch.setattr(owner, name, value)
    with kernels.plain_torch():
        expected = net(images)
    assert not torch.allclose(expected, before)
    torch.testing.assert_close(net(images), expected, rtol=0, atol=0)
    found = [
        pdd_fast.unroll(net, theta, images, labels, 0.1, [range(5)], engine=e)
        for e in ("auto", "autograd")
    ]
    assert torch.equal(*found)


@pytest.mark.parametrize("name", ["_conv_forward", "_call_impl"])
def test_one_layer_may_be_patched(name: str) -> None:
    net = network()
    conv, images = net.blocks[0][0], batch(net)
    original = getattr(conv, name)
    setattr(conv, name, lambda *args: original(*args).tanh())
    with kernels.plain_torch():
        torch.testing.assert_close(net(images), (expected := net(images)), rtol=0, atol=0)
    assert torch.equal(net(images), expected)
    assert not CALLED


def test_function_modes_see_the_layers() -> None:
    net = network()
    images, theta, labels = batch(net), pdd_fast.flatten_parameters(net), torch.arange(5) % 4
    with Doubled():
        with kernels.plain_torch():
            expected = net(images)
        torch.testing.assert_close(net(images), expected, rtol=0, atol=0)
        found = [
            pdd_fast.unroll(net, theta, images, labels, 0.1, [range(5)], engine=e)
            for e in ("auto", "autograd")
        ]
    assert torch.equal(*found)
    assert not CALLED
    with torch.device("meta"):  # a mode too, but one that changes no function's meaning
        net(images)
    assert CALLED == ["forward"]


@pytest.mark.parametrize("use", ["create_graph", "many at once"])
def test_autocast_around_the_backward_pass_changes_nothing(use: str) -> None:
    net = network().float()
    images = batch(net).float().detach().requires_grad_()

    def found() -> Tensor:
        logits = net(images)
        with torch.autocast("cpu", torch.bfloat16) if use_autocast else nullcontext():
            if use == "create_graph":
                return torch.autograd.grad(logits.square().sum(), images, create_graph=True)[
                    0
                ].detach()
            return torch.autograd.grad(logits[0], images, torch.eye(4), is_grads_batched=True)[0]

    use_autocast = False
    expected = found()
    use_autocast = True
    assert torch.equal(found(), expected)


def test_gradients_that_are_more_than_values_go_by_the_layers() -> None:
    net = network()
    images = batch(net)
    zeros = torch._efficientzerotensor((5, 4), dtype=torch.float64)
    assert torch.autograd.grad(net(images), images, zeros)[0].count_nonzero() == 0
    assert net(torch._efficientzerotensor((5, 3, 9, 11), dtype=torch.float64)).isfinite().all()
    grad = torch.randn(5, 4, dtype=torch.float64)
    expected = torch.autograd.grad(net(images), images, grad)[0]
    (found,) = torch.autograd.grad(net(images), images, TwoTensor(grad, grad.clone()))
    assert_close([found.a if isinstance(found, TwoTensor) else found], [expected])
    logits = net(images)
    with FlopCounterMode(display=False) as counter:
        torch.autograd.grad(logits.sum(), images)
    assert counter.get_total_flops() > 0


def test_memory_that_was_freed_is_an_error() -> None:
    net = network()
    images = batch(net, requires_grad=False)
    net.classifier.weight.untyped_storage().resize_(0)
    with pytest.raises((TypeError, RuntimeError)):
        net(images)


def test_a_transform_of_something_else_may_call_the_network() -> None:
    net = network()
    images = batch(net, requires_grad=False)
    expected = float(net(images).sum())
    ones = torch.ones(3, dtype=torch.float64)
    found = torch.func.vmap(lambda s: s * net(images).sum())(ones)
    torch.testing.assert_close(found, expected * ones)
    assert float(torch.func.grad(lambda s: s * net(images).sum())(ones[0])) == pytest.approx(
        expected
    )


def test_the_size_of_images_may_be_given_anew() -> None:
    net = pdd_fast.ConvNet(3, 4, (8, 8), 6, 2).double()
    net.image_size = 8  # type: ignore[assignment]
    assert net(torch.zeros(2, 3, 8, 8, dtype=torch.float64)).shape == (2, 4)
    assert CALLED == ["forward"]


def test_modes_see_the_operators_of_the_layers() -> None:
    net = network()
    images = batch(net, requires_grad=False)
    with FlopCounterMode(display=False) as counter:
        net(images)
    assert counter.get_total_flops() > 0
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert net(torch.zeros_like(images)).shape == (5, 4)
    assert not CALLED


def test_negative_views_are_read_as_what_they_say() -> None:
    net = network()
    images = batch(net, requires_grad=False)
    assert torch.equal(net(torch._neg_view(-images)), net(images))
    theta = pdd_fast.flatten_parameters(net)
    found = [
        pdd_fast.unroll(net, theta, x, torch.arange(5) % 4, 0.1, [[0, 1, 2]])
        for x in (images, torch._neg_view(-images))
    ]
    assert torch.equal(*found)


def test_autocast_and_other_types_go_by_the_layers() -> None:
    net = network().float()
    images = batch(net, requires_grad=False).float()
    with torch.autocast("cpu", torch.bfloat16):
        assert net(images).dtype == torch.bfloat16
    assert net.bfloat16()(images.bfloat16()).dtype == torch.bfloat16
    with pytest.raises(RuntimeError):  # torch's own message about types that do not fit
        net.float()(images.double())
    with pytest.raises(RuntimeError):  # and about shapes
        net(images[:, :2])
    assert not CALLED


def test_no_images_give_no_logits() -> None:
    net = network()
    assert net(torch.zeros(0, 3, 9, 11, dtype=torch.float64)).shape == (0, 4)
