"""The run context."""

from __future__ import annotations

from typing import Any

import pytest
import tiny
import torch

from pdd_fast.progressive.context import RunContext
from pdd_fast.runtime import device_memory
from pdd_fast.runtime.errors import UsageError
from pdd_fast.settings import resolve


def prepare(**changes: Any) -> RunContext:
    return RunContext.prepare(resolve(**(tiny.of(changes.get("method", "mtt")) | changes)))


def test_a_network_too_deep_for_the_images_is_refused() -> None:
    assert prepare(depth=3).network["depth"] == 3
    with pytest.raises(UsageError, match="depth must be at most 3 for images of 8 pixels, got 4"):
        prepare(depth=4)
    with pytest.raises(UsageError, match="factor must be at most 8 for images of 8 pixels, got 9"):
        prepare(method="idc", factor=9)


def test_random_real_images_are_of_their_class_and_none_comes_twice() -> None:
    ctx = prepare()
    groups = ctx.random_real_rows([2, 1, 3], "a purpose", 5)
    assert [len(group) for group in groups] == [20, 10, 30]
    for group, count in zip(groups, [2, 1, 3], strict=True):
        assert ctx.train.labels[group].tolist() == [
            label for label in range(10) for _ in range(count)
        ]
    rows = torch.cat(groups).tolist()
    assert len(set(rows)) == len(rows)
    again = ctx.random_real_rows([2, 1, 3], "a purpose", 5)
    assert all(torch.equal(a, b) for a, b in zip(groups, again, strict=True))
    assert not torch.equal(groups[0], ctx.random_real_rows([2, 1, 3], "a purpose", 6)[0])


def test_the_first_subset_does_not_depend_on_how_many_follow() -> None:
    ctx = prepare()
    assert torch.equal(ctx.random_real_rows([2], "x")[0], ctx.random_real_rows([2, 4], "x")[0])


def test_precision_and_graph_reach_the_engine_and_the_training() -> None:
    assert prepare().engine.precision == "float32"  # "auto" on the CPU
    for engine in ("fused", "autograd"):
        assert prepare(engine=engine, precision="bfloat16").engine.precision == "bfloat16"
    for graph, enabled in (("auto", True), ("off", False)):
        ctx = prepare(graph=graph)
        assert ctx.real_sgd.graph is ctx.synthetic_sgd.graph is enabled


def test_networks_are_trained_one_at_a_time_on_the_cpu_unless_asked_otherwise() -> None:
    assert prepare().side_by_side == 1
    assert prepare(side_by_side=3).side_by_side == 3


def test_on_a_gpu_as_many_as_fit_up_to_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def fitting(bytes_each: int, device: torch.device, most: int, shared: int) -> int:
        asked.append(shared)
        return most

    monkeypatch.setattr(device_memory, "largest_group", fitting)
    ctx = prepare(expert_batch=64, union_batch=512)
    assert ctx.side_by_side == 16
    prepare(expert_batch=512, union_batch=64, precision="bfloat16")
    assert 0 < asked[1] < asked[0]  # as many images, in 16 bits


@pytest.mark.parametrize(
    ("count", "size", "groups"),
    [
        (4, 1, [[0], [1], [2], [3]]),
        (5, 3, [[0, 1, 2], [3, 4]]),
        (3, 3, [[0, 1, 2]]),
        (2, 16, [[0, 1]]),
        (0, 4, []),
    ],
)
def test_groups_cover_all_in_order(count: int, size: int, groups: list[list[int]]) -> None:
    assert [list(group) for group in prepare(side_by_side=size).groups(count)] == groups
