"""Both engines' two computations, each against autograd and against finite differences."""

from __future__ import annotations

import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.utils.prune
from cases import relative_error
from torch import Tensor, nn
from torch.nn import functional as F

import pdd_fast
from pdd_fast import engines
from pdd_fast.engines import AutogradEngine, Engine, FusedEngine
from pdd_fast.engines.convolution import conv, conv_input_grad, conv_weight_grad, operand
from pdd_fast.networks.parameters import initial_parameters

# "composed": the fused engine with the passes of a GPU, which are not one kernel.
FUSED = pytest.mark.parametrize("name", ["fused", "composed"], indirect=True)
BOTH = pytest.mark.parametrize("name", ["fused", "composed", "autograd"], indirect=True)
KEEP = pytest.mark.parametrize("keep", [False, True], ids=["made again", "kept"])


@pytest.fixture
def name(request: pytest.FixtureRequest) -> str:
    """What an engine is called in pdd_fast.engines; also in its tests here, where `engine` is the
    engine itself.
    """
    if request.param != "composed":
        return request.param
    request.getfixturevalue("composed")
    return "fused"


class Point:
    """A network, its parameters, a batch, and a direction, in float64."""

    def __init__(self, device: torch.device | str = "cpu", soft: bool = False) -> None:
        self.net = pdd_fast.ConvNet(2, 4, (9, 7), width=5, depth=2).double().to(device)
        theta = pdd_fast.flatten_parameters(self.net)
        self.theta = theta + 0.2 * torch.randn(len(theta), dtype=torch.float64).to(device)
        self.images = torch.randn(6, 2, 9, 7, dtype=torch.float64).to(device)
        labels = (
            torch.randn(6, 4, dtype=torch.float64).softmax(1) if soft else torch.randint(4, (6,))
        )
        self.labels = labels.to(device)
        self.direction = torch.randn(len(theta), dtype=torch.float64).to(device)

    def loss(self, theta: Tensor, images: Tensor, labels: Tensor) -> Tensor:
        pdd_fast.load_parameters(self.net, theta)
        return F.cross_entropy(self.net(images), labels)

    def engine(self, name: str) -> Engine:
        return engines.choose(self.net, name)


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


# ---- precision ----


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
    message = r"^precision 'bfloat16' needs parameters of torch\.float32, got torch\.float64$"
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


# ---- networks side by side ----


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


# ---- networks that are no longer what their constructor made ----


def an_added_parameter(net: pdd_fast.ConvNet) -> None:
    net.temperature = nn.Parameter(torch.ones(3, dtype=torch.float64))


def weights_shared_by_two_blocks(net: pdd_fast.ConvNet) -> None:
    net.blocks[2][0].weight = net.blocks[1][0].weight


def parameters_in_another_order(net: pdd_fast.ConvNet) -> None:
    weight = net.blocks[0][0].weight
    del net.blocks[0][0].weight
    net.blocks[0][0].weight = weight


def an_own_forward(net: pdd_fast.ConvNet) -> None:
    original = net.forward
    net.forward = lambda images: 2 * original(images)  # type: ignore[method-assign]


def a_hook_on_the_network(net: pdd_fast.ConvNet) -> None:
    net.register_forward_hook(lambda module, inputs, output: 3 * output)


def leaky(net: pdd_fast.ConvNet) -> None:
    net.blocks[2][2] = nn.LeakyReLU(0.1)


def dilated(net: pdd_fast.ConvNet) -> None:
    net.blocks[0][0] = nn.Conv2d(2, net.width, 3, padding=2, dilation=2).double()


def grouped(net: pdd_fast.ConvNet) -> None:
    net.blocks[1][0] = nn.Conv2d(net.width, net.width, 3, padding=1, groups=5).double()


def a_larger_kernel(net: pdd_fast.ConvNet) -> None:
    net.blocks[1][0] = nn.Conv2d(net.width, net.width, 5, padding=2).double()


def a_deeper_classifier(net: pdd_fast.ConvNet) -> None:
    net.classifier = nn.Sequential(
        nn.Linear(net.classifier.in_features, 6), nn.Tanh(), nn.Linear(6, 4)
    ).double()


def weights_of_unit_norm(net: pdd_fast.ConvNet) -> None:
    nn.utils.parametrizations.weight_norm(net.blocks[0][0])


