"""ConvNet's forward pass on the compiled kernel, under autograd, against its own layers."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from network_kernels_support import CALLED, assert_close, batch, network
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.autograd.functional import jacobian
from torch.nn.utils import prune

import pdd_fast
from pdd_fast.networks import kernels
from pdd_fast.ops import convnet

pytestmark = pytest.mark.skipif(not convnet.available(), reason="the CPU kernels are not built")


def gradients(net: pdd_fast.ConvNet, images: Tensor, again: bool = False) -> list[Tensor]:
    """Gradients of a function of the logits with respect to images and parameters; ``again``: of
    the sum of their squares.
    """
    inputs = [images, *net.parameters()]
    found = torch.autograd.grad(net(images).square().sum(), inputs, create_graph=again)
    if again:
        found = torch.autograd.grad(
            sum(part.square().sum() for part in found), inputs, materialize_grads=True
        )
    return list(found)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("again", [False, True], ids=["gradient", "gradient of a gradient"])
def test_derivatives_are_those_of_the_layers(again: bool, layout: torch.memory_format) -> None:
    net = network().to(memory_format=layout)
    images = batch(net).detach().contiguous(memory_format=layout).requires_grad_()
    found = gradients(net, images, again)
    # The part of the second derivative that passes through the logits is an ordinary gradient.
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


def pruned(net: pdd_fast.ConvNet) -> None:
    prune.l1_unstructured(net.blocks[1][0], "weight", 0.5)


def spectral(net: pdd_fast.ConvNet) -> None:
    nn.utils.spectral_norm(net.classifier)


def other_eps(net: pdd_fast.ConvNet) -> None:
    net.blocks[1][1].eps = 1e-2


def batch_norm(net: pdd_fast.ConvNet) -> None:
    net.blocks[0][1] = nn.BatchNorm2d(net.width).double()


def norm_without_weights(net: pdd_fast.ConvNet) -> None:
    net.blocks[0][1] = nn.GroupNorm(net.width, net.width, affine=False)


def other_pooling(net: pdd_fast.ConvNet) -> None:
    net.blocks[1][3] = nn.MaxPool2d(2)


def other_divisor(net: pdd_fast.ConvNet) -> None:
    net.blocks[0][3] = nn.AvgPool2d(2, divisor_override=3)


def padded_pooling(net: pdd_fast.ConvNet) -> None:
    net.blocks[0][3] = nn.AvgPool2d(2, ceil_mode=True)
    net.blocks[1][3] = nn.AvgPool2d(3, stride=2)


def reflecting(net: pdd_fast.ConvNet) -> None:
    net.blocks[0][0].padding_mode = "reflect"
    net.blocks[0][0]._reversed_padding_repeated_twice = [1, 1, 1, 1]


def without_bias(net: pdd_fast.ConvNet) -> None:
    net.blocks[1][0] = nn.Conv2d(net.width, net.width, 3, padding=1, bias=False).double()


def own_forward_of_a_layer(net: pdd_fast.ConvNet) -> None:
    net.blocks[0][2].forward = torch.tanh  # type: ignore[method-assign]


def hooked_gradient(net: pdd_fast.ConvNet) -> None:
    net.blocks[0][0].register_full_backward_hook(lambda *_: None)


# Layers that the kernels do not compute, or that somebody watches.
CHANGES = [
    changed_norm,
    changed_activation,
    longer_block,
    other_linear,
    hooked,
    parametrized,
    pruned,
    spectral,
    other_eps,
    batch_norm,
    norm_without_weights,
    other_pooling,
    other_divisor,
    padded_pooling,
    reflecting,
    without_bias,
    own_forward_of_a_layer,
    hooked_gradient,
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_layers_that_are_not_its_own_run_as_they_are(
    change: Callable[[pdd_fast.ConvNet], None],
) -> None:
    net = network()
    change(net)
    net.eval()  # a spectral norm's estimate stays where it is
    images = batch(net)
    with kernels.plain_torch():
        expected = net(images)
    torch.testing.assert_close(net(images), expected, rtol=0, atol=0)
    assert not CALLED


def test_a_network_is_computed_from_its_layers_and_not_from_what_it_was_built_with() -> None:
    """A larger classifier, and parameters that the kernels can read all the same."""
    net = network()
    net.classifier = nn.Linear(net.classifier.in_features, 9).double()
    net.num_classes, net.width, net.depth = 1, 99, 7
    net.temperature = nn.Parameter(torch.ones(()))
    images = batch(net)
    found = net(images)
    assert found.shape == (5, 9)
    assert CALLED == ["forward"]
    with kernels.plain_torch():
        torch.testing.assert_close(found, net(images), rtol=1e-9, atol=1e-10)
    untouched = network()
    assert untouched(images).shape == (5, 4)


def weights_as_slices(net: pdd_fast.ConvNet, flat: Tensor) -> None:
    """Parameters deleted and set as slices of one vector, the usual trick of trajectory
    matching."""
    places = [
        (m, n, p.shape) for m in net.modules() for n, p in list(m.named_parameters(recurse=False))
    ]
    start = 0
    for module, name, shape in places:
        delattr(module, name)
        setattr(module, name, flat[start : start + shape.numel()].view(shape))
        start += shape.numel()


@pytest.mark.parametrize("again", [False, True], ids=["gradient", "gradient of a gradient"])
def test_weights_may_be_slices_of_one_vector(again: bool) -> None:
    net, flat = network(), pdd_fast.flatten_parameters(network()).requires_grad_()
    images = batch(net)
    expected = torch.cat([part.flatten() for part in gradients(network(), images, again)])
    weights_as_slices(net, flat)
    loss = net(images).square().sum()
    found = torch.autograd.grad(loss, [images, flat], create_graph=again)
    if again:
        found = torch.autograd.grad(sum(part.square().sum() for part in found), [images, flat])
    assert CALLED.count("forward") == 2
    assert_close([torch.cat([part.flatten() for part in found])], [expected])
    assert network()(images).shape == (5, 4)  # other networks of this shape are not disturbed


def test_shared_weights_get_the_sum_of_their_gradients() -> None:
    net = network(depth=3)
    net.blocks[2][0] = net.blocks[1][0]
    images = batch(net)
    found = gradients(net, images)
    with kernels.plain_torch():
        assert_close(found, gradients(net, images))
    assert CALLED == ["forward", "backward"]


@pytest.mark.parametrize("again", [False, True], ids=["gradient", "gradient of a gradient"])
def test_parameters_may_be_computed_from_the_images_and_from_one_another(again: bool) -> None:
    """As in an unroll by hand, where a step's parameters depend on the images of the step
    before."""
    net, start = network(depth=3), pdd_fast.flatten_parameters(network(depth=3))
    images, draw = batch(net), torch.randn(start.numel(), dtype=torch.float64)
    shapes = {name: parameter.shape for name, parameter in net.named_parameters()}

    def found() -> list[Tensor]:
        theta = start + draw * images.square().mean()
        parts = theta.split([shape.numel() for shape in shapes.values()])
        parameters = {
            name: part.view(shape)
            for (name, shape), part in zip(shapes.items(), parts, strict=True)
        }
        parameters["blocks.2.0.weight"] = parameters["blocks.1.0.weight"]
        loss = torch.func.functional_call(net, parameters, (images,)).square().sum()
        (first,) = torch.autograd.grad(loss, images, create_graph=again)
        return [first, *(torch.autograd.grad(first.square().sum(), images) if again else ())]

    result = found()
    assert ["forward", "backward"][: 1 + (not again)] + (["backward"] if again else []) == CALLED
    with kernels.plain_torch():
        assert_close(result, found())


def test_evaluation_keeps_no_activations() -> None:
    net = network()
    pdd_fast.free_buffers()
    with torch.no_grad():
        net(batch(net))
    assert convnet.idle_bytes() == 0


def forward_mode(net: pdd_fast.ConvNet, images: Tensor) -> Tensor:
    with forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(
            net(forward_ad.make_dual(images, torch.ones_like(images)))
        ).tangent
    assert tangent is not None
    return tangent


def stacked(net: pdd_fast.ConvNet) -> Callable[[Tensor, Tensor], Tensor]:
    """Logits of the network with all parameters multiplied by a number."""
    parameters = dict(net.named_parameters())

    def scaled(factor: Tensor, images: Tensor) -> Tensor:
        scaled = {name: factor * parameter for name, parameter in parameters.items()}
        return torch.func.functional_call(net, scaled, (images,))

    return scaled


@pytest.mark.filterwarnings("ignore:.*torch.jit")
@pytest.mark.parametrize(
    "use",
    [
        forward_mode,
        lambda net, images: torch.func.jvp(net, (images,), (torch.ones_like(images),))[1],
        lambda net, images: torch.func.vmap(lambda x: net(x[None])[0])(images),
        lambda net, images: torch.func.grad(lambda x: net(x).sum())(images),
        lambda net, images: torch.func.jacrev(net)(images),
        lambda net, images: torch.func.hessian(lambda x: net(x).square().sum())(images[:1]),
        lambda net, images: jacobian(net, images, vectorize=True, strategy="forward-mode"),
        lambda net, images: torch.func.vmap(stacked(net), (0, None))(
            torch.ones(3, dtype=torch.float64), images
        ),
        lambda net, images: torch.jit.trace(net, images)(images + 1),
        lambda net, images: torch.fx.symbolic_trace(net)(images),
        lambda net, images: torch.jit.script(net)(images),
        lambda net, images: torch.compile(net, backend="aot_eager", fullgraph=True)(images),
        lambda net, images: torch.export.export(net, (images,)).module()(images),
    ],
    ids=[
        "forward mode",
        "jvp",
        "vmap",
        "grad",
        "jacrev",
        "hessian",
        "jacobian in forward mode",
        "networks stacked",
        "traced",
        "traced symbolically",
        "scripted",
        "compiled",
        "exported",
    ],
)
def test_transforms_give_what_the_layers_give(
    use: Callable[[pdd_fast.ConvNet, Tensor], Tensor],
) -> None:
    net = network()
    images = batch(net, requires_grad=False)
    found = use(net, images)
    with kernels.plain_torch():
        expected = use(net, images)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-10)
