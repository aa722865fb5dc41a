"""DSA: what is drawn, what is applied, and that the adjoint is the transpose of what is applied."""

from __future__ import annotations

import math

import pytest
import torch
from augmentation_support import DRAWN, EVERYTHING, OPERATIONS, RANGES, generator
from torch import Tensor

from pdd_fast.augmentation.dsa import DSA, augment, augment_adjoint
from pdd_fast.augmentation.parameters import AugmentParameters, PackedAugmentParameters

# ---- what is drawn ----


@pytest.mark.parametrize(
    ("strategy", "draw", "low", "high"), RANGES, ids=[draw for _, draw, _, _ in RANGES]
)
def test_draws_fill_their_ranges(
    strategy: str, draw: str, low: float | int, high: float | int
) -> None:
    count = 20_000
    values = getattr(DSA(strategy).sample(count, (16, 11), generator(3)), draw)
    assert values.shape == (count,)
    if isinstance(low, int):
        assert values.dtype == torch.int64
        counts = torch.bincount(values - low, minlength=int(high - low + 1))
        assert len(counts) == high - low + 1  # bincount would have refused a negative number
        share = 1 / len(counts)
        assert float((counts / count - share).abs().max()) < 5 * math.sqrt(share / count)
    else:
        assert values.dtype == torch.float64
        assert low <= float(values.min())
        assert float(values.max()) <= high
        # Kolmogorov-Smirnov: a uniform sample exceeds 2.5 / sqrt(n) once in 130,000 times.
        positions = ((values - low) / (high - low)).sort().values
        assert float(
            (positions - (torch.arange(count) + 0.5) / count).abs().max()
        ) < 2.5 / math.sqrt(count)


def test_a_cutout_of_odd_size_leaves_the_last_center_out() -> None:
    p = DSA("cutout").sample(4000, (10, 8), generator())
    assert p.cutout_size == (5, 4)
    assert (int(p.cutout_h.min()), int(p.cutout_h.max())) == (0, 9)
    assert (int(p.cutout_w.min()), int(p.cutout_w.max())) == (0, 8)


@pytest.mark.parametrize("probability", [0.0, 0.5, 0.8, 1.0])
def test_the_share_of_mirrored_images(probability: float) -> None:
    flip = DSA("flip", flip=probability).sample(10_000, 4, generator(4)).flip
    assert flip.dtype == torch.bool
    share = float(flip.double().mean())
    assert abs(share - probability) <= 5 * math.sqrt(probability * (1 - probability) / 10_000)


def test_settings_change_the_ranges() -> None:
    dsa = DSA(
        EVERYTHING,
        "multiple",
        brightness=0.2,
        saturation=1,
        contrast=0.1,
        crop=0.5,
        cutout=1,
        scale=1,
        rotate=90,
    )
    p = dsa.sample(5000, 6, generator(5))
    for draw, low, high in (
        ("brightness", -0.1, 0.1),
        ("saturation", 0, 1),
        ("contrast", 0.9, 1.1),
        ("angle", -math.pi / 2, math.pi / 2),
    ):
        values, slack = getattr(p, draw), (high - low) / 200
        assert low <= float(values.min()) <= low + slack
        assert high - slack <= float(values.max()) <= high
    assert p.cutout_size == (6, 6)
    assert (int(p.shift_h.min()), int(p.shift_h.max())) == (-3, 3)
    assert torch.equal(p.scale_h, torch.ones(5000, dtype=torch.float64))


