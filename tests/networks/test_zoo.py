"""The networks of the evaluation: their shapes, their norms, and what they say where they cannot
be.
"""

from __future__ import annotations

import sys

import pytest
import torch
from torch import nn

from pdd_fast.networks.parameters import parameter_count
from pdd_fast.networks.zoo import TITLES, accuracy, build, check_names
from pdd_fast.runtime.errors import UsageError

FROM_TORCHVISION = ("resnet18", "resnet18-batchnorm", "vgg11")


def available(name: str) -> bool:
    if name not in FROM_TORCHVISION:
        return True
    try:
        import torchvision  # noqa: F401
    except Exception:  # built for another torch, it fails in ways of its own
        return False
    return True


def require(name: str) -> None:
    if not available(name):
        pytest.skip("torchvision does not import")


@pytest.mark.parametrize("name", TITLES)
@pytest.mark.parametrize(("channels", "size"), [(1, (32, 32)), (3, (32, 32)), (3, (64, 35))])
def test_every_network_learns_from_images_of_its_size(
    name: str, channels: int, size: tuple[int, int]
) -> None:
    require(name)
    torch.manual_seed(0)
    net = build(name, channels, 7, size, width=8)
    images = torch.randn(4, channels, *size)
    logits = net(images)
    assert logits.shape == (4, 7)
    nn.functional.cross_entropy(logits, torch.arange(4)).backward()
    # Not one image is lost on the way: all differ in what they give.
    assert float(logits.detach().std(0).min()) > 0
    for parameter_name, parameter in net.named_parameters():
        assert parameter.grad is not None, parameter_name
    assert any(float(p.grad.abs().max()) > 0 for p in net.parameters() if p.grad is not None)


@pytest.mark.parametrize("name", FROM_TORCHVISION)
def test_norms_are_what_the_name_says(name: str) -> None:
    require(name)
    net = build(name, 3, 10, (32, 32))
    groups = [m for m in net.modules() if isinstance(m, nn.GroupNorm)]
    batches = [m for m in net.modules() if isinstance(m, nn.BatchNorm2d)]
    assert len(batches if name.endswith("batchnorm") else groups) == (8 if name == "vgg11" else 20)
    assert not (groups if name.endswith("batchnorm") else batches)
    assert all(m.num_groups == m.num_channels and m.affine for m in groups)


def test_sizes_are_the_published_ones() -> None:
    assert (
        parameter_count(build("mlp", 3, 10, (32, 32)))
        == 3072 * 128 + 128 + 128 * 128 + 128 + 128 * 10 + 10
    )
    expected = {"resnet18": 11_173_962, "resnet18-batchnorm": 11_173_962, "vgg11": 9_231_114}
    for name, count in expected.items():  # those of CIFAR's versions everywhere
        if available(name):
            assert parameter_count(build(name, 3, 10, (32, 32))) == count
    convolutions = 3 * 128 * 25 + 128 * 192 * 25 + (192 * 256 + 256 * 192 + 192 * 192) * 9
    biases = 128 + 192 + 256 + 192 + 192
    assert (
        parameter_count(build("alexnet", 3, 10, (32, 32)))
        == convolutions + biases + 192 * 16 * 10 + 10
    )


def test_a_network_is_drawn_from_the_global_random_state() -> None:
    for name in ("alexnet", "mlp", "convnet"):
        torch.manual_seed(3)
        one = build(name, 1, 3, (8, 8), 4, 2).state_dict()
        torch.manual_seed(3)
        other = build(name, 1, 3, (8, 8), 4, 2).state_dict()
        assert all(torch.equal(one[key], other[key]) for key in one)
        assert not torch.equal(
            next(build(name, 1, 3, (8, 8), 4, 2).parameters()), next(iter(one.values()))
        )


@pytest.mark.parametrize(
    ("name", "least"), [("resnet18", 16), ("resnet18-batchnorm", 8), ("vgg11", 32), ("alexnet", 8)]
)
def test_too_small_images_are_refused(name: str, least: int) -> None:
    with pytest.raises(
        UsageError, match=rf"must be at least {least} pixels per side for network '{name}', got"
    ):
        build(name, 3, 10, (least - 1, 64))
    require(name)
    assert build(name, 3, 10, (least, least))(torch.randn(3, 3, least, least)).std(0).min() > 0


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (
            ["resnet"],
            r"networks must be from convnet, .*, mlp, got 'resnet'; did you mean 'resnet18'\?",
        ),
        ([], "networks must be one or more, each named once, got none"),
        (["mlp", "mlp"], "networks must be one or more, each named once, got mlp, mlp"),
    ],
)
def test_unknown_and_repeated_names_are_refused(names: list[str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        check_names(names)


def test_a_torchvision_that_does_not_import_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "torchvision", None)
    with pytest.raises(
        UsageError, match=r"^network 'vgg11' needs torchvision, which does not import here"
    ):
        build("vgg11", 3, 10, (32, 32))
    assert build("alexnet", 3, 10, (32, 32)) is not None


def test_accuracy_is_that_of_a_network_in_use() -> None:
    """In training, dropout and batch statistics would make it another."""

    class Picky(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return nn.functional.one_hot(
                x[:, 0, 0, 0].long() if not self.training else x[:, 0, 0, 1].long(), 3
            ).float()

    images = torch.tensor([[0.0, 1], [1, 0], [2, 0], [2, 1], [0, 0]]).view(5, 1, 1, 2)
    net = Picky()
    assert accuracy(net, images, torch.tensor([0, 1, 2, 0, 1]), batch=2) == 60.0
    assert net.training
