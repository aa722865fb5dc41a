"""Both engines' two computations, each against autograd and against finite differences."""

from __future__ import annotations

import pytest
import torch
import torch.nn.utils.prune
from cases import relative_error
from engines_support import BOTH, KEEP, Point
from torch import Tensor, nn
from torch.nn import functional as F

import pdd_fast
from pdd_fast import engines
from pdd_fast.engines import AutogradEngine, FusedEngine

# "composed": the fused engine with the passes of a GPU, which are not one kernel.
FUSED = pytest.mark.parametrize("name", ["fused", "composed"], indirect=True)


def test_auto_is_fused_for_the_convnet_alone() -> None:
    class Other(pdd_fast.ConvNet):
        """May have another forward, for all the engine knows."""

    assert isinstance(engines.choose(pdd_fast.ConvNet(1, 2, 4, 3, 1)), FusedEngine)
    assert isinstance(engines.choose(pdd_fast.ConvNet(1, 2, 4, 3, 1), "autograd"), AutogradEngine)
    assert isinstance(engines.choose(Other(1, 2, 4, 3, 1)), AutogradEngine)
    assert isinstance(engines.choose(nn.Linear(2, 2)), AutogradEngine)
    with pytest.raises(
        ValueError, match=r"net must be a pdd_fast\.ConvNet .* for engine 'fused', got Linear"
    ):
        engines.choose(nn.Linear(2, 2), "fused")
    with pytest.raises(ValueError, match="engine must be one of auto, fused, autograd, got 'slow'"):
        engines.choose(nn.Linear(2, 2), "slow")
    for net in (pdd_fast.ConvNet(1, 2, 4, 3, 1), nn.Linear(2, 2)):
        assert engines.choose(net).precision == "float32"
        assert engines.choose(net, precision="tf32").precision == "tf32"
        with pytest.raises(
            ValueError, match="precision must be one of float32, tf32, bfloat16, got 'half'"
        ):
            engines.choose(net, precision="half")


@BOTH
@KEEP
@pytest.mark.parametrize("soft", [False, True], ids=["hard", "soft"])
def test_gradient_is_that_of_the_mean_loss(
    name: str, keep: bool, soft: bool, device: torch.device
) -> None:
    point = Point(device, soft)
    losses, gradient, _ = point.engine(name).gradient(
        point.theta, point.images, point.labels, keep=keep
    )
    pdd_fast.load_parameters(point.net, point.theta)
    truth = F.cross_entropy(point.net(point.images), point.labels, reduction="none")
    grads = torch.autograd.grad(truth.mean(), list(point.net.parameters()))
    assert relative_error(losses, truth) <= 1e-12
    assert relative_error(gradient, torch.cat([g.flatten() for g in grads])) <= 1e-12


@BOTH
@KEEP
def test_dual_is_the_derivative_of_the_gradient_along_the_direction(name: str, keep: bool) -> None:
    """Central differences of the engine's own first-order gradient, at a step where they are good
    to 1e-7.
    """
    point, step = Point(soft=True), 1e-5
    engine = point.engine(name)
    _, gradient, saved = engine.gradient(point.theta, point.images, point.labels, keep=keep)
    dual = engine.dual(point.theta, point.images, point.labels, point.direction, saved)

    ahead, behind = (
        engine.gradient(point.theta + sign * step * point.direction, point.images, point.labels)[1]
        for sign in (1, -1)
    )
    assert dual.theta is not None
    assert relative_error(dual.theta, (ahead - behind) / (2 * step)) <= 1e-6
    assert relative_error(dual.slope, gradient @ point.direction) <= 1e-12

    def slope(images: Tensor, labels: Tensor) -> Tensor:
        return engine.gradient(point.theta, images, labels)[1] @ point.direction

    towards = torch.randn_like(point.images)
    change = slope(point.images + step * towards, point.labels) - slope(
        point.images - step * towards, point.labels
    )
    assert dual.images is not None
    assert relative_error((dual.images * towards).sum(), change / (2 * step)) <= 1e-6
    towards = torch.randn_like(point.labels)
    change = slope(point.images, point.labels + step * towards) - slope(
        point.images, point.labels - step * towards
    )
    assert dual.labels is not None
    assert relative_error((dual.labels * towards).sum(), change / (2 * step)) <= 1e-6


@FUSED
@KEEP
@pytest.mark.parametrize("rows", [[0], [5, 1, 1, 3], [], None], ids=str)
def test_both_engines_give_the_wanted_rows(
    name: str, keep: bool, rows: list[int] | None, device: torch.device
) -> None:
    point = Point(device)
    index = None if rows is None else torch.tensor(rows, dtype=torch.int64, device=device)
    found = []
    for engine in (point.engine(name), point.engine("autograd")):
        saved = engine.gradient(point.theta, point.images, point.labels, keep=keep)[2]
        found.append(
            engine.dual(point.theta, point.images, point.labels, point.direction, saved, rows=index)
        )
    fused, autograd = found
    assert relative_error(fused.slope, autograd.slope) <= 1e-11
    assert fused.theta is not None
    assert autograd.theta is not None
    assert relative_error(fused.theta, autograd.theta) <= 1e-11
    assert fused.labels is None
    assert autograd.labels is None
    if rows == []:
        assert fused.images is None
        assert autograd.images is None
    else:
        assert fused.images is not None
        assert autograd.images is not None
        assert (
            fused.images.shape
            == autograd.images.shape
            == (6 if rows is None else len(rows), 2, 9, 7)
        )
        assert relative_error(fused.images, autograd.images) <= 1e-11


@BOTH
def test_without_the_hessian_vector_product(name: str) -> None:
    point = Point()
    engine = point.engine(name)
    saved = engine.gradient(point.theta, point.images, point.labels)[2]
    dual = engine.dual(
        point.theta, point.images, point.labels, point.direction, saved, want_theta=False
    )
    full = engine.dual(point.theta, point.images, point.labels, point.direction, saved)
    assert dual.theta is None
    assert dual.images is not None
    assert full.images is not None
    assert torch.equal(dual.images, full.images)


@FUSED
def test_the_bias_in_front_of_an_instance_norm_has_exactly_no_gradient(name: str) -> None:
    point = Point()
    engine = point.engine(name)
    _, gradient, saved = engine.gradient(point.theta, point.images, point.labels)
    dual = engine.dual(point.theta, point.images, point.labels, point.direction, saved)
    start = 0
    for key, parameter in point.net.named_parameters():
        part = slice(start, start + parameter.numel())
        start += parameter.numel()
        if key.endswith("0.bias"):
            assert not gradient[part].any()
            assert dual.theta is not None
            assert not dual.theta[part].any()
        else:
            assert gradient[part].any(), key


@BOTH
def test_logits_are_those_of_the_module(name: str, device: torch.device) -> None:
    point = Point(device)
    pdd_fast.load_parameters(point.net, point.theta)
    logits = point.engine(name).logits(point.theta, point.images)
    assert not logits.requires_grad
    assert relative_error(logits, point.net(point.images)) <= 1e-12


@BOTH
def test_planar_and_channels_last_images_give_the_same(name: str) -> None:
    point = Point()
    engine = point.engine(name)
    planar = engine.gradient(point.theta, point.images, point.labels)[1]
    last = point.images.contiguous(memory_format=torch.channels_last)
    assert relative_error(engine.gradient(point.theta, last, point.labels)[1], planar) <= 1e-13
