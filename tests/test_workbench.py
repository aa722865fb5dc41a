"""What a run is set up with."""

from __future__ import annotations

from typing import Any

import pytest
import tiny
import torch

from pdd_fast.config import resolve
from pdd_fast.errors import UsageError
from pdd_fast.workbench import Workbench


def prepare(**changes: Any) -> Workbench:
    return Workbench.prepare(resolve(**(tiny.SETTINGS | changes)))


def test_the_number_of_threads_is_set_where_the_configuration_has_one() -> None:
    torch.set_num_threads(3)
    prepare(threads=0)
    assert torch.get_num_threads() == 3
    prepare(threads=2)
    assert torch.get_num_threads() == 2


def test_a_network_too_deep_for_the_images_is_refused() -> None:
    assert prepare(depth=3).network["depth"] == 3
    with pytest.raises(UsageError, match="depth must be at most 3 for images of 8 pixels, got 4"):
        prepare(depth=4)


def test_random_real_images_are_of_their_class_and_none_comes_twice() -> None:
    bench = prepare()
    groups = bench.random_real_rows([2, 1, 3], "a purpose", 5)
    assert [len(group) for group in groups] == [20, 10, 30]
    for group, count in zip(groups, [2, 1, 3], strict=True):
        assert bench.train.labels[group].tolist() == [label for label in range(10) for _ in range(count)]
    rows = torch.cat(groups).tolist()
    assert len(set(rows)) == len(rows)
    again = bench.random_real_rows([2, 1, 3], "a purpose", 5)
    assert all(torch.equal(a, b) for a, b in zip(groups, again, strict=True))
    assert not torch.equal(groups[0], bench.random_real_rows([2, 1, 3], "a purpose", 6)[0])


def test_the_first_subset_does_not_depend_on_how_many_follow() -> None:
    bench = prepare()
    assert torch.equal(bench.random_real_rows([2], "x")[0], bench.random_real_rows([2, 4], "x")[0])
