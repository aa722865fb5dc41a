"""The growing union of a run, on a real workbench."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pdd_fast import __version__
from pdd_fast.data.union_set import UnionSet
from pdd_fast.progressive.context import RunContext
from pdd_fast.progressive.union import distilled_set, empty_union, load_union
from pdd_fast.settings import resolve
from pdd_fast.storage.distilled import load_distilled


@pytest.fixture(scope="module")
def ctx() -> RunContext:
    return RunContext.prepare(
        resolve(
            "digits", stages=3, ipc=4, width=4, depth=2, seed=5, augment="color_crop", device="cpu"
        )
    )


def grown(ctx: RunContext, stages: int, lrs: tuple[float, ...] = (0.05, 0.1, 0.2)) -> UnionSet:
    """Stage s holds s images of every class, each filled with s."""
    union = empty_union(ctx)
    for stage in range(1, stages + 1):
        labels = torch.arange(10).repeat_interleave(stage)
        union = union.extended(
            torch.full((len(labels), 1, 8, 8), float(stage)), labels, lrs[stage - 1]
        )
    return union


def test_an_empty_union_has_the_shape_of_the_data(ctx: RunContext) -> None:
    union = empty_union(ctx)
    assert union.images.shape == (0, 1, 8, 8)
    assert union.labels.dtype == union.stage.dtype == torch.int64
    assert (union.stages, union.lrs) == (0, [])


def test_every_stage_is_added_behind_the_others(ctx: RunContext) -> None:
    union = grown(ctx, 3)
    assert union.stages == 3
    assert union.stage.tolist() == [1] * 10 + [2] * 20 + [3] * 30
    assert union.images[:, 0, 0, 0].tolist() == union.stage.tolist()
    assert union.lrs == torch.tensor([0.05, 0.1, 0.2]).tolist()  # as they are stored


def test_adding_a_stage_leaves_the_union_before_it_alone(ctx: RunContext) -> None:
    before = grown(ctx, 1)
    before.extended(torch.zeros(1, 1, 8, 8), torch.zeros(1, dtype=torch.int64), 0.3)
    assert before.stages == 1
    assert before.lrs == pytest.approx([0.05])
    assert len(before.images) == len(before.labels) == len(before.stage) == 10


@pytest.mark.parametrize(("stage", "rows"), [(1, 10), (2, 30), (3, 60)])
def test_a_union_up_to_a_stage_holds_the_stages_before(
    ctx: RunContext, stage: int, rows: int
) -> None:
    images, labels = grown(ctx, 3).up_to(stage)
    assert len(images) == len(labels) == rows
    assert images.max() == stage
    assert torch.bincount(labels).tolist() == [rows // 10] * 10


def test_parts_of_a_union_are_no_copies(ctx: RunContext) -> None:
    """An evaluation of 20 stages holds all their unions at once: as copies, 10.5 times the last."""
    union = grown(ctx, 3)
    for number in (1, 2, 3):
        for images, labels in (union.up_to(number), union.only(number)):
            assert images.untyped_storage().data_ptr() == union.images.untyped_storage().data_ptr()
            assert labels.untyped_storage().data_ptr() == union.labels.untyped_storage().data_ptr()
    images, labels = union.only(2)
    assert images.unique().tolist() == [2]
    assert torch.bincount(labels).tolist() == [2] * 10


def test_a_union_whose_stages_are_mixed_has_parts_too() -> None:
    stage = torch.tensor([2, 1, 3, 1, 2])
    union = UnionSet(stage.float().view(5, 1, 1, 1), torch.arange(5), stage, [0.1, 0.1, 0.1])
    assert union.up_to(1)[1].tolist() == [1, 3]
    assert union.up_to(2)[0].flatten().tolist() == [2, 1, 1, 2]
    assert union.only(3)[1].tolist() == [2]
    assert len(union.up_to(0)[0]) == 0


def test_probabilities_may_be_added_as_labels(ctx: RunContext) -> None:
    soft = UnionSet(torch.zeros(0, 1, 8, 8), torch.zeros(0, 10), torch.zeros(0, dtype=torch.int64))
    union = soft.extended(torch.zeros(4, 1, 8, 8), torch.full((4, 10), 0.1), 0.1)
    assert union.stage.tolist() == [1] * 4
    assert distilled_set(union, ctx).union(1).labels.shape == (4, 10)


def test_a_stored_union_is_loaded_as_it_was(tmp_path: Path, ctx: RunContext) -> None:
    union = grown(ctx, 2, lrs=(0.5, 0.25))
    distilled_set(union, ctx).save(tmp_path / "u")
    found = load_union(tmp_path / "u", ctx)
    assert found.lrs == [0.5, 0.25]
    for name in ("images", "labels", "stage"):
        assert torch.equal(getattr(found, name), getattr(union, name))
        assert getattr(found, name).device == ctx.device


def test_what_is_stored_does_not_depend_on_interruptions(tmp_path: Path, ctx: RunContext) -> None:
    distilled_set(grown(ctx, 3), ctx).save(tmp_path / "whole")
    distilled_set(grown(ctx, 1), ctx).save(tmp_path / "stage")
    resumed = load_union(tmp_path / "stage", ctx)
    for stage in (2, 3):
        labels = torch.arange(10).repeat_interleave(stage)
        resumed = resumed.extended(
            torch.full((len(labels), 1, 8, 8), float(stage)), labels, (0.1, 0.2)[stage - 2]
        )
        distilled_set(resumed, ctx).save(tmp_path / "stage")
        resumed = load_union(tmp_path / "stage", ctx)
    assert (tmp_path / "stage").read_bytes() == (tmp_path / "whole").read_bytes()


def test_a_distilled_set_says_what_someone_else_needs(tmp_path: Path, ctx: RunContext) -> None:
    distilled_set(grown(ctx, 2), ctx).save(tmp_path / "u")
    found = load_distilled(tmp_path / "u")
    assert found.normalization == ctx.data.normalization
    assert found.metadata == {
        "data": "digits",
        "fingerprint": ctx.data.fingerprint,
        "classes": list("0123456789"),
        "augmentation": {"strategy": "color_crop", "mode": "single"},
        "network": {
            "name": "ConvNet",
            "in_channels": 1,
            "num_classes": 10,
            "image_size": [8, 8],
            "width": 4,
            "depth": 2,
        },
        "labels": "hard",
        "method": "mtt",
        "seed": 5,
        "pdd_fast": __version__,
    }
    assert [len(found.subset(stage)) for stage in (1, 2)] == [10, 20]
    assert found.union(1).learning_rate == pytest.approx(0.05)


def test_sizes_are_those_of_the_parts(ctx: RunContext) -> None:
    union = grown(ctx, 3)
    assert union.sizes == [len(union.up_to(stage)[0]) for stage in (1, 2, 3)] == [10, 30, 60]
    union.factor = 2
    assert union.sizes == [len(union.up_to(stage)[0]) for stage in (1, 2, 3)] == [40, 120, 240]
