"""Settings as typed models: conversion of what people type, and every bound."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from settings_support import CHOICES, FIELDS, IDS, NUMBERS, TYPES, bounds, value, with_one

from pdd_fast.runtime.errors import UsageError
from pdd_fast.settings import resolve


@pytest.mark.parametrize(("method", "name"), FIELDS, ids=IDS)
def test_what_is_typed_is_what_is_set(method: str, name: str) -> None:
    wanted = value(with_one(method), name)
    typed = value(with_one(method, **{name: str(wanted)}), name)
    assert (typed, type(typed)) == (wanted, TYPES[method, name])


@given(st.integers(0, 10**30))
def test_whole_numbers_keep_every_digit(seed: int) -> None:
    assert (
        resolve(seed=seed).seed
        == resolve(seed=str(seed)).seed
        == resolve(seed=f" {seed} ").seed
        == seed
    )


@given(st.floats(min_value=0, allow_infinity=False))
def test_numbers_keep_every_bit(number: float) -> None:
    found = (resolve(lr_img=given).flat()["lr_img"] for given in (number, repr(number)))
    assert list(found) == [number, number]


@pytest.mark.parametrize(
    ("typed", "value"),
    [("1e3", 1000), ("20.0", 20), (20.0, 20), ("1_000", 1000), ("+7", 7), (True + 1, 2)],
)
def test_whole_numbers_may_be_written_in_other_ways(typed: Any, value: int) -> None:
    found = resolve(iterations=typed).iterations
    assert (found, type(found)) == (value, int)


@pytest.mark.parametrize(
    "value", ["1.5", 1.5, "ten", "", "inf", float("inf"), "nan", None, [1], True]
)
def test_what_is_not_a_whole_number_is_named(value: Any) -> None:
    with pytest.raises(
        UsageError, match=rf"^iterations must be a whole number, got {re.escape(repr(value))}$"
    ):
        resolve(iterations=value)


@pytest.mark.parametrize("value", ["much", "", None, [1.0], False])
def test_what_is_not_a_number_is_named(value: Any) -> None:
    with pytest.raises(
        UsageError, match=rf"^inner_lr must be a number, got {re.escape(repr(value))}$"
    ):
        resolve(inner_lr=value)


@pytest.mark.parametrize(("method", "name"), [key for key in NUMBERS if TYPES[key] is float])
@pytest.mark.parametrize("typed", ["nan", "inf", "-inf", "1e999"])
def test_numbers_must_be_finite(method: str, name: str, typed: str) -> None:
    with pytest.raises(UsageError, match=rf"^{name} must be a finite number, got (nan|inf|-inf)$"):
        resolve(**{name: typed, "method": method})


def test_text_may_be_a_path_but_nothing_else() -> None:
    assert resolve(data_dir=Path("some") / "where").data_dir == str(Path("some/where"))
    for wrong in (5, None, ["digits"]):
        with pytest.raises(
            UsageError, match=rf"^dataset must be text, got {re.escape(repr(wrong))}$"
        ):
            resolve(dataset=wrong)


def test_every_number_has_a_least_value() -> None:
    assert set(NUMBERS) == {key[:2] for key in bounds("ge") + bounds("gt")}


@pytest.mark.parametrize(("method", "name", "least"), bounds("ge"))
def test_the_least_value_is_taken_and_less_is_not(method: str, name: str, least: float) -> None:
    assert value(with_one(method, **{name: least}), name) == least
    less = least - 1 if TYPES[method, name] is int else least - sys.float_info.min
    for wrong in (less, least - 1000):
        with pytest.raises(
            UsageError, match=rf"^{name} must be at least {least:g}, got {re.escape(str(wrong))}"
        ):
            with_one(method, **{name: wrong})


@pytest.mark.parametrize(("method", "name", "bound"), bounds("lt"))
def test_a_value_must_be_below_its_bound(method: str, name: str, bound: float) -> None:
    assert value(with_one(method, **{name: bound - 1e-9}), name) < bound
    for wrong in (float(bound), bound + 1.0):
        with pytest.raises(UsageError, match=rf"^{name} must be below {bound:g}, got {wrong}$"):
            with_one(method, **{name: wrong})


@pytest.mark.parametrize(("method", "name", "bound"), bounds("gt"))
def test_a_value_must_be_above_its_bound(method: str, name: str, bound: float) -> None:
    assert value(with_one(method, **{name: bound + 1e-9}), name) > bound
    for wrong in (float(bound), bound - 1.0):
        with pytest.raises(UsageError, match=rf"^{name} must be above {bound:g}, got {wrong}$"):
            with_one(method, **{name: wrong})


LEAST_ONE = set(
    """stages ipc width depth num_experts expert_train_epochs expert_batch inner_steps expert_epochs
    eval_networks eval_epochs transition_epochs union_epochs union_batch repeats
    trajectories_per_step factor real_batch synthetic_batch inner_loops""".split()  # noqa: SIM905
)


# The bounds of 0.1's first settings, so that none is lost where a field is moved.
def test_the_bounds_are_these() -> None:
    below = {name for _, name, _ in bounds("lt")}
    assert below == {
        "validation_fraction",
        "momentum",
        "ema_decay",
        "expert_momentum",
        "union_momentum",
    }
    assert {limit for _, _, limit in bounds("lt")} == {1}
    assert {(name, limit) for _, name, limit in bounds("gt")} == {
        (name, 0)
        for name in (
            "filter_band",
            "expert_lr",
            "inner_lr",
            "validation_fraction",
            "whitening_epsilon",
        )
    }
    assert {(name, limit) for _, name, limit in bounds("le")} == {("cutmix", 1)}
    assert {name for _, name, limit in bounds("ge") if limit == 1} == LEAST_ONE


@pytest.mark.parametrize(("method", "name"), CHOICES)
def test_a_choice_is_one_of_its_own(method: str, name: str) -> None:
    names = CHOICES[method, name]
    for choice in names:
        assert value(with_one(method, **{name: choice}), name) == choice
    for other in ("", "other", names[0].upper()):
        with pytest.raises(
            UsageError, match=rf"^{name} must be {' or '.join(names)}, got '{other}'$"
        ):
            with_one(method, **{name: other})
