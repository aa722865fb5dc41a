"""Random numbers that depend on the seed and the purpose, and on nothing else."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from pdd_fast.runtime.seeds import derive, generator

SEED = st.integers(0, 2**70)
PURPOSE = st.lists(st.text(max_size=8) | st.integers(-(10**6), 10**6), max_size=4).map(tuple)


@given(SEED, PURPOSE)
def test_a_derived_seed_is_one_that_every_library_takes(
    seed: int, purpose: tuple[str | int, ...]
) -> None:
    derived = derive(seed, *purpose)
    assert 0 <= derived < 2**63
    assert derived == derive(seed, *purpose)


@given(SEED, PURPOSE, SEED, PURPOSE)
def test_another_seed_or_purpose_gives_another_seed(
    seed: int, purpose: tuple[str | int, ...], other_seed: int, other: tuple[str | int, ...]
) -> None:
    assume((seed, purpose) != (other_seed, other))
    assert derive(seed, *purpose) != derive(other_seed, *other)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ((1, "a"), ("1", "a")),
        (("a", "bc"), ("ab", "c")),
        (("a", 1, 2), ("a", 12)),
        (("a",), ("a", "")),
        (("a", "b"), ("b", "a")),
        (("a', 'b",), ("a", "b")),
    ],
)
def test_purposes_that_read_alike_are_told_apart(
    one: tuple[str | int, ...], other: tuple[str | int, ...]
) -> None:
    assert derive(0, *one) != derive(0, *other)


def test_seeds_stay_what_they_were_in_earlier_versions() -> None:
    assert derive(0) == 9_144_032_529_408_623_089
    assert derive(7, "matching", 2, 31) == 1_972_291_336_013_011_602


def test_the_kind_of_integer_does_not_matter() -> None:
    seed, number = np.arange(5)[3:]
    assert derive(seed, "a", number) == derive(3, "a", 4)


def test_draws_depend_on_the_purpose_and_not_on_what_was_drawn_before() -> None:
    expected = torch.rand(5, generator=generator(1, "images", 3))
    torch.rand(100)
    torch.rand(7, generator=generator(1, "images", 2))
    assert torch.equal(torch.rand(5, generator=generator(1, "images", 3)), expected)
    assert not torch.equal(torch.rand(5, generator=generator(1, "images", 4)), expected)


def test_the_global_generator_is_left_alone() -> None:
    state = torch.get_rng_state()
    torch.rand(3, generator=generator(1, "a"))
    assert torch.equal(torch.get_rng_state(), state)


def test_draws_are_made_on_the_cpu() -> None:
    assert generator(0).device == torch.device("cpu")


def test_the_bits_of_derived_seeds_are_even() -> None:
    seeds = np.array([derive(0, "iteration", i) for i in range(4000)], dtype=np.int64)
    share = np.array([(seeds >> bit & 1).mean() for bit in range(63)])
    assert np.abs(share - 0.5).max() < 0.04  # five standard deviations of a fair coin