@pytest.mark.parametrize("batch_size", [1, 20])
def test_a_seed_keeps_its_draws(batch_size: int) -> None:
    """Results that were recorded depend on them: these calls, in this order."""
    height, width, p = (
        32,
        20,
        DSA(EVERYTHING, mode="multiple").sample(batch_size, (32, 20), generator(12)),
    )
    g = generator(12)

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(batch_size, dtype=torch.float64, generator=g)

    def integer(low: int, high: int) -> Tensor:
        return torch.randint(low, high + 1, (batch_size,), generator=g)

    most = math.radians(15)
    for name, expected in (
        ("brightness", uniform(-0.5, 0.5)),
        ("saturation", uniform(0, 2)),
        ("contrast", uniform(0.5, 1.5)),
        ("shift_h", integer(-4, 4)),
        ("shift_w", integer(-3, 3)),
        ("cutout_h", integer(0, height)),
        ("cutout_w", integer(0, width)),
        ("flip", uniform(0, 1) < 0.5),
        ("scale_w", uniform(1 / 1.2, 1.2)),
        ("scale_h", uniform(1 / 1.2, 1.2)),
        ("angle", uniform(-most, most)),
    ):
        found = getattr(p, name)
        assert found.dtype == expected.dtype
        assert torch.equal(found, expected), name
    single = DSA(EVERYTHING).sample(batch_size, 32, generator(13))
    g = generator(13)
    assert single.operations == (OPERATIONS[int(torch.randint(6, (), generator=g))],)


@pytest.mark.parametrize("batch_size", [1, 4])
def test_a_draw_leaves_the_neutral_values_of_the_next_alone(batch_size: int) -> None:
    for strategy in OPERATIONS:
        p = DSA(strategy).sample(batch_size, 8, generator(14))
        for draw in (
            DRAWN - {name for operation, name, _, _ in RANGES if operation == strategy} - {strategy}
        ):
            neutral = float(draw in ("saturation", "contrast", "scale_h", "scale_w"))
            assert getattr(p, draw).double().tolist() == [neutral] * batch_size


def test_single_mode_draws_every_operation_about_equally_often() -> None:
    dsa, draw, count = DSA(EVERYTHING), generator(6), 1800
    names = [dsa.sample(1, 4, draw).operations for _ in range(count)]
    assert all(len(name) == 1 for name in names)
    expected = count / len(OPERATIONS)
    squares = sum((names.count((name,)) - expected) ** 2 / expected for name in OPERATIONS)
    assert squares < 25  # chi-squared with 5 degrees of freedom: once in 7000 times
    assert set(names) == {(name,) for name in OPERATIONS}


@pytest.mark.parametrize("strategy", OPERATIONS)
def test_every_image_has_numbers_of_its_own(strategy: str) -> None:
    p = DSA(strategy).sample(64, 32, generator(7))
    drawn = {draw for name, draw, _, _ in RANGES if name == strategy} or {"flip"}
    for draw in DRAWN:
        assert (len(getattr(p, draw).unique()) > 1) == (draw in drawn), draw
    if len(drawn) > 1:
        a, b = (getattr(p, draw).double() for draw in sorted(drawn)[:2])
        assert (
            abs(float(torch.corrcoef(torch.stack([a, b]))[0, 1])) < 0.6
        )  # height and width are drawn apart


@pytest.mark.parametrize("mode", ["single", "multiple"])
def test_a_generator_makes_the_draws_reproducible_and_leaves_the_global_one_alone(
    mode: str,
) -> None:
    dsa = DSA(EVERYTHING, mode=mode)
    torch.manual_seed(1)
    first = dsa.sample(5, 8, generator(8))
    torch.manual_seed(2)
    state = torch.get_rng_state()
    again, other = dsa.sample(5, 8, generator(8)), dsa.sample(5, 8, generator(9))
    assert torch.equal(torch.get_rng_state(), state)
    assert first.operations == again.operations
    cpu = torch.device("cpu")
    assert torch.equal(first.packed(cpu).values, again.packed(cpu).values)
    assert not torch.equal(first.packed(cpu).values, other.packed(cpu).values)


def test_without_a_generator_the_global_one_is_used() -> None:
    dsa, cpu = DSA(EVERYTHING), torch.device("cpu")
    torch.manual_seed(3)
    first = dsa.sample(5, 8)
    second = dsa.sample(5, 8)
    torch.manual_seed(3)
    again = dsa.sample(5, 8)
    assert torch.equal(first.packed(cpu).values, again.packed(cpu).values)
    assert not torch.equal(first.packed(cpu).values, second.packed(cpu).values)


