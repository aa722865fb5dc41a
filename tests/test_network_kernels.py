"""ConvNet's forward pass on the compiled kernel, under autograd, against its own layers."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

import pdd_fast
from pdd_fast.networks import kernels
from pdd_fast.ops import convnet

pytestmark = pytest.mark.skipif(not convnet.available(), reason="the CPU kernels are not built")

CALLED: list[str] = []


@pytest.fixture(autouse=True)
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the passes that were run."""
    CALLED.clear()
    for name in ("forward", "backward"):
        original = getattr(convnet.ConvNetPasses, name)

        def counted(
            *args: object, name: str = name, original: Callable[..., object] = original, **kw: object
        ) -> object:
            CALLED.append(name)
            return original(*args, **kw)

        monkeypatch.setattr(convnet.ConvNetPasses, name, counted)
    return CALLED


def network(size: tuple[int, int] = (9, 11), width: int = 6, depth: int = 2) -> pdd_fast.ConvNet:
    torch.manual_seed(0)
    net = pdd_fast.ConvNet(3, 4, size, width, depth).double()
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.5)
    return net


def batch(net: pdd_fast.ConvNet, count: int = 5, requires_grad: bool = True) -> Tensor:
    images = torch.randn(count, 3, *net.image_size, dtype=torch.float64)
    return images.requires_grad_(requires_grad)


def gradients(net: pdd_fast.ConvNet, images: Tensor, again: bool = False) -> list[Tensor]:
    """Of a function of the logits, with respect to images and parameters; ``again``: of the sum of their squares."""
    inputs = [images, *net.parameters()]
    found = torch.autograd.grad(net(images).square().sum(), inputs, create_graph=again)
    if again:
        found = torch.autograd.grad(sum(part.square().sum() for part in found), inputs, materialize_grads=True)
    return list(found)


def assert_close(found: list[Tensor], expected: list[Tensor]) -> None:
    scale = max(float(part.abs().max()) for part in expected)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12 * scale)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("again", [False, True], ids=["gradient", "gradient of a gradient"])
def test_derivatives_are_those_of_the_layers(again: bool, layout: torch.memory_format) -> None:
    net = network().to(memory_format=layout)
    images = batch(net).detach().contiguous(memory_format=layout).requires_grad_()
    found = gradients(net, images, again)
    # What the second derivative owes to the logits themselves is an ordinary gradient again.
    assert CALLED == ["forward", "backward"]
    with kernels.plain_torch():
        expected = gradients(net, images, again)
    assert len(CALLED) == 2  # the layers do without
    assert_close(found, expected)


def test_gradcheck() -> None:
    net = network((4, 5), width=3, depth=1)
    parameters = list(net.parameters())

    def function(images: Tensor, *_: Tensor) -> Tensor:
        return net(images)

    images = batch(net, 2)
    assert torch.autograd.gradcheck(function, (images, *parameters))
    assert torch.autograd.gradgradcheck(lambda x: net(x), (images,))


def test_only_what_needs_a_gradient_gets_one() -> None:
    net, images = network(), batch(network(), requires_grad=False)
    for parameter in net.parameters():
        parameter.requires_grad_(False)
    assert net(images).grad_fn is None
    net.classifier.bias.requires_grad_()
    net(images).sum().backward()
    assert net.classifier.bias.grad is not None
    assert all(p.grad is None for p in net.blocks.parameters())
    with torch.no_grad():
        assert net(images.requires_grad_()).grad_fn is None


def test_backward_can_be_repeated() -> None:
    net = network()
    images = batch(net)
    loss = net(images).square().sum()
    first = torch.autograd.grad(loss, list(net.parameters()), retain_graph=True)
    net(batch(net, 3)).sum().backward()  # another pass in the same buffers
    second = torch.autograd.grad(loss, list(net.parameters()))
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one, other)


def test_a_change_of_parameters_before_the_way_back_is_noticed() -> None:
    net = network()
    loss = net(batch(net)).sum()
    with torch.no_grad():
        net.classifier.weight.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_training_takes_the_same_way() -> None:
    trained = []
    for plain in (False, True):
        net = network(width=16)
        optimizer = torch.optim.SGD(net.parameters(), 0.01, momentum=0.9)
        torch.manual_seed(1)
        for _ in range(5):
            images = batch(net, requires_grad=False)
            optimizer.zero_grad()
            with kernels.plain_torch() if plain else torch.enable_grad():
                nn.functional.cross_entropy(net(images), torch.arange(5) % 4).backward()
            optimizer.step()
        trained.append(pdd_fast.flatten_parameters(net))
    torch.testing.assert_close(*trained, rtol=1e-9, atol=1e-10)
    assert CALLED == ["forward", "backward"] * 5


def test_networks_are_copied_and_stored_as_before() -> None:
    net = network()
    images = batch(net)
    expected = net(images)
    for other in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert torch.equal(other(images), expected)
    assert CALLED == ["forward"] * 3


def changed_norm(net: pdd_fast.ConvNet) -> None:
    net.blocks[0][1] = nn.GroupNorm(2, net.width).double()


def changed_activation(net: pdd_fast.ConvNet) -> None:
    net.blocks[1][2] = nn.Tanh()


def longer_block(net: pdd_fast.ConvNet) -> None:
    net.blocks[0].append(nn.Identity())


def other_linear(net: pdd_fast.ConvNet) -> None:
    net.classifier = nn.Linear(net.classifier.in_features, 4, bias=False).double()


def hooked(net: pdd_fast.ConvNet) -> None:
    net.blocks[1][0].register_forward_hook(lambda *_: None)


def parametrized(net: pdd_fast.ConvNet) -> None:
    nn.utils.parametrizations.weight_norm(net.blocks[0][0])


@pytest.mark.parametrize(
    "change", [changed_norm, changed_activation, longer_block, other_linear, hooked, parametrized],
    ids=lambda change: change.__name__,
)  # fmt: skip
def test_layers_that_are_not_its_own_run_as_they_are(change: Callable[[pdd_fast.ConvNet], None]) -> None:
    net = network()
    change(net)
    images = batch(net)
    with kernels.plain_torch():
        expected = net(images)
    torch.testing.assert_close(net(images), expected, rtol=0, atol=0)
    assert not CALLED


def forward_mode(net: pdd_fast.ConvNet, images: Tensor) -> Tensor:
    with forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(net(forward_ad.make_dual(images, torch.ones_like(images)))).tangent
    assert tangent is not None
    return tangent


@pytest.mark.parametrize(
    "use",
    [
        forward_mode,
        lambda net, images: torch.func.jvp(net, (images,), (torch.ones_like(images),))[1],
        lambda net, images: torch.func.vmap(lambda x: net(x[None])[0])(images),
        lambda net, images: torch.func.grad(lambda x: net(x).sum())(images),
    ],
    ids=["forward mode", "jvp", "vmap", "grad"],
)
def test_transforms_give_what_the_layers_give(use: Callable[[pdd_fast.ConvNet, Tensor], Tensor]) -> None:
    net = network()
    images = batch(net, requires_grad=False)
    found = use(net, images)
    with kernels.plain_torch():
        expected = use(net, images)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-10)


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
