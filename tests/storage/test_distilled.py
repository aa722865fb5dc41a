"""Distilled sets: what is stored comes back, unions train like any dataset, and what does not fit
is named.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader

import pdd_fast
from pdd_fast.augmentation.multi_formation import decode
from pdd_fast.data.normalization import Normalization
from pdd_fast.runtime.errors import UsageError
from pdd_fast.runtime.files import save_tensors, write_json
from pdd_fast.storage.distilled import DistilledSet, load_distilled


def a_set(per_stage: tuple[int, ...] = (4, 2, 2), soft: bool = False) -> DistilledSet:
    """Images of 3 channels, two classes in turn."""
    n = sum(per_stage)
    labels = torch.arange(n) % 2
    return DistilledSet(
        images=torch.randn(n, 3, 4, 5),
        labels=torch.randn(n, 2).softmax(1) if soft else labels,
        stage=torch.repeat_interleave(torch.arange(1, len(per_stage) + 1), torch.tensor(per_stage)),
        learning_rates=torch.linspace(0.01, 0.03, len(per_stage)),
        normalization=Normalization((0.4, 0.5, 0.6), (0.2, 0.25, 0.3)),
        metadata={"data": "made up", "classes": ["ant", "bee"], "seed": 3},
    )


# ---- files ----


@pytest.mark.parametrize("soft", [False, True], ids=["hard", "soft"])
def test_a_set_comes_back_from_its_file(tmp_path: Path, soft: bool) -> None:
    expected = a_set(soft=soft)
    expected.save(tmp_path / "set.safetensors")
    found = load_distilled(str(tmp_path / "set.safetensors"))
    for name in ("images", "labels", "stage", "learning_rates"):
        assert getattr(found, name).dtype == getattr(expected, name).dtype
        assert torch.equal(getattr(found, name), getattr(expected, name))
    assert found.normalization == expected.normalization
    assert found.metadata == expected.metadata


def test_a_set_comes_back_from_its_run_directory_and_by_the_public_name(tmp_path: Path) -> None:
    expected = a_set()
    expected.save(tmp_path / "distilled.safetensors")
    assert torch.equal(pdd_fast.load_distilled(tmp_path).images, expected.images)


def test_equal_sets_give_equal_bytes_and_other_sets_do_not(tmp_path: Path) -> None:
    distilled = a_set()
    planes_last = distilled.images.contiguous(memory_format=torch.channels_last)
    backwards = dict(reversed(distilled.metadata.items()))
    distilled.save(tmp_path / "a")
    replace(distilled, images=planes_last, metadata=backwards).save(tmp_path / "b")
    replace(distilled, metadata=backwards | {"seed": 4}).save(tmp_path / "c")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert (tmp_path / "a").read_bytes() != (tmp_path / "c").read_bytes()


def test_a_missing_set_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="/gone does not exist"):
        load_distilled(tmp_path / "gone")
    with pytest.raises(UsageError, match=r"/distilled\.safetensors does not exist"):
        load_distilled(tmp_path)


def test_a_damaged_set_is_named(tmp_path: Path) -> None:
    a_set().save(tmp_path / "set")
    (tmp_path / "set").write_bytes((tmp_path / "set").read_bytes()[:-1])
    with pytest.raises(UsageError, match="/set is damaged"):
        load_distilled(tmp_path / "set")


def test_a_file_of_something_else_is_named_with_what_it_lacks(tmp_path: Path) -> None:
    save_tensors(tmp_path / "t", {"checkpoints": torch.ones(2, 3)}, {})
    message = (
        "/t is not a distilled set: it lacks images, labels, stage, learning_rates, normalization"
    )
    with pytest.raises(UsageError, match=message):
        load_distilled(tmp_path / "t")
    write_json(tmp_path / "j", {"images": []})
    with pytest.raises(UsageError, match="/j is damaged or is not a safetensors file"):
        load_distilled(tmp_path / "j")


@pytest.mark.parametrize(
    ("change", "metadata"),
    [
        ({"stage": torch.tensor([1, 3])}, {}),
        ({"images": torch.full((2, 1, 2, 2), float("nan"))}, {}),
        ({}, {"normalization": 3}),
        ({}, {"normalization": {"mean": [0.0]}}),
        ({}, {"normalization": {"mean": ["x"], "std": [1.0]}}),
    ],
)
def test_a_file_whose_content_does_not_fit_is_named(
    tmp_path: Path, change: dict[str, torch.Tensor], metadata: dict[str, Any]
) -> None:
    tensors = {
        "images": torch.zeros(2, 1, 2, 2),
        "labels": torch.zeros(2, dtype=torch.int64),
        "stage": torch.tensor([1, 2]),
        "learning_rates": torch.ones(2),
    }
    normalization = {"normalization": {"mean": [0.0], "std": [1.0]}}
    save_tensors(tmp_path / "set", tensors, normalization)
    assert load_distilled(tmp_path / "set").stages == 2
    save_tensors(tmp_path / "set", tensors | change, normalization | metadata)
    with pytest.raises(UsageError, match="/set is not a distilled set: "):
        load_distilled(tmp_path / "set")


# ---- unions ----


@given(st.lists(st.integers(1, 4), min_size=1, max_size=5), st.randoms(use_true_random=False))
def test_a_union_is_all_subsets_up_to_its_stage_in_any_order_of_rows(
    sizes: list[int], shuffled: Any
) -> None:
    ordered = a_set(tuple(sizes))
    rows = list(range(len(ordered.images)))
    shuffled.shuffle(rows)
    mixed = replace(
        ordered, images=ordered.images[rows], labels=ordered.labels[rows], stage=ordered.stage[rows]
    )
    for stage in range(1, len(sizes) + 1):
        union, subset = mixed.union(stage), mixed.subset(stage)
        assert len(union) == sum(sizes[:stage])
        assert len(subset) == sizes[stage - 1]
        assert (
            union.learning_rate
            == subset.learning_rate
            == pytest.approx(float(ordered.learning_rates[stage - 1]))
        )
        parts = torch.cat([mixed.subset(s).images for s in range(1, stage + 1)])
        assert sorted(parts[:, 0, 0, 0].tolist()) == sorted(union.images[:, 0, 0, 0].tolist())
    assert len(mixed.union()) == sum(sizes)


@pytest.mark.parametrize("soft", [False, True], ids=["hard", "soft"])
def test_a_union_feeds_a_data_loader(soft: bool) -> None:
    distilled = a_set(soft=soft)
    batches = list(DataLoader(distilled.union(2), batch_size=4))
    assert [len(images) for images, _ in batches] == [4, 2]
    assert torch.equal(torch.cat([images for images, _ in batches]), distilled.images[:6])
    assert torch.equal(torch.cat([labels for _, labels in batches]), distilled.labels[:6])


def test_a_network_learns_a_union() -> None:
    distilled = a_set()
    union = distilled.union()
    net = pdd_fast.ConvNet(3, 2, (4, 5), width=8, depth=1)
    losses = []
    for _ in range(60):
        for images, labels in DataLoader(union, batch_size=8, shuffle=True):
            loss = torch.nn.functional.cross_entropy(net(images), labels)
            losses.append(float(loss.detach()))
            for parameter, gradient in zip(
                net.parameters(), torch.autograd.grad(loss, list(net.parameters())), strict=True
            ):
                parameter.data.sub_(gradient, alpha=union.learning_rate)
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize("stage", [0, -1, 4])
def test_a_stage_that_is_not_there_is_named(stage: int) -> None:
    for ask in (a_set().union, a_set().subset):
        with pytest.raises(
            ValueError, match=rf"DistilledSet: stage must lie in \[1, 3\], got {stage}"
        ):
            ask(stage)


# ---- pictures ----


def test_pixels_undo_the_normalization_and_stay_in_the_unit_interval() -> None:
    distilled = a_set()
    colors = torch.tensor([0.1, 0.5, 0.9]).view(3, 1, 1).expand(8, 3, 4, 5)
    shown = replace(distilled, images=distilled.normalization.apply(colors)).pixels()
    torch.testing.assert_close(shown, colors)
    extreme = replace(distilled, images=distilled.images.sign() * 100).pixels()
    assert set(extreme.flatten().tolist()) == {0.0, 1.0}


def test_the_representation_says_what_it_is() -> None:
    assert repr(a_set()) == "DistilledSet(made up: 8 images of 3×4×5 in 3 stages)"
    assert (
        repr(replace(a_set(), metadata={}))
        == "DistilledSet(unknown data: 8 images of 3×4×5 in 3 stages)"
    )


def test_sets_can_be_compared_and_kept_in_a_dictionary() -> None:
    one, other = a_set(), a_set()
    assert one == one
    assert one != other
    assert {one: 1, other: 2}[other] == 2


# ---- checks ----


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"images": torch.zeros(8, 4, 5)},
            r"images must have shape \[n, C, H, W\], got \(8, 4, 5\)",
        ),
        ({"images": torch.tensor(1.0)}, r"images must have shape \[n, C, H, W\], got \(\)"),
        ({"labels": torch.zeros(7, dtype=torch.int64)}, "labels must have 8 rows, got 7"),
        (
            {"labels": torch.full((8,), 0.5)},
            "labels must be class indices or .* that are no whole numbers",
        ),
        (
            {"labels": torch.full((8,), float("nan"))},
            "labels must be class indices .* that are no whole numbers",
        ),
        (
            {"labels": torch.zeros(8, 2, dtype=torch.int64)},
            r"labels must be one-hot where they are integers .*, got other rows of \(8, 2\)",
        ),
        (
            {"labels": torch.ones(8, 2, dtype=torch.bool)},
            r"labels must be one-hot where they are integers .*, got other rows of \(8, 2\)",
        ),
        (
            {"labels": torch.rand(8, 1)},
            r"labels must be class indices \[n\], or .* 2 classes or more, got \(8, 1\); pass",
        ),
        (
            {"labels": torch.zeros(8, 1, dtype=torch.int64)},
            r"labels must be class indices .*, got \(8, 1\); pass labels",
        ),
        (
            {"labels": torch.zeros(8, 2, 1)},
            r"labels must be .*, got torch\.float32 of shape \(8, 2, 1\)",
        ),
        ({"labels": torch.arange(8) - 1}, r"labels must lie in \[0, 2\), got -1\.\.6"),
        (
            {"labels": torch.arange(8) - 1, "metadata": {}},
            r"labels must lie from 0 on, got -1\.\.6",
        ),
        (
            {"labels": torch.full((8, 2), -3.0)},
            r"labels must be probabilities in \[0, 1\], got -3\.\.-3; if .* logits",
        ),
        (
            {"labels": torch.full((8, 2), 7.0)},
            r"labels must be probabilities in \[0, 1\], got 7\.\.7; if .* logits",
        ),
        (
            {"labels": torch.arange(8) % 4, "metadata": {"classes": list("abc")}},
            r"labels must lie in \[0, 3\), got 0\.\.3",
        ),
        (
            {"labels": torch.rand(8, 2), "metadata": {"classes": list("abc")}},
            "labels must have 3 columns, .*, got 2",
        ),
        (
            {"images": torch.ones(8, 3, 4, 5, dtype=torch.uint8)},
            r"images must be .*, got torch\.uint8; divide pixels by 255",
        ),
        (
            {"images": torch.ones(8, 3, 4, 5, dtype=torch.int64)},
            r"images must be .* normalized .*, got torch\.int64",
        ),
        (
            {"images": torch.randint(0, 256, (8, 3, 4, 5)).float()},
            "images must be .*, got whole numbers from 0 on; divide",
        ),
        ({"stage": torch.ones(9, dtype=torch.int64)}, "stage must have 8 rows, got 9"),
        (
            {"stage": torch.ones(8, 1, dtype=torch.int64)},
            r"stage must be a vector, got shape \(8, 1\)",
        ),
        (
            {"stage": torch.tensor([1, 1, 1, 1, 3, 3, 3, 3])},
            r"stage must number 1\.\.3 without gaps, got \[1, 3\]",
        ),
        ({"stage": torch.arange(8) % 3}, r"stage must number 1\.\.3 without gaps, got \[0, 1, 2\]"),
        (
            {"learning_rates": torch.ones(2)},
            r"stage must number 1\.\.2 without gaps, got \[1, 2, 3\]",
        ),
        ({"learning_rates": torch.tensor(0.1)}, r"learning_rates must be a vector, got shape \(\)"),
        (
            {"learning_rates": torch.tensor([0.1, 0.0, 0.1])},
            r"learning_rates must be above 0, got \[0\.1",
        ),
        (
            {"learning_rates": torch.tensor([0.1, float("inf"), 0.1])},
            "learning_rates must be finite",
        ),
        (
            {"images": torch.full((8, 3, 4, 5), float("inf"))},
            "images must be finite, got NaN or infinity",
        ),
        ({"labels": torch.full((8, 2), float("nan"))}, "labels must be finite"),
        (
            {"normalization": Normalization((0.0,), (1.0,))},
            r"normalization mean must have 3 numbers, got \(0\.0,\)",
        ),
        (
            {"normalization": Normalization((0.0,) * 3, (1.0,))},
            r"normalization std must have 3 numbers, got \(1\.0,\)",
        ),
    ],
)
def test_what_does_not_fit_is_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^DistilledSet: {message}"):
        replace(a_set(), **change)


@pytest.mark.parametrize(
    "kind", [torch.int32, torch.int8, torch.uint8, torch.float32, torch.float64, torch.bfloat16]
)
def test_class_indices_of_any_type_are_class_indices(kind: torch.dtype) -> None:
    expected = torch.arange(8) % 3
    found = replace(a_set(), labels=expected.to(kind), metadata={}).labels
    assert found.dtype == torch.int64
    assert torch.equal(found, expected)


@pytest.mark.parametrize("kind", [torch.int64, torch.int32, torch.uint8, torch.bool])
def test_one_hot_rows_of_integers_are_class_indices(kind: torch.dtype) -> None:
    expected = torch.tensor([2, 0, 1, 2, 2, 0, 1, 1])
    found = replace(
        a_set(), labels=torch.nn.functional.one_hot(expected, 3).to(kind), metadata={}
    ).labels
    assert found.dtype == torch.int64
    assert torch.equal(found, expected)


@pytest.mark.parametrize("kind", [torch.float64, torch.float16, torch.bfloat16])
def test_images_and_probabilities_are_float32(kind: torch.dtype, tmp_path: Path) -> None:
    original, labels = a_set(), torch.full((8, 2), 0.5, dtype=kind)
    found = replace(original, images=original.images.to(kind), labels=labels)
    assert (found.images.dtype, found.labels.dtype) == (torch.float32, torch.float32)
    assert torch.equal(found.images, original.images.to(kind).float())
    found.save(tmp_path / "set")
    assert torch.equal(load_distilled(tmp_path / "set").labels, torch.full((8, 2), 0.5))


# ---- images that hold several ----


def formed(factor: int = 2) -> DistilledSet:
    draw = torch.Generator().manual_seed(0)
    return DistilledSet(
        torch.randn(6, 3, 8, 8, generator=draw),
        torch.tensor([0, 1, 2] * 2),
        torch.tensor([1] * 3 + [2] * 3),
        torch.tensor([0.1, 0.2]),
        Normalization((0.5,) * 3, (0.25,) * 3),
        factor=factor,
    )


def test_a_union_is_what_its_images_hold_and_raw_what_is_stored(tmp_path: Path) -> None:
    formed().save(tmp_path / "set")
    found = load_distilled(tmp_path / "set")
    assert found.factor == 2
    assert "factor" not in found.metadata
    assert torch.equal(found.union(raw=True).images, found.images)
    assert torch.equal(found.union().images, decode(found.images, 2))
    assert torch.equal(found.subset(2).images, decode(found.images[3:], 2))
    assert found.subset(2).labels.tolist() == [0, 1, 2] * 4
    assert found.subset(2, raw=True).labels.tolist() == [0, 1, 2]
    assert len(found.union(1)) == 12
    assert found.union(1).learning_rate == pytest.approx(0.1)
    assert found.pixels().shape == (6, 3, 8, 8)


def test_a_set_from_before_has_one_image_in_each(tmp_path: Path) -> None:
    one = formed(1)
    assert torch.equal(one.union().images, one.images)
    save_tensors(
        tmp_path / "set",
        {
            "images": one.images,
            "labels": one.labels,
            "stage": one.stage,
            "learning_rates": one.learning_rates,
        },
        {"normalization": one.normalization.to_dict()},
    )
    assert load_distilled(tmp_path / "set").factor == 1


@pytest.mark.parametrize("factor", [0, 9])
def test_a_factor_that_cannot_be_is_refused(factor: int) -> None:
    with pytest.raises(ValueError, match=rf"factor must lie in \[1, 8\], got {factor}"):
        formed(factor)