def pruned_classifier(net: pdd_fast.ConvNet) -> None:
    nn.utils.prune.random_unstructured(net.classifier, "weight", 0.4)


OTHER_NETWORKS = [
    an_added_parameter,
    weights_shared_by_two_blocks,
    parameters_in_another_order,
    an_own_forward,
    a_hook_on_the_network,
    leaky,
    dilated,
    grouped,
    a_larger_kernel,
    a_deeper_classifier,
    weights_of_unit_norm,
    pruned_classifier,
]


def three_blocks() -> pdd_fast.ConvNet:
    torch.manual_seed(3)
    return pdd_fast.ConvNet(2, 4, (9, 10), width=5, depth=3).double()


def by_hand(
    net: nn.Module, theta: Tensor, images: Tensor, labels: Tensor, lr: float, steps: int
) -> Tensor:
    """θ_N of plain autograd through all steps, by the network's own call."""
    for _ in range(steps):
        parts, start = {}, 0
        for name, parameter in net.named_parameters():
            parts[name] = theta[start : start + parameter.numel()].view(parameter.shape)
            start += parameter.numel()
        loss = F.cross_entropy(torch.func.functional_call(net, parts, (images,)), labels)
        (gradient,) = torch.autograd.grad(
            loss, theta, create_graph=True, allow_unused=True, materialize_grads=True
        )
        theta = theta - lr * gradient
    return theta


@pytest.mark.parametrize("change", OTHER_NETWORKS, ids=lambda change: change.__name__)
def test_a_changed_network_is_computed_as_it_is(change: Callable[[pdd_fast.ConvNet], None]) -> None:
    """By unroll and by gradient matching, whatever was exchanged; the fused engine says that it
    cannot.
    """
    net = three_blocks()
    change(net)
    theta, images = pdd_fast.flatten_parameters(net), torch.randn(6, 2, 9, 10, dtype=torch.float64)
    labels, batches = torch.arange(6) % 4, [list(range(6))] * 2
    results = []
    for run in (
        lambda x: pdd_fast.unroll(net, theta, x, labels, 0.1, batches),
        lambda x: by_hand(net, theta.clone().requires_grad_(), x, labels, 0.1, 2),
    ):
        x = images.clone().requires_grad_()
        end = run(x)
        results.append((end.detach(), *torch.autograd.grad(end.square().sum(), x)))
    for found, expected in zip(*results, strict=True):
        assert relative_error(found, expected) <= 1e-9
    for call in (
        lambda: pdd_fast.unroll(net, theta, images, labels, 0.1, batches, engine="fused"),
        lambda: pdd_fast.gradient_matching(
            net, theta, images, labels, images, labels, engine="fused"
        ),
    ):
        with pytest.raises(
            ValueError, match=r"net must be .* for engine 'fused', got one that was changed; use"
        ):
            call()
    matched = [
        pdd_fast.gradient_matching(net, theta, images + 1, labels, images, labels, engine=name)
        for name in ("auto", "autograd")
    ]
    assert torch.equal(*matched)
    assert isinstance(
        engines.choose(three_blocks()), FusedEngine
    )  # others of its shape are not disturbed


@pytest.mark.parametrize("classes", [2, 9])
def test_a_classifier_of_another_size_is_fused(classes: int) -> None:
    net = three_blocks()
    net.classifier = nn.Linear(net.classifier.in_features, classes).double()
    theta, images = pdd_fast.flatten_parameters(net), torch.randn(6, 2, 9, 10, dtype=torch.float64)
    found = [
        pdd_fast.unroll(
            net, theta, images, torch.arange(6) % classes, 0.1, [range(6)] * 2, engine=engine
        )
        for engine in ("fused", "autograd")
    ]
    assert relative_error(*found) <= 1e-9
    with pytest.raises(
        ValueError, match=rf"labels must lie in \[0, {classes}\), got 0\.\.{classes}"
    ):
        pdd_fast.unroll(net, theta, images, torch.arange(6) % 2 * classes, 0.1, [range(6)])


