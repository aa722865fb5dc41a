"""Datasets by name, the embedded digits, and how training images are normalized and split."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image

from pdd_fast import data
from pdd_fast.data import torchvision_sets
from pdd_fast.data.normalization import Normalization, unit
from pdd_fast.data.splits import (
    ImageData,
    Pixels,
    Split,
    normalized,
    prepare,
    require_images_per_class,
    stratified_mask,
)
from pdd_fast.data.whitening import Whitening
from pdd_fast.runtime.errors import UsageError

# ---- names ----


@pytest.mark.parametrize(
    ("name", "nearest"),
    [("digit", "digits"), ("CIFAR10", "cifar10"), ("cifar-100", "cifar100"), ("Mnist", "mnist")],
)
def test_an_unknown_name_is_answered_with_the_nearest(name: str, nearest: str) -> None:
    with pytest.raises(
        UsageError,
        match=f"dataset must be one of digits, .*imagefolder:DIR, got '{name}'; did you mean",
    ):
        data.load(name)
    with pytest.raises(UsageError, match=f"did you mean '{nearest}'"):
        data.load(name)


def test_a_name_like_no_other_is_answered_without_a_guess() -> None:
    with pytest.raises(UsageError, match=r"got 'xyzzy'$"):
        data.load("xyzzy")


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.1, float("nan")])
def test_the_validation_fraction_must_lie_between_0_and_1(fraction: float) -> None:
    with pytest.raises(
        UsageError, match=f"validation_fraction must lie between 0 and 1, got {fraction}"
    ):
        data.load("digits", validation_fraction=fraction)


# ---- digits ----


def test_digits_are_all_there_and_a_fifth_of_every_class_is_the_test_set() -> None:
    from sklearn.datasets import load_digits

    source = load_digits()
    digits = data.load("digits")
    assert digits.classes == tuple("0123456789")
    assert (digits.in_channels, digits.image_size, digits.num_classes) == (1, (8, 8), 10)
    assert digits.full_train.images.dtype == torch.float32
    assert len(digits.full_train) + len(digits.test) == 1797
    for label in range(10):
        parts = [
            part.images[part.rows_of(label)]
            for part in (digits.train, digits.validation, digits.test)
        ]
        pixels = (digits.normalization.invert(torch.cat(parts)) * 16).round().int().flatten(1)
        expected = source.images[source.target == label].astype(int).reshape(-1, 64)
        assert sorted(pixels.tolist()) == sorted(expected.tolist())
        assert abs(len(parts[2]) / len(expected) - 0.2) < 0.005


def test_digits_are_split_the_same_way_every_time() -> None:
    torch.manual_seed(1)
    first = data.load("digits")
    torch.manual_seed(2)
    assert torch.equal(data.load("digits").test.images, first.test.images)


# ---- normalization ----


@given(
    st.integers(1, 3),
    st.integers(1, 5),
    st.floats(0.02, 1),
    st.floats(-1, 1),
    st.integers(0, 2**31),
)
def test_normalized_channels_have_mean_0_and_deviation_1(
    channels: int, side: int, spread: float, center: float, seed: int
) -> None:
    draw = torch.Generator().manual_seed(seed)
    scale = torch.linspace(spread, 2 * spread, channels).view(-1, 1, 1)
    pixels = torch.rand(7, channels, side, side + 1, generator=draw) * scale + center
    normalization = Normalization.fit(pixels)
    images = normalization.apply(pixels)
    numpy = pixels.double().numpy()
    np.testing.assert_allclose(normalization.mean, numpy.mean((0, 2, 3)), rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(normalization.std, numpy.std((0, 2, 3)), rtol=1e-9)
    np.testing.assert_allclose(images.double().mean((0, 2, 3)), 0, atol=1e-4)
    np.testing.assert_allclose(images.double().numpy().std((0, 2, 3)), 1, atol=1e-4)
    torch.testing.assert_close(normalization.invert(images), pixels, rtol=0, atol=2e-6)


@given(st.integers(0, 255), st.integers(2, 400))
def test_a_constant_channel_is_only_centered(value: int, count: int) -> None:
    pixels = torch.rand(count, 2, 3, 3)
    pixels[:, 1] = torch.tensor(value, dtype=torch.uint8).float() / 255
    normalization = Normalization.fit(pixels)
    assert normalization.std[1] == 1.0
    assert 0 < normalization.std[0] < 1
    assert normalization.apply(pixels)[:, 1].abs().max() < 1e-6


def test_a_normalization_survives_json_and_keeps_the_type_of_images() -> None:
    normalization = Normalization.fit(torch.rand(9, 3, 4, 4))
    assert Normalization.from_dict(json.loads(json.dumps(normalization.to_dict()))) == normalization
    assert normalization.apply(torch.rand(2, 3, 4, 4, dtype=torch.float64)).dtype == torch.float64


# As the public code of DC and MTT has them.
CIFAR10 = Normalization((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010))
CIFAR100 = Normalization((0.5071, 0.4866, 0.4409), (0.2673, 0.2564, 0.2762))
IMAGENET = Normalization((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
TEN = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]


def three_channels(classes: int) -> Pixels:
    """Two training images and a test image of every class."""
    pixels = torch.randint(256, (3 * classes, 3, 4, 4), dtype=torch.uint8)
    labels = torch.arange(3 * classes) % classes
    names = tuple(f"class {k}" for k in range(classes))
    return Pixels(names, pixels[classes:], labels[classes:], pixels[:classes], labels[:classes])


@pytest.mark.parametrize(
    ("name", "classes", "expected"), [("cifar10", 10, CIFAR10), ("cifar100", 100, CIFAR100)]
)
def test_published_constants_are_taken_where_asked_for(
    name: str, classes: int, expected: Normalization, monkeypatch: pytest.MonkeyPatch
) -> None:
    pixels = three_channels(classes)
    monkeypatch.setattr(torchvision_sets, "read", lambda *_: pixels)
    found = data.load(name, normalization="published")
    assert found.normalization == expected
    mean, std = (torch.tensor(v).view(-1, 1, 1) for v in (expected.mean, expected.std))
    torch.testing.assert_close(
        found.test.images, (pixels.test.float() / 255 - mean) / std, rtol=0, atol=1e-6
    )
    assert data.load(name).normalization == Normalization.fit(pixels.train)
    # Whitening takes pixels as they are, whatever is said about normalization.
    white = [
        data.load(name, whitening="zca", normalization=kind) for kind in ("fitted", "published")
    ]
    assert white[0].normalization == white[1].normalization == Normalization((0.0,) * 3, (1.0,) * 3)
    assert torch.equal(white[0].test.images, white[1].test.images)


def folders(root: Path, classes: list[str], mode: str = "RGB") -> str:
    """The name of a dataset of two training images and a test image of every class."""
    for part, count in (("train", 2), ("test", 1)):
        for k, title in enumerate(classes):
            (root / part / title).mkdir(parents=True)
            for i in range(count):
                color = (10 * k, 5 * k, 99) if mode == "RGB" else 10 * k + i
                Image.new(mode, (4, 4), color).save(root / part / title / f"{i}.png")
    return f"imagefolder:{root}"


@pytest.mark.parametrize(
    ("classes", "expected"),
    [
        (TEN, CIFAR10),
        (["n01443537", "n01629819"], IMAGENET),
        (["n02124075", "n04067472", "n12267677"], IMAGENET),
    ],
    ids=["CIFAR-10", "two of Tiny ImageNet", "three of Tiny ImageNet"],
)
def test_folders_are_known_by_their_classes(
    classes: list[str], expected: Normalization, tmp_path: Path
) -> None:
    assert (
        data.load(folders(tmp_path / "any", classes), normalization="published").normalization
        == expected
    )


@pytest.mark.parametrize(
    ("classes", "mode"),
    [
        (["ant", "bee"], "RGB"),
        (["n01443537", "bee"], "RGB"),
        (TEN[:9], "RGB"),
        (["n01443537", "n01629819"], "L"),
    ],
    ids=["own", "in part", "nine", "gray"],
)
def test_a_dataset_without_published_constants_is_named(
    classes: list[str], mode: str, tmp_path: Path
) -> None:
    message = (
        "^normalization must be fitted for {}, which has no published constants, got published$"
    )
    with pytest.raises(UsageError, match=message.format("imagefolder:any")):
        data.load(folders(tmp_path / "any", classes, mode), normalization="published")
    with pytest.raises(UsageError, match=message.format("digits")):
        data.load("digits", normalization="published")
    with pytest.raises(
        UsageError, match="normalization must be fitted or published, got 'imagenet'"
    ):
        data.load("digits", normalization="imagenet")


# ---- splits ----


def numbered(labels: list[int], classes: int | None = None) -> Pixels:
    """One-pixel images, each of a value of its own."""
    count = classes or max(labels) + 1
    values = torch.arange(len(labels), dtype=torch.float32).div(len(labels)).view(-1, 1, 1, 1)
    test = torch.zeros(1, 1, 1, 1)
    names = tuple(f"class {k}" for k in range(count))
    return Pixels(names, values, torch.tensor(labels), test, torch.zeros(1, dtype=torch.int64))


def numbers(found: ImageData, part: Split) -> list[int]:
    """Which images of :func:`numbered` a split holds."""
    values = found.normalization.invert(part.images).flatten()
    return (values * len(found.full_train)).round().int().tolist()


@given(
    st.lists(st.integers(2, 12), min_size=1, max_size=6),
    st.floats(0.01, 0.99),
    st.randoms(use_true_random=False),
)
@example([5], 0.9365643397316486, Random(0))
def test_the_validation_images_are_a_share_of_every_class_and_the_others_remain(
    sizes: list[int], fraction: float, shuffled: Any
) -> None:
    labels = [label for label, size in enumerate(sizes) for _ in range(size)]
    shuffled.shuffle(labels)
    found = prepare("numbered", numbered(labels), fraction)
    train, validation = numbers(found, found.train), numbers(found, found.validation)
    assert sorted(train + validation) == list(range(len(labels)))
    assert [labels[i] for i in train] == found.train.labels.tolist()
    assert [labels[i] for i in validation] == found.validation.labels.tolist()
    share = Fraction(fraction)  # exact: in floats both sides of the bound round apart by 1e-16
    for label, size in enumerate(sizes):
        count = len(found.validation.rows_of(label))
        assert 1 <= count < size
        assert abs(count - share * size) <= max(
            Fraction(1, 2), 1 - share * size, 1 - (1 - share) * size
        )


def test_the_validation_images_are_the_same_every_time_and_are_drawn_at_random() -> None:
    pixels = numbered([0] * 40 + [1] * 40)
    torch.manual_seed(1)
    first = prepare("numbered", pixels, 0.25)
    torch.manual_seed(2)
    second = prepare("numbered", pixels, 0.25)
    validation = numbers(first, first.validation)
    assert validation == numbers(second, second.validation)
    assert len(validation) == 20
    assert validation[:10] != list(range(10))
    assert validation[:10] != list(range(30, 40))


def test_a_stratified_mask_never_takes_a_whole_class() -> None:
    assert stratified_mask(torch.tensor([2, 0, 2, 0]), 3, 0.99).sum() == 2
    assert not stratified_mask(torch.tensor([0]), 2, 0.5).any()


def test_normalization_is_fitted_on_all_training_images_and_not_on_the_test_images() -> None:
    pixels = numbered([0, 0, 1, 1])
    found = prepare("numbered", replace(pixels, test=torch.full((1, 1, 1, 1), 9.0)), 0.5)
    assert found.normalization == Normalization.fit(pixels.train)
    assert found.normalization.invert(found.test.images).item() == pytest.approx(9.0)


def test_bytes_are_scaled_to_the_unit_interval() -> None:
    pixels = numbered([0, 0])
    bytes_ = torch.tensor([0, 255], dtype=torch.uint8).view(2, 1, 1, 1)
    assert prepare(
        "bytes", replace(pixels, train=bytes_, test=bytes_[:1]), 0.5
    ).normalization.mean == (0.5,)


def test_training_and_validation_images_are_parts_of_one_tensor() -> None:
    found = prepare("numbered", numbered([0, 0, 1, 1, 1]), 0.3)
    assert sorted(numbers(found, found.full_train)) == [0, 1, 2, 3, 4]
    for data_set in (found, found.to(torch.device("cpu"))):
        parts = data_set.train, data_set.validation
        for name in ("images", "labels"):
            whole = getattr(data_set.full_train, name)
            assert torch.equal(torch.cat([getattr(part, name) for part in parts]), whole)
            for part in parts:
                assert (
                    getattr(part, name).untyped_storage().data_ptr()
                    == whole.untyped_storage().data_ptr()
                )
        assert [len(part) for part in parts] == [3, 2]


def random_bytes(count: int, *shape: int) -> Pixels:
    """``count`` training images in two classes and half as many to test with."""
    pixels = torch.randint(256, (count + count // 2, *shape), dtype=torch.uint8)
    labels = torch.randint(2, (len(pixels),))
    return Pixels(("a", "b"), pixels[:count], labels[:count], pixels[count:], labels[count:])


def whiten(pixels: torch.Tensor) -> tuple[Normalization, Whitening]:
    return Normalization.identity(pixels.shape[1]), Whitening.fit(pixels, convert=unit)


@pytest.mark.parametrize("whitened", [False, True])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_images_have_the_bits_of_the_formula_for_all_of_them_at_once(
    whitened: bool, layout: torch.memory_format
) -> None:
    """2500 images are prepared in three pieces."""
    pixels = random_bytes(2500, 3, 4, 4)
    found = prepare(
        "bytes",
        replace(pixels, train=pixels.train.contiguous(memory_format=layout)),
        0.2,
        whiten if whitened else normalized,
    )
    train, test = (
        found.normalization.apply(part.float() / 255) for part in (pixels.train, pixels.test)
    )
    if whitened:
        whitening = Whitening.fit(train)
        whitening.apply_(train)
        whitening.apply_(test)
    validation = stratified_mask(pixels.train_labels, 2, 0.2)
    for part, images, labels in (
        (found.train, train[~validation], pixels.train_labels[~validation]),
        (found.validation, train[validation], pixels.train_labels[validation]),
        (found.test, test, pixels.test_labels),
    ):
        assert torch.equal(part.images, images)
        assert torch.equal(part.labels, labels)
        assert part.images.is_contiguous()


def test_bytes_are_counted_to_the_mean_and_deviation_of_their_floats() -> None:
    pixels = random_bytes(5000, 3, 4, 4).train  # more than are counted at once
    found, expected = Normalization.fit(pixels), (pixels.float() / 255).double().numpy()
    np.testing.assert_allclose(found.mean, expected.mean((0, 2, 3)), rtol=1e-14)
    np.testing.assert_allclose(found.std, expected.std((0, 2, 3)), rtol=1e-14)
    constant = Normalization.fit(torch.full((7, 1, 3, 3), 77, dtype=torch.uint8))
    assert constant == Normalization((float(torch.tensor(77.0) / 255),), (1.0,))


# Memory of a dataset that lies in bytes, beyond these bytes, in a process of its own.
CHILD = """
import json, sys
import torch
from pdd_fast.data.normalization import Normalization, unit
from pdd_fast.data.splits import Pixels, normalized, prepare
from pdd_fast.data.whitening import Whitening

