"""ConvNet against the same layers put together here, and parameters as one flat vector."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pdd_fast
from pdd_fast.networks.convnet import ConvNet
from pdd_fast.networks.parameters import (
    flatten_parameters,
    initial_parameters,
    load_parameters,
    views,
)

# Channels, classes, height and width, width, depth.
NETWORKS = [
    (3, 10, (32, 32), 128, 3),
    (1, 10, (8, 8), 5, 1),
    (3, 2, (12, 7), 4, 2),  # an odd side loses its last column in every pooling
    (2, 1, (5, 19), 3, 2),
    (4, 3, (4, 16), 6, 2),  # one pixel high before the linear layer
]


def plain(
    channels: int, classes: int, size: tuple[int, int], width: int, depth: int
) -> nn.Sequential:
    layers: list[nn.Module] = []
    height, across = size
    for block in range(depth):
        layers += [
            nn.Conv2d(width if block else channels, width, 3, padding=1),
            nn.InstanceNorm2d(width, affine=True),
            nn.ReLU(),
            nn.AvgPool2d(2),
        ]
        height, across = height // 2, across // 2
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(width * height * across, classes))


def randomized(net: nn.Module) -> nn.Module:
    """Norms start at weight 1 and bias 0, where a mistake in them would not show."""
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.normal_()
    return net


class Tied(nn.Module):
    """A module with what ConvNet lacks: buffers that reset_parameters() changes, and one parameter
    in two places.
    """

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.second = nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 4)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.norm(self.first(x)))


# ---- ConvNet ----


@pytest.mark.parametrize("arguments", NETWORKS, ids=str)
def test_convnet_equals_its_layers_one_after_another(
    arguments: tuple[int, int, tuple[int, int], int, int], device: torch.device
) -> None:
    channels, classes, size, width, depth = arguments
    net = ConvNet(channels, classes, size, width, depth).double().to(device)
    other = randomized(plain(channels, classes, size, width, depth)).double().to(device)
    load_parameters(net, flatten_parameters(other))
    images = torch.randn(3, channels, *size, dtype=torch.float64, device=device, requires_grad=True)
    found, expected = net(images), other(images)
    assert found.shape == (3, classes)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    # A gradient that forgets the parameters' order would pass where every logit is the same.
    direction = torch.randn_like(found)
    gradients = torch.autograd.grad((found * direction).sum(), [images, *net.parameters()])
    truths = torch.autograd.grad((expected * direction).sum(), [images, *other.parameters()])
    for gradient, truth in zip(gradients, truths, strict=True):
        torch.testing.assert_close(gradient, truth, rtol=1e-8, atol=1e-9)


def test_parameters_come_in_the_order_of_mtt() -> None:
    shapes = [tuple(parameter.shape) for parameter in ConvNet(3, 10, 32).parameters()]
    block = [(128,), (128,), (128,)]  # convolution bias, norm weight, norm bias
    assert shapes == [
        (128, 3, 3, 3),
        *block,
        (128, 128, 3, 3),
        *block,
        (128, 128, 3, 3),
        *block,
        (10, 128 * 4 * 4),
        (10,),
    ]
    names = [name.rpartition(".")[2] for name, _ in ConvNet(1, 2, 8, depth=1).named_parameters()]
    assert names == ["weight", "bias", "weight", "bias", "weight", "bias"]


@pytest.mark.parametrize(
    ("arguments", "count"),
    [
        ((3, 10, 32), 320_010),
        ((3, 100, 32), 504_420),
        ((3, 200, 64, 128, 4), 857_160),
        ((1, 10, 8, 4, 1), 698),
    ],
    ids=["CIFAR-10", "CIFAR-100", "Tiny ImageNet", "tiny"],
)
def test_parameter_counts_are_those_of_the_papers(arguments: tuple[int, ...], count: int) -> None:
    assert flatten_parameters(ConvNet(*arguments)).numel() == count


def test_a_number_and_a_pair_mean_the_same_size() -> None:
    assert ConvNet(1, 2, 8, 3, 1).image_size == ConvNet(1, 2, (8, 8), 3, 1).image_size == (8, 8)
    height_first = ConvNet(1, 2, (16, 4), 3, 2)
    assert height_first(torch.zeros(1, 1, 16, 4)).shape == (1, 2)
    assert height_first.image_size == (16, 4)


def test_an_image_does_not_depend_on_the_others_in_its_batch() -> None:
    net = randomized(ConvNet(2, 3, 8, 4, 2)).double()
    images = torch.randn(5, 2, 8, 8, dtype=torch.float64)
    torch.testing.assert_close(net(images)[3:4], net(images[3:4]), rtol=1e-12, atol=1e-12)


def test_logits_do_not_depend_on_the_memory_format(device: torch.device) -> None:
    net = randomized(ConvNet(1, 3, (8, 6), 4, 2)).double().to(device)
    images = torch.randn(5, 1, 8, 6, dtype=torch.float64, device=device)
    torch.testing.assert_close(
        net(images.contiguous(memory_format=torch.channels_last)), net(images)
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 10, 8), "in_channels must be at least 1, got 0"),
        ((3, 0, 8), "num_classes must be at least 1, got 0"),
        ((3, 10, 32, 0), "width must be at least 1, got 0"),
        ((3, 10, 32, 8, 0), "depth must be at least 1, got 0"),
        ((3, 10, 7), "image_size must be at least 2**depth = 8 pixels, got 7x7"),
        ((3, 10, (32, 3), 8, 2), "image_size must be at least 2**depth = 4 pixels, got 32x3"),
        ((3, 10, (3, 8, 8)), "image_size must be one number or two, got (3, 8, 8)"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_sizes_that_cannot_be_are_named(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ValueError, match=f"^ConvNet: {re.escape(message)}$"):
        ConvNet(*arguments)


# ---- flat parameters ----


@pytest.mark.parametrize(
    "make",
    [lambda: ConvNet(2, 3, 8, 4, 2), lambda: nn.Linear(3, 2, bias=False), Tied],
    ids=["ConvNet", "one", "tied"],
)
def test_parameters_go_flat_and_back(make: Callable[[], nn.Module], device: torch.device) -> None:
    net, other = randomized(make()).to(device), randomized(make()).to(device)
    theta = flatten_parameters(net)
    assert theta.dim() == 1
    assert not theta.requires_grad
    load_parameters(other, theta)
    for found, expected in zip(other.parameters(), net.parameters(), strict=True):
        assert torch.equal(found, expected)
        assert found.requires_grad
    assert torch.equal(flatten_parameters(other), theta)


@pytest.mark.parametrize(
    "make", [lambda: ConvNet(1, 2, 4, 2, 1), lambda: nn.Linear(3, 2, bias=False)]
)
def test_flat_parameters_share_no_memory_with_the_network(make: Callable[[], nn.Module]) -> None:
    net = make()
    theta = torch.cat([parameter.detach().flatten() for parameter in net.parameters()])
    flatten_parameters(net).fill_(7)
    assert torch.equal(flatten_parameters(net), theta)
    loaded = theta + 1
    load_parameters(net, loaded)
    loaded.fill_(7)
    assert torch.equal(flatten_parameters(net), theta + 1)


def test_every_second_number_of_a_longer_vector_can_be_loaded() -> None:
    net = ConvNet(1, 2, 4, 2, 1)
    longer = torch.randn(2 * flatten_parameters(net).numel())
    load_parameters(net, longer[::2])
    assert torch.equal(flatten_parameters(net), longer[::2])


def test_views_share_memory_and_have_the_shapes_asked_for() -> None:
    theta = torch.arange(7.0)
    first, second = views(theta, iter([torch.empty(2, 3), torch.empty(1)]))
    assert first.tolist() == [[0, 1, 2], [3, 4, 5]]
    second.fill_(-1)
    assert theta[6] == -1


def test_the_gradient_of_all_views_is_one_concatenation() -> None:
    """Slices would fill a vector of all parameters each, and add them up."""
    theta = torch.randn(7, dtype=torch.float64, requires_grad=True)
    parts = views(theta, iter([torch.empty(2, 2), torch.empty(1), torch.empty(2)]))
    nodes = {part.grad_fn.next_functions[0][0] for part in parts if part.grad_fn is not None}
    assert [node.name() for node in nodes if node is not None] == ["SplitWithSizesBackward0"]
    first, second, _ = parts  # the last one is not used
    (grad,) = torch.autograd.grad(first.square().sum() * second.sum(), theta, create_graph=True)
    square = theta[:4].square().sum()
    assert torch.allclose(
        grad, torch.cat([2 * theta[:4] * theta[4], square[None], torch.zeros(2).double()])
    )
    (again,) = torch.autograd.grad(grad[:4].sum(), theta)
    assert torch.allclose(
        again,
        torch.cat([2 * theta[4].expand(4), 2 * theta[:4].sum()[None], torch.zeros(2)]).double(),
    )


def test_gradients_that_are_views_add_up_and_are_set_to_zero_in_place() -> None:
    net, images = ConvNet(1, 3, 8, 4, 2), torch.randn(2, 1, 8, 8)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    net(images).square().sum().backward()
    once = [parameter.grad.clone() for parameter in net.parameters() if parameter.grad is not None]
    net(images).square().sum().backward()
    twice = [parameter.grad for parameter in net.parameters() if parameter.grad is not None]
    assert len(once) == len(twice) == len(list(net.parameters()))
    assert all(torch.equal(b, 2 * a) for a, b in zip(once, twice, strict=True))
    optimizer.zero_grad(set_to_none=False)
    assert all(not grad.any() for grad in twice)


@pytest.mark.parametrize("shape", [(0,), (697,), (699,), (698, 1), (1, 698)], ids=str)
def test_a_vector_of_another_length_is_refused_and_nothing_is_loaded(
    shape: tuple[int, ...],
) -> None:
    net = ConvNet(1, 10, 8, 4, 1)
    before = flatten_parameters(net)
    message = re.escape(f"load_parameters: theta must have shape (698,), got {shape}")
    with pytest.raises(ValueError, match=f"^{message}$"):
        load_parameters(net, torch.zeros(shape))
    assert torch.equal(flatten_parameters(net), before)


def test_a_module_without_parameters_is_refused() -> None:
    for function in (flatten_parameters, lambda net: initial_parameters(net, 0)):
        with pytest.raises(ValueError, match="net must have parameters, got none"):
            function(nn.ReLU())


def test_the_functions_are_public() -> None:
    assert pdd_fast.ConvNet is ConvNet
    assert pdd_fast.flatten_parameters is flatten_parameters
    assert pdd_fast.load_parameters is load_parameters


# ---- fresh parameters ----


def test_fresh_parameters_depend_on_the_seed_alone(device: torch.device) -> None:
    net = ConvNet(1, 10, 8, 4, 1)
    torch.manual_seed(1)
    first = initial_parameters(net, 5)
    torch.manual_seed(2)
    again = initial_parameters(randomized(ConvNet(1, 10, 8, 4, 1)).to(device), 5)
    assert again.device.type == device.type
    assert torch.equal(again.cpu(), first)
    assert not torch.equal(initial_parameters(net, 6), first)


def test_fresh_parameters_are_those_of_a_new_network() -> None:
    torch.manual_seed(5)
    new = flatten_parameters(ConvNet(3, 10, 8, 4, 1))
    assert torch.equal(initial_parameters(ConvNet(3, 10, 8, 4, 1), 5), new)


@pytest.mark.parametrize(
    "make", [lambda: ConvNet(1, 10, 8, 4, 1), Tied], ids=["ConvNet", "buffers"]
)
def test_drawing_leaves_the_network_and_the_global_random_state_alone(
    make: Callable[[], nn.Module],
) -> None:
    net = make()
    net(
        torch.randn(6, 1, 8, 8) if isinstance(net, ConvNet) else torch.randn(6, 4)
    )  # moves the running statistics
    before = {name: value.clone() for name, value in net.state_dict().items()}
    identities = [id(parameter) for parameter in net.parameters()]
    state = torch.get_rng_state()
    initial_parameters(net, 7)
    assert torch.equal(torch.get_rng_state(), state)
    assert [id(parameter) for parameter in net.parameters()] == identities
    for name, value in net.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_drawing_leaves_the_random_states_of_other_devices_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seeds: list[int] = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeds.append)
    torch.manual_seed(3)
    assert seeds == [3]  # that is how torch seeds the GPUs
    initial_parameters(ConvNet(1, 2, 4, 2, 1), 7)
    assert seeds == [3]
