"""torchvision's datasets, read from small files of their formats, and what is said where something
is missing.
"""

from __future__ import annotations

import hashlib
import importlib
import inspect
import pickle
import re
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from pdd_fast import data
from pdd_fast.runtime.errors import UsageError


class FakeSet:
    """Holds what torchvision's datasets hold after construction, for 10 classes with 2 training
    images each.
    """

    layout: Callable[[np.ndarray], Any]  # from [n, 3, 4, 4]
    attribute = "targets"
    calls: list[tuple[str, dict[str, Any]]]

    def __init__(self, root: str, **options: Any) -> None:
        type(self).calls.append((root, options))
        first = options.get("train", options.get("split") == "train")
        labels = np.repeat(np.arange(10), 2 if first else 1)
        pixels = np.arange(len(labels) * 48).reshape(-1, 3, 4, 4).astype(np.uint8)
        self.data = type(self).layout(pixels)
        setattr(self, self.attribute, labels.tolist())


@pytest.mark.parametrize(
    ("name", "kind", "layout", "attribute", "options"),
    [
        (
            "cifar10",
            "CIFAR10",
            lambda p: p.transpose(0, 2, 3, 1),
            "targets",
            [{"train": True}, {"train": False}],
        ),
        (
            "mnist",
            "MNIST",
            lambda p: torch.from_numpy(p[:, 0].copy()),
            "targets",
            [{"train": True}, {"train": False}],
        ),
        ("svhn", "SVHN", lambda p: p, "labels", [{"split": "train"}, {"split": "test"}]),
    ],
)
def test_every_layout_of_torchvision_becomes_planes(
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    kind: str,
    layout: Any,
    attribute: str,
    options: list[dict[str, Any]],
) -> None:
    calls: list[tuple[str, dict[str, Any]]] = []
    fake = type(
        kind, (FakeSet,), {"layout": staticmethod(layout), "attribute": attribute, "calls": calls}
    )
    package = ModuleType("torchvision")
    package.datasets = SimpleNamespace(**{kind: fake})  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torchvision", package)
    found = data.load(name, "somewhere")
    channels = 1 if name == "mnist" else 3
    assert calls == [("somewhere", {"download": False} | one) for one in options]
    assert (found.in_channels, found.image_size, len(found.full_train), len(found.test)) == (
        channels,
        (4, 4),
        20,
        10,
    )
    expected = np.arange(480).reshape(-1, 3, 4, 4).astype(np.uint8)[:, :channels]
    pixels = (found.normalization.invert(found.test.images) * 255).round()
    np.testing.assert_array_equal(pixels.numpy(), expected)


@pytest.mark.parametrize(
    ("raised", "reason"),
    [
        (
            "RuntimeError('operator torchvision::nms does not exist\\nmore')",
            "operator torchvision::nms does not exist",
        ),
        (
            "AttributeError(\"partially initialized module 'torchvision'\")",
            "partially initialized module",
        ),
        ("OSError('undefined symbol: _ZN3c10')", "undefined symbol: _ZN3c10"),
        ("ImportError()", "ImportError"),
    ],
)
def test_a_torchvision_that_does_not_import_is_explained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, raised: str, reason: str
) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
        monkeypatch.delitem(sys.modules, name)
    (tmp_path / "torchvision").mkdir()
    (tmp_path / "torchvision" / "__init__.py").write_text(f"raise {raised}\n")
    monkeypatch.syspath_prepend(tmp_path)
    message = (
        rf"'cifar10' needs torchvision, which does not import here \({reason}.*\); "
        rf"install .* torch {torch.__version__}"
    )
    with pytest.raises(UsageError, match=message.replace("+", r"\+")) as caught:
        data.load("cifar10")
    assert "\n" not in str(caught.value)


def test_a_missing_torchvision_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchvision", None)
    with pytest.raises(UsageError, match="'svhn' needs torchvision, which does not import here"):
        data.load("svhn")


@pytest.fixture(scope="module")
def datasets() -> Any:
    """torchvision's own readers, where they can be imported."""
    try:
        return importlib.import_module("torchvision.datasets")
    except (ImportError, RuntimeError, OSError, AttributeError) as error:
        pytest.skip(f"torchvision does not import: {error}")


def sample(classes: int, per_class: int, *shape: int) -> tuple[np.ndarray, list[int]]:
    labels = [label for label in range(classes) for _ in range(per_class)]
    rng = np.random.default_rng(per_class)
    return rng.integers(0, 256, (len(labels), *shape), dtype=np.uint8), labels


def md5(path: Path) -> str:
    return hashlib.md5(path.read_bytes()).hexdigest()