def status(key):
    lines = open("/proc/self/status").read().splitlines()
    return int(next(line for line in lines if line.startswith(key + ":")).split()[1]) * 1024

def whiten(some):
    return Normalization.identity(3), Whitening.fit(some, convert=unit)

def prepared(count):
    pixels = torch.arange(192, dtype=torch.uint8).repeat(count).view(count, 3, 8, 8)
    pixels[::2] = 0
    labels = torch.arange(count) % 10
    names, few = tuple(map(str, range(10))), count // 5
    pixels = Pixels(names, pixels, labels, pixels[:few], labels[:few])
    before = status("VmRSS")
    data = prepare("bytes", pixels, 0.1, whiten if sys.argv[1] == "zca" else normalized)
    splits = data.train, data.validation, data.full_train, data.test
    return before, sum(s.images.nbytes for s in splits[2:])

prepared(50)  # what libraries take at their first call
before, size = prepared(150000)
print(json.dumps({"taken": status("VmHWM") - before, "size": size}))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self/status")
@pytest.mark.parametrize("whitening", ["none", "zca"])
def test_a_set_is_never_there_twice_in_floating_point(whitening: str) -> None:
    """138 MB of images; the rest are pieces of 1 MB, 5 MB of labels and rows, and for whitening
    matrices of 0.3 MB.
    """
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
    output = subprocess.run(
        [sys.executable, "-c", CHILD, whitening],
        check=True,
        capture_output=True,
        text=True,
        env=environment,
    )
    found = json.loads(output.stdout)
    assert found["size"] <= found["taken"] <= 1.2 * found["size"], found


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"train_labels": torch.tensor([0, 0, 1, 2])},
            r"training labels must lie in \[0, 2\), got 0\.\.2",
        ),
        (
            {"train_labels": torch.tensor([0, -1, 1, 1])},
            r"training labels must lie in \[0, 2\), got -1\.\.1",
        ),
        ({"test_labels": torch.tensor([2])}, r"test labels must lie in \[0, 2\), got 2\.\.2"),
        (
            {"train_labels": torch.tensor([0, 0, 1])},
            "training labels must be 4, one per image, got 3",
        ),
        ({"test": torch.zeros(0, 1, 1, 1)}, "test images must be at least 1, got none"),
        (
            {"test": torch.zeros(1, 3, 1, 1)},
            r"must have the shape of training images \(1, 1, 1\), got \(3, 1, 1\)",
        ),
        (
            {"train_labels": torch.tensor([0, 0, 0, 1])},
            "class 'class 1' must have at least 2 training images, got 1",
        ),
        (
            {"train_labels": torch.tensor([0, 0, 0, 0])},
            "class 'class 1' must have at least 2 training images, got 0",
        ),
    ],
)
def test_what_does_not_fit_is_named_with_the_data_set(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=f"^mine: .*{message}"):
        prepare("mine", replace(numbered([0, 0, 1, 1]), **change), 0.1)