def test_draws_made_on_a_device_stay_there(device: torch.device) -> None:
    for strategy in (*OPERATIONS, "none"):
        p = DSA(strategy).sample(3, 8, torch.Generator(device).manual_seed(0))
        assert {getattr(p, draw).device.type for draw in DRAWN} == {device.type}
        assert augment(torch.randn(3, 2, 8, 8), p).device.type == "cpu"


# ---- parameters as values ----


@pytest.mark.parametrize(
    "rows",
    [torch.tensor([2, 0, 2]), torch.tensor([True, False, True, True]), slice(1, 3)],
    ids=["numbers", "mask", "slice"],
)
def test_a_subset_of_the_parameters_augments_a_subset_of_the_images(
    rows: Tensor | slice, device: torch.device
) -> None:
    p = DSA(EVERYTHING, mode="multiple").sample(4, (6, 5)).to(device)
    images = torch.randn(4, 3, 6, 5, device=device)
    part = p[rows]
    expected = augment(images, p)[rows]
    assert len(part) == len(expected)
    assert torch.equal(augment(images[rows], part), expected)
    assert (part.operations, part.image_size, part.cutout_size) == (
        p.operations,
        p.image_size,
        p.cutout_size,
    )


@pytest.mark.parametrize("lengths", [(2, 3, 1), (2, 2, 2), (4,)], ids=str)
def test_batches_packed_one_after_another(lengths: tuple[int, ...], device: torch.device) -> None:
    strategies = ("crop_color_flip", "rotate", "none")
    parts = [
        DSA(strategy, "multiple").sample(n, (6, 5))
        for strategy, n in zip(strategies, lengths, strict=False)
    ]
    packed = PackedAugmentParameters.of(parts).to(device)
    images = torch.randn(sum(lengths), 3, 6, 5, device=device)
    expected = [augment(part, p) for part, p in zip(images.split(lengths), parts, strict=True)]
    assert torch.equal(packed.apply(images), torch.cat(expected))
    back = [augment_adjoint(part, p) for part, p in zip(images.split(lengths), parts, strict=True)]
    assert torch.equal(packed.adjoint(images), torch.cat(back))


def test_parameters_on_another_device(device: torch.device) -> None:
    p = DSA(EVERYTHING, mode="multiple").sample(3, 6)
    there = p.to(device)
    assert there.angle.device.type == device.type
    images = torch.randn(3, 1, 6, 6, device=device)
    assert torch.equal(augment(images, there), augment(images, p))
    assert p.to("meta").angle.device.type == "meta"
    assert p.angle.device.type == "cpu"


def test_parameters_made_by_hand() -> None:
    p = AugmentParameters.of(
        ("flip", "rotate"), 2, (5, 4), flip=torch.tensor([1, 0]), angle=torch.tensor([0.5, 0.0])
    )
    assert (p.operations, p.image_size, p.cutout_size, len(p)) == (
        ("flip", "rotate"),
        (5, 4),
        (3, 2),
        2,
    )
    assert p.flip.tolist() == [True, False]
    assert p.angle.tolist() == [0.5, 0.0]
    assert p.scale_h.tolist() == [1.0, 1.0]
    assert p.brightness.tolist() == [0.0, 0.0]
    assert p.shift_h.dtype == torch.int64
    assert AugmentParameters.of(("cutout",), 1, 4, cutout_size=(1, 3)).cutout_size == (1, 3)


def test_parameters_made_by_hand_live_where_the_given_draws_do() -> None:
    p = AugmentParameters.of(("rotate",), 2, 5, angle=torch.zeros(2, device="meta"))
    assert {getattr(p, draw).device.type for draw in DRAWN} == {"meta"}


def test_parameters_can_be_compared_and_hashed() -> None:
    a, b = DSA("rotate").sample(3, 4), DSA("rotate").sample(3, 4)
    assert (a == b, len({a, b, a})) == (False, 2)