def test_logits_of_another_module_are_checked_by_name() -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(12, 3))
    theta, images = pdd_fast.flatten_parameters(net), torch.randn(4, 3, 2, 2)
    for labels, message in (
        (torch.tensor([0, 1, 2, 3]), r"labels must lie in \[0, 3\), got 0\.\.3"),
        (torch.zeros(4, 2), r"labels must have shape \(4, 3\), got \(4, 2\)"),
    ):
        with pytest.raises(ValueError, match=message):
            pdd_fast.unroll(net, theta, images, labels, 0.1, [range(4)])
    flat = nn.Sequential(nn.Flatten(0), nn.Linear(48, 3))
    with pytest.raises(ValueError, match=r"net must give logits \[4, classes\], got \(3,\)"):
        pdd_fast.unroll(
            flat, pdd_fast.flatten_parameters(flat), images, torch.arange(4) % 3, 0.1, [range(4)]
        )


@pytest.mark.parametrize("engine", ["fused", "autograd"])
def test_threads_may_share_a_network(engine: str) -> None:
    """Each with parameters of its own, which torch puts into the module for the time of a call."""
    net = three_blocks()
    images, labels = torch.randn(6, 2, 9, 10, dtype=torch.float64), torch.arange(6) % 4
    starts = [pdd_fast.flatten_parameters(net) + 0.1 * number for number in range(4)]

    def end(start: Tensor) -> tuple[Tensor, Tensor]:
        x = images.clone().requires_grad_()
        result = pdd_fast.unroll(net, start, x, labels, 0.1, [range(6)] * 3, engine=engine)
        return result.detach(), torch.autograd.grad(result.square().sum(), x)[0]

    expected = [end(start) for start in starts]
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(4) as pool:
            for _ in range(5):
                for found, truth in zip(pool.map(end, starts), expected, strict=True):
                    assert all(map(torch.equal, found, truth))
    finally:
        sys.setswitchinterval(before)
    assert all(
        torch.equal(a, b)
        for a, b in zip(net.parameters(), three_blocks().parameters(), strict=True)
    )


def with_statistics() -> nn.Sequential:
    torch.manual_seed(0)
    layers = (
        nn.Conv2d(2, 4, 3),
        nn.BatchNorm2d(4),
        nn.Dropout(0.5),
        nn.Softplus(),
        nn.Flatten(),
        nn.Linear(4 * 56, 4),
    )
    return nn.Sequential(*layers).double().eval()


@pytest.mark.parametrize("memory", ["recompute", "cache"])
def test_buffers_are_those_of_the_call_until_the_backward_pass(memory: str) -> None:
    images, labels = torch.randn(6, 2, 9, 10, dtype=torch.float64), torch.arange(6) % 4
    found = []
    for changed in (False, True):
        net, x = with_statistics(), images.clone().requires_grad_()
        end = pdd_fast.unroll(
            net, pdd_fast.flatten_parameters(net), x, labels, 0.1, [range(6)] * 2, memory=memory
        )
        if changed:
            net[1].running_var.mul_(4)
        found.append(torch.autograd.grad(end.square().sum(), x)[0])
    assert torch.equal(*found)


def test_a_change_of_mode_before_the_backward_pass_is_an_error() -> None:
    net, x = with_statistics(), torch.randn(6, 2, 9, 10, dtype=torch.float64, requires_grad=True)
    end = pdd_fast.unroll(
        net, pdd_fast.flatten_parameters(net), x, torch.arange(6) % 4, 0.1, [range(6)] * 2
    )
    net.train()
    with pytest.raises(
        RuntimeError,
        match="net must stay in training or in evaluation mode until its steps are diff",
    ):
        end.sum().backward()


@pytest.mark.parametrize("engine", ["fused", "autograd"])
def test_autocast_of_the_caller_does_not_reach_the_steps(engine: str) -> None:
    net, images = three_blocks().float(), torch.randn(6, 2, 9, 10)
    theta, labels = pdd_fast.flatten_parameters(net), torch.arange(6) % 4

    def found() -> list[Tensor]:
        x = images.clone().requires_grad_()
        end = pdd_fast.unroll(net, theta, x, labels, 0.1, [range(6)] * 2, engine=engine)
        loss = pdd_fast.gradient_matching(net, theta, images + 1, labels, x, labels, engine=engine)
        return [
            end.detach(),
            *torch.autograd.grad(end.square().sum(), x),
            *torch.autograd.grad(loss, x),
        ]

    expected = found()
    with torch.autocast("cpu", torch.bfloat16):
        again = found()
    assert all(map(torch.equal, again, expected))