def test_too_few_images_to_start_from_are_counted_by_class() -> None:
    split = Split(torch.zeros(5, 1, 1, 1), torch.tensor([0, 0, 0, 1, 1]))
    require_images_per_class(split, 2, ("ant", "bee"))
    with pytest.raises(UsageError, match=r"ipc must be at most .*, got 3: class 'bee' has 2"):
        require_images_per_class(split, 3, ("ant", "bee"))
    with pytest.raises(UsageError, match="class 'wasp' has 0"):
        require_images_per_class(split, 1, ("ant", "bee", "wasp"))
    require_images_per_class(split, 1, ("ant", "bee"), each=2)
    with pytest.raises(
        UsageError, match=r"at most 1, got 2: class 'ant' has 3 .*, and every stored .* needs 2"
    ):
        require_images_per_class(
            Split(torch.zeros(3, 1, 1, 1), torch.zeros(3).long()), 2, ("ant",), each=2
        )
    with pytest.raises(
        UsageError, match=r"factor must be at most 1, got 2: class 'bee' has 2 .* image needs 4"
    ):
        require_images_per_class(split, 1, ("ant", "bee"), each=4)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_normalization_has_the_same_bits_for_any_number_of_threads(dtype: torch.dtype) -> None:
    pixels = torch.randint(256, (40_000, 2, 5, 5), dtype=torch.uint8)
    pixels = pixels if dtype == torch.uint8 else pixels.to(dtype) / 255
    found = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        found.append(Normalization.fit(pixels))
        assert torch.get_num_threads() == count
    assert found[0] == found[1] == found[2]
