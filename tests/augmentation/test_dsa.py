"""DSA: what is drawn, what is applied, and that the adjoint is the transpose of what is applied."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from augmentation_support import DRAWN, EVERYTHING, OPERATIONS, RANGES, color, generator
from cases import layouts
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from pdd_fast.augmentation.dsa import DSA, augment, augment_adjoint
from pdd_fast.augmentation.parameters import AugmentParameters
from pdd_fast.ops import dsa as dsa_ops

SHAPES = [
    (3, 1, 8, 8),
    (2, 3, 7, 5),
    (1, 3, 9, 17),
    (3, 2, 1, 6),
    (2, 1, 6, 1),
    (4, 1, 1, 1),
    (2, 3, 16, 16),
]


# Tolerances relative to the largest pixel. The reference is computed in float64.
TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-12}


def moved(image: Tensor, source: Callable[[int, int], tuple[int, int] | None]) -> Tensor:
    """out[:, i, j] = image[:, source(i, j)], zero where that is None or outside."""
    _, H, W = image.shape
    out = torch.zeros_like(image)
    for i in range(H):
        for j in range(W):
            at = source(i, j)
            if at is not None and 0 <= at[0] < H and 0 <= at[1] < W:
                out[:, i, j] = image[:, at[0], at[1]]
    return out


def sampled(image: Tensor, matrix: list[list[float]]) -> Tensor:
    grid = F.affine_grid(
        torch.tensor([matrix], dtype=torch.float64), [1, *image.shape], align_corners=True
    )
    return F.grid_sample(
        image[None], grid, mode="bilinear", padding_mode="zeros", align_corners=True
    )[0]


def augmented(image: Tensor, operations: tuple[str, ...], p: AugmentParameters, b: int) -> Tensor:
    """Design 3.4 for image ``b``, [C, H, W] in float64."""
    _, H, W = image.shape
    draw: dict[str, Any] = {name: getattr(p, name)[b].item() for name in DRAWN}
    for operation in operations:
        if operation == "color":
            image = color(image, draw["brightness"], draw["saturation"], draw["contrast"])
        elif operation == "crop":
            u, v = draw["shift_h"], draw["shift_w"]
            image = moved(image, lambda i, j, u=u, v=v: (i + u, j + v))
        elif operation == "cutout":
            high, wide = int(H / 2 + 0.5), int(W / 2 + 0.5)
            top, left = draw["cutout_h"] - high // 2, draw["cutout_w"] - wide // 2
            rows, columns = range(top, top + high), range(left, left + wide)
            image = moved(
                image, lambda i, j, r=rows, c=columns: None if i in r and j in c else (i, j)
            )
        elif operation == "flip":
            if draw["flip"]:
                image = moved(image, lambda i, j, w=W: (i, w - 1 - j))
        elif operation == "scale":
            image = sampled(image, [[draw["scale_w"], 0, 0], [0, draw["scale_h"], 0]])
        else:
            cosine, sine = math.cos(draw["angle"]), math.sin(draw["angle"])
            image = sampled(image, [[cosine, -sine, 0], [sine, cosine, 0]])
    return image


def worst(found: Tensor, expected: Tensor) -> float:
    """Largest difference of a pixel, in units of the largest pixel."""
    difference = float((found.double().cpu() - expected).abs().max())
    largest = float(expected.abs().max())
    return difference / largest if largest > 0 else difference


# ---- what is applied ----


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(
    "strategy", [*OPERATIONS, EVERYTHING, "rotate_scale_flip_cutout_crop_color"]
)
def test_every_operation_equals_the_formula_in_every_layout(
    strategy: str, shape: tuple[int, int, int, int], device: torch.device
) -> None:
    p = DSA(strategy, mode="multiple").sample(shape[0], (shape[2], shape[3]), generator(1))
    single_precision = torch.randn(shape)
    operations = tuple(strategy.split("_"))
    exact = single_precision.double()
    expected = torch.stack([augmented(image, operations, p, b) for b, image in enumerate(exact)])
    for dtype, tolerance in TOLERANCE.items():
        for images in layouts(single_precision.to(dtype)):
            found = augment(images.to(device), p)
            assert found.dtype == dtype
            assert worst(found, expected) <= tolerance


@pytest.mark.parametrize("strategy", ["scale", "rotate", "crop", "cutout"])
def test_draws_far_out_of_the_usual_ranges_follow_the_formula_too(
    strategy: str, device: torch.device
) -> None:
    values: list[dict[str, float]] = [
        {"scale_h": 0.0, "scale_w": 0.0, "angle": math.pi / 2, "shift_h": 7, "cutout_h": -3},
        {"scale_h": -1.0, "scale_w": 1e-3, "angle": math.pi, "shift_w": -5, "cutout_w": 30},
        {
            "scale_h": 0.1,
            "scale_w": 30.0,
            "angle": -1.1,
            "shift_h": -100,
            "cutout_h": 6,
            "cutout_w": 4,
        },
        {"scale_h": 3.7, "scale_w": -0.4, "angle": 1e3, "shift_w": 1000, "cutout_w": -9},
    ]
    draws = {
        name: torch.tensor([value.get(name, 0) for value in values])
        for name in DRAWN
        if name != "flip"
    }
    p = AugmentParameters.of((strategy,), len(values), (7, 5), **draws)
    images = torch.randn(len(values), 3, 7, 5, dtype=torch.float64)
    expected = torch.stack([augmented(image, (strategy,), p, b) for b, image in enumerate(images)])
    assert worst(augment(images.to(device), p), expected) <= 1e-12
    # The columns of A, one unit image each: the adjoint must be their transpose.
    units = torch.eye(35, dtype=torch.float64).view(35, 1, 7, 5)
    for b in range(len(values)):
        repeated = p[torch.full((35,), b)]
        matrix = torch.stack(
            [augmented(unit, (strategy,), repeated, 0).flatten() for unit in units]
        )  # rows: A e_k
        transposed = augment_adjoint(units.to(device), repeated).view(35, 35)
        assert worst(transposed, matrix.t()) <= 1e-12


@pytest.mark.parametrize(
    "draw", ["scale_h", "scale_w", "angle", "shift_h", "shift_w", "cutout_h", "cutout_w"]
)
def test_draws_that_fit_no_integer_move_everything_out_of_sight(
    draw: str, device: torch.device
) -> None:
    operation = next(strategy for strategy, name, _, _ in RANGES if name == draw)
    whole = draw.startswith(("shift", "cutout"))
    limits = torch.iinfo(torch.int64)
    values = [limits.min, limits.max, 10**17] if whole else [math.inf, -math.inf, math.nan, 1e300]
    p = AugmentParameters.of((operation,), len(values), 6, **{draw: torch.tensor(values)})
    images = torch.rand(len(values), 2, 6, 6, device=device) + 1
    expected = images if operation == "cutout" else torch.zeros_like(images)
    assert torch.equal(augment(images, p), expected)
    assert torch.equal(augment_adjoint(images, p), expected)


def test_operations_are_applied_in_the_order_of_the_strategy() -> None:
    images = torch.rand(1, 1, 4, 4)
    draws = {"shift_w": torch.tensor([1]), "flip": torch.tensor([True])}
    shifted_first = augment(images, AugmentParameters.of(("crop", "flip"), 1, 4, **draws))
    flipped_first = augment(images, AugmentParameters.of(("flip", "crop"), 1, 4, **draws))
    zero = torch.zeros(1, 1, 4, 1)
    assert torch.equal(shifted_first, torch.cat([zero, images[..., 1:].flip(3)], 3))
    assert torch.equal(flipped_first, torch.cat([images.flip(3)[..., 1:], zero], 3))
    assert DSA("flip_crop", mode="multiple").sample(1, 4).operations == ("flip", "crop")


@pytest.mark.parametrize("channels", [1, 3])
def test_the_memory_format_of_the_images_is_kept(channels: int, device: torch.device) -> None:
    p = DSA(EVERYTHING, mode="multiple").sample(2, (6, 4))
    planar = torch.randn(2, channels, 6, 4, device=device)
    last = planar.contiguous(memory_format=torch.channels_last)
    for function in (augment, augment_adjoint):
        assert function(planar, p).is_contiguous()
        assert function(last, p).is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(function(planar, p), function(last, p))


@pytest.mark.parametrize("shape", [(3, 1, 5, 4), (3, 4, 1, 1), (1, 3, 5, 4), (3, 1, 1, 1)], ids=str)
def test_strides_of_sides_of_one_do_not_matter(
    shape: tuple[int, int, int, int], device: torch.device
) -> None:
    # torch calls such tensors contiguous in both formats, whatever stride the single element has.
    p = DSA(EVERYTHING, mode="multiple").sample(shape[0], (shape[2], shape[3]))
    images = torch.randn(shape, device=device)
    strides = [
        999 if side == 1 else stride for side, stride in zip(shape, images.stride(), strict=True)
    ]
    odd = torch.as_strided(images, shape, strides)
    assert torch.equal(augment(odd, p), augment(images, p))
    assert torch.equal(augment_adjoint(odd, p), augment_adjoint(images, p))


def test_expanded_and_negated_views_are_read_right(device: torch.device) -> None:
    p = DSA(EVERYTHING, mode="multiple").sample(3, 5)
    one = torch.randn(1, 2, 5, 5, device=device)
    assert torch.equal(augment(one.expand(3, 2, 5, 5), p), augment(one.repeat(3, 1, 1, 1), p))
    negated = torch.complex(one, one).conj().imag.expand(3, 2, 5, 5)
    assert negated.is_neg()
    assert torch.equal(augment(negated, p), augment(-one.repeat(3, 1, 1, 1), p))


@st.composite
def batches(draw: st.DrawFn) -> tuple[Tensor, AugmentParameters]:
    """Sizes around those of vectors, of four pixels and of four channels: the kernels have code of
    its own for each.
    """
    shape = (
        draw(st.integers(1, 3)),
        draw(st.integers(1, 9)),
        draw(st.integers(1, 21)),
        draw(st.integers(1, 37)),
    )
    operations = draw(st.lists(st.sampled_from(OPERATIONS), min_size=1, max_size=3))
    p = DSA(
        "_".join(dict.fromkeys(operations)),
        mode="multiple",
        crop=draw(st.sampled_from([0.125, 1.0])),
    )
    seed = draw(st.integers(0, 2**32))
    dtype = draw(st.sampled_from([torch.float32, torch.float64]))
    return torch.randn(shape, generator=generator(seed), dtype=dtype), p.sample(
        shape[0], shape[2:], generator(seed)
    )


@given(batches())
def test_bits_do_not_depend_on_the_layout(batch: tuple[Tensor, AugmentParameters]) -> None:
    images, p = batch
    packed = p.packed(torch.device("cpu"))
    reference = (packed.values, packed.operations, list(packed.cutout_size))
    for function, expected in (
        (augment, dsa_ops.dsa.reference(images.double(), *reference, False)),
        (augment_adjoint, dsa_ops.dsa_adjoint.reference(images.double(), *reference)),
    ):
        first = function(images, p)
        assert worst(first, expected) <= 2 * TOLERANCE[images.dtype]
        for other in layouts(images):
            assert torch.equal(function(other, p), first)


@pytest.mark.parametrize("strategy", OPERATIONS)
def test_an_expanded_gradient_is_read_right(strategy: str, device: torch.device) -> None:
    """The gradient of a sum is one number with strides of 0."""
    p = DSA(strategy).sample(3, (7, 9), generator(10))
    for channels in (1, 3):
        one = torch.tensor(0.7, device=device)
        assert torch.equal(
            augment_adjoint(one.expand(3, channels, 7, 9), p),
            augment_adjoint(torch.full((3, channels, 7, 9), 0.7, device=device), p),
        )


@pytest.mark.usefixtures("every_region_shared")
@pytest.mark.parametrize("strategy", [*OPERATIONS, EVERYTHING])
def test_bits_do_not_depend_on_the_number_of_threads(strategy: str) -> None:
    p = DSA(strategy, mode="multiple").sample(150, 20, generator(11))
    images, threads = torch.randn(150, 3, 20, 20), torch.get_num_threads()
    found = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append((augment(images, p), augment_adjoint(images, p)))
    finally:
        torch.set_num_threads(threads)
    for forward, adjoint in found[1:]:
        assert torch.equal(forward, found[0][0])
        assert torch.equal(adjoint, found[0][1])


def test_no_operation_leaves_the_images_alone() -> None:
    images = torch.randn(2, 3, 4, 4)
    for strategy in ("none", "None", ""):
        p = DSA(strategy).sample(2, 4)
        assert p.operations == ()
        assert torch.equal(augment(images, p), images)
        assert torch.equal(augment_adjoint(images, p), images)


def test_draws_of_operations_that_are_not_applied_change_nothing() -> None:
    p = DSA("flip").sample(4, 6)
    images = torch.randn(4, 3, 6, 6, dtype=torch.float64)
    # Cutout blanks whatever its center is; all others do nothing with what "flip" leaves in their
    # draws.
    others = AugmentParameters.of(
        ("color", "crop", "scale", "rotate"),
        4,
        6,
        **{name: getattr(p, name) for name in DRAWN if name != "flip"},
    )
    torch.testing.assert_close(augment(images, others), images, rtol=1e-12, atol=1e-12)


@st.composite
def problems(draw: st.DrawFn) -> tuple[tuple[int, int, int, int], AugmentParameters, int]:
    shape = tuple(draw(st.integers(1, most)) for most in (3, 4, 9, 9))
    operations = draw(st.lists(st.sampled_from(OPERATIONS), min_size=1, max_size=6, unique=True))
    seed = draw(st.integers(0, 2**32))
    wide = {
        "crop": draw(st.sampled_from([0.125, 1.0])),
        "cutout": draw(st.sampled_from([0.5, 0.0, 1.0])),
    }
    wide |= {
        "scale": draw(st.sampled_from([1.2, 1.0, 9.0])),
        "rotate": draw(st.sampled_from([15.0, 0.0, 180.0])),
    }
    dsa = DSA("_".join(operations), mode="multiple", **wide)
    return shape, dsa.sample(shape[0], (shape[2], shape[3]), generator(seed)), seed  # type: ignore[return-value]


# ---- its derivative ----


@given(problems())
def test_the_adjoint_is_the_transpose(
    problem: tuple[tuple[int, int, int, int], AugmentParameters, int],
) -> None:
    shape, p, seed = problem
    x, y = torch.randn(2, *shape, dtype=torch.float64, generator=generator(seed)).unbind()
    zero = augment(torch.zeros_like(x), p)  # what brightness adds
    forward, backward = (augment(x, p) - zero) * y, x * augment_adjoint(y, p)
    scale = float(forward.abs().sum() + backward.abs().sum()) + float(zero.abs().max())
    assert abs(float(forward.sum() - backward.sum())) <= 1e-13 * (scale + 1)


@pytest.mark.parametrize("strategy", [*OPERATIONS, EVERYTHING])
@pytest.mark.parametrize("channels_last", [False, True], ids=["planar", "channels-last"])
@pytest.mark.filterwarnings(
    "ignore:`torch.jit.script` is deprecated"
)  # torch's own forward-mode rules use it
def test_gradients_of_first_and_second_order(
    strategy: str, channels_last: bool, device: torch.device
) -> None:
    p = DSA(strategy, mode="multiple").sample(2, (4, 3), generator(2))
    images = torch.randn(2, 2, 4, 3, dtype=torch.float64)
    if channels_last:
        images = images.contiguous(memory_format=torch.channels_last)
    images = images.to(device).requires_grad_()

    def cubed(x: Tensor) -> Tensor:  # a linear map alone would have a second derivative of 0
        return augment(x, p) ** 3 + augment_adjoint(x, p) ** 2

    assert torch.autograd.gradcheck(cubed, (images,), check_forward_ad=True)
    assert torch.autograd.gradgradcheck(
        cubed, (images,), check_fwd_over_rev=True, check_rev_over_rev=True
    )


def test_gradients_do_not_see_brightness() -> None:
    p = AugmentParameters.of(("color",), 1, 3, brightness=torch.tensor([0.4]))
    images = torch.zeros(1, 1, 3, 3, dtype=torch.float64, requires_grad=True)
    assert torch.allclose(augment(images, p), torch.tensor(0.4, dtype=torch.float64))
    (first,) = torch.autograd.grad((augment(images, p) ** 2).sum(), images, create_graph=True)
    assert torch.allclose(first, torch.tensor(0.8, dtype=torch.float64))
    (second,) = torch.autograd.grad(first.sum(), images)
    assert torch.allclose(second, torch.tensor(2.0, dtype=torch.float64))
    # The transpose of the transpose is the linear part alone.
    images = torch.full_like(images, 0.3).requires_grad_()
    (back,) = torch.autograd.grad(
        (augment_adjoint(images, p) ** 2).sum(), images, create_graph=True
    )
    assert torch.allclose(back, torch.tensor(0.6, dtype=torch.float64))


def test_tangents_are_carried_along_where_no_gradient_is_asked_for() -> None:
    p = DSA(EVERYTHING, mode="multiple").sample(2, 5)
    images, tangent = torch.randn(2, 2, 3, 5, 5, dtype=torch.float64).unbind()
    zero = torch.zeros_like(images)
    with torch.no_grad(), torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(images, tangent)
        value, derivative = torch.autograd.forward_ad.unpack_dual(augment(dual, p))
        _, adjoint = torch.autograd.forward_ad.unpack_dual(augment_adjoint(dual, p))
    assert torch.equal(value, augment(images, p))
    assert derivative is not None
    torch.testing.assert_close(
        derivative, augment(tangent, p) - augment(zero, p), rtol=1e-12, atol=1e-12
    )
    assert adjoint is not None
    assert torch.equal(adjoint, augment_adjoint(tangent, p))
    # torch.func wants another kind of function: it must say so and not take the derivative for
    # zero.
    with pytest.raises(RuntimeError, match="setup_context"):
        torch.func.jvp(lambda x: augment(x, p), (images,), (tangent,))


def test_no_graph_is_recorded_where_none_is_wanted() -> None:
    p = DSA(EVERYTHING).sample(2, 4)
    images = torch.randn(2, 1, 4, 4, requires_grad=True)
    with torch.no_grad():
        assert not augment(images, p).requires_grad
    assert not augment(images.detach(), p).requires_grad
    assert augment(images, p).requires_grad