def write_cifar(folder: Path, kind: Any, monkeypatch: pytest.MonkeyPatch, classes: int) -> None:
    """Small files of CIFAR's format under ``folder``; the checksums that the reader wants become
    theirs.
    """
    base = folder / kind.base_folder
    base.mkdir(parents=True)
    key = "labels" if classes == 10 else "fine_labels"

    def dump(name: str, content: Any) -> str:
        (base / name).write_bytes(pickle.dumps(content))
        return md5(base / name)

    for attribute, per_class in (("train_list", 2), ("test_list", 1)):
        pixels, labels = sample(classes, per_class, 3072)
        sums = dump(attribute, {"data": pixels, key: labels})
        monkeypatch.setattr(kind, attribute, [[attribute, sums]])
    names = [f"name {k}" for k in range(classes)]
    sums = dump("names", {kind.meta["key"]: names})
    monkeypatch.setattr(kind, "meta", {"filename": "names", "key": kind.meta["key"], "md5": sums})


@pytest.mark.parametrize(("name", "classes"), [("cifar10", 10), ("cifar100", 100)])
def test_cifar_files_are_read(
    datasets: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, classes: int
) -> None:
    write_cifar(tmp_path, getattr(datasets, name.upper()), monkeypatch, classes)
    found = data.load(name, str(tmp_path))
    pixels, labels = sample(classes, 1, 3, 32, 32)
    np.testing.assert_array_equal(
        (found.normalization.invert(found.test.images) * 255).round().numpy(), pixels
    )
    assert found.test.labels.tolist() == labels
    assert found.classes[3] == "name 3"
    assert len(found.full_train) == 2 * classes


def write_idx(path: Path, array: np.ndarray) -> None:
    """The format of MNIST's files."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(
        struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.tobytes()
    )


def write_mnist(folder: Path, kind: str) -> Path:
    raw = folder / kind / "raw"
    for part, per_class in (("train", 2), ("t10k", 1)):
        pixels, labels = sample(10, per_class, 28, 28)
        write_idx(raw / f"{part}-images-idx3-ubyte", pixels)
        write_idx(raw / f"{part}-labels-idx1-ubyte", np.array(labels, dtype=np.uint8))
    return raw


@pytest.mark.parametrize(("name", "kind"), [("mnist", "MNIST"), ("fashionmnist", "FashionMNIST")])
@pytest.mark.usefixtures("datasets")
def test_mnist_files_are_read(tmp_path: Path, name: str, kind: str) -> None:
    write_mnist(tmp_path, kind)
    found = data.load(name, str(tmp_path))
    pixels, labels = sample(10, 1, 1, 28, 28)
    np.testing.assert_array_equal(
        (found.normalization.invert(found.test.images) * 255).round().numpy(), pixels
    )
    assert found.test.labels.tolist() == labels
    assert (found.in_channels, found.image_size, found.num_classes) == (1, (28, 28), 10)


@pytest.mark.parametrize(
    "content",
    [b"", b"\0\0", b"<html>not found</html>", None],
    ids=["empty", "short", "html", "cut"],
)
@pytest.mark.usefixtures("datasets")
def test_a_damaged_file_is_named_with_the_call_that_fetches_it(
    tmp_path: Path, content: bytes | None
) -> None:
    images = write_mnist(tmp_path, "MNIST") / "t10k-images-idx3-ubyte"
    images.write_bytes(images.read_bytes()[:-100] if content is None else content)
    with pytest.raises(
        UsageError,
        match=f"'mnist' is missing or incomplete in '{tmp_path}'.*train=False, download=True",
    ):
        data.load("mnist", str(tmp_path))


def test_svhn_files_are_read(
    datasets: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scipy_io = pytest.importorskip("scipy.io")
    lists = {}
    for part, per_class in (("train", 2), ("test", 1)):
        pixels, labels = sample(10, per_class, 3, 32, 32)
        path = tmp_path / f"{part}_32x32.mat"
        # SVHN counts its digits 1..10, 10 being the digit 0.
        y = np.array([label or 10 for label in labels], dtype=np.uint8)[:, None]
        scipy_io.savemat(path, {"X": pixels.transpose(2, 3, 1, 0), "y": y})
        lists[part] = ["", path.name, md5(path)]
    monkeypatch.setattr(datasets.SVHN, "split_list", lists)
    found = data.load("svhn", str(tmp_path))
    pixels, labels = sample(10, 1, 3, 32, 32)
    np.testing.assert_array_equal(
        (found.normalization.invert(found.test.images) * 255).round().numpy(), pixels
    )
    assert found.test.labels.tolist() == labels
    assert found.classes == tuple("0123456789")


@pytest.mark.parametrize("name", data.NAMES[1:])
def test_missing_files_are_answered_with_the_call_that_fetches_them(
    datasets: Any, tmp_path: Path, name: str
) -> None:
    with pytest.raises(
        UsageError, match=f"'{name}' is missing or incomplete in '{tmp_path}'.*--data-dir"
    ) as caught:
        data.load(name, str(tmp_path))
    call = re.search(
        r"torchvision\.datasets\.(\w+)\('(.*)', (\w+)=('?\w+'?), download=True\)$",
        str(caught.value),
    )
    assert call is not None
    assert call[2] == str(tmp_path)
    assert hasattr(datasets, call[1])
    assert call[3] in inspect.signature(getattr(datasets, call[1])).parameters
