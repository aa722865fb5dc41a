"""The precision of convolutions: what its names mean, and that torch's flags are set around a pass
and put back.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import pdd_fast
from pdd_fast import engines
from pdd_fast.benchmarks import precision as precision_benchmark
from pdd_fast.runtime import precision

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
cudnn: Any = torch.backends.cudnn
matmul: Any = torch.backends.cuda.matmul


def flags() -> tuple[Any, ...]:
    """Settings that a user may have changed, readable without a GPU."""
    return cudnn.conv.fp32_precision, matmul.fp32_precision, cudnn.deterministic, cudnn.benchmark


@pytest.fixture(autouse=True)
def _flags_of_the_process() -> Iterator[None]:
    before = flags()
    yield
    cudnn.conv.fp32_precision, matmul.fp32_precision, cudnn.deterministic, cudnn.benchmark = before


@pytest.mark.parametrize(
    ("name", "on_cpu", "on_cuda"),
    [
        ("auto", "float32", "tf32"),
        ("float32", "float32", "float32"),
        ("tf32", "tf32", "tf32"),
        ("bfloat16", "bfloat16", "bfloat16"),
    ],
)
def test_auto_is_what_the_device_has(name: str, on_cpu: str, on_cuda: str) -> None:
    assert precision.resolve(name, CPU) == on_cpu
    assert precision.resolve(name, CUDA) == on_cuda


def test_names() -> None:
    assert [precision.check(name) for name in precision.NAMES] == ["float32", "tf32", "bfloat16"]
    for name in ("auto", "fp16", ""):
        with pytest.raises(
            ValueError, match=rf"^precision must be one of float32, tf32, bfloat16, got '{name}'$"
        ):
            precision.check(name)


def test_only_bfloat16_stores_in_another_type() -> None:
    assert precision.storage("float32", torch.float32) == torch.float32
    assert precision.storage("tf32", torch.float32) == torch.float32
    assert (
        precision.storage("tf32", torch.float64) == torch.float64
    )  # TF32 is about float32 tensors alone
    assert precision.storage("bfloat16", torch.float32) == torch.bfloat16
    with pytest.raises(
        TypeError,
        match=r"^parameters must be torch\.float32 for precision 'bfloat16', got torch\.float64$",
    ):
        precision.storage("bfloat16", torch.float64)


STATES = pytest.mark.parametrize(
    "state",
    [("tf32", "none", False, False), ("ieee", "tf32", True, True), ("none", "ieee", False, True)],
    ids=["torch's own", "the opposite", "mixed"],
)


@STATES
@pytest.mark.parametrize("name", precision.NAMES)
def test_flags_are_set_inside_and_put_back(name: str, state: tuple[Any, ...]) -> None:
    cudnn.conv.fp32_precision, matmul.fp32_precision, cudnn.deterministic, cudnn.benchmark = state
    before = flags()
    with precision.computing_in(name, CUDA):
        assert (cudnn.conv.fp32_precision == "tf32") == (name == "tf32")
        assert matmul.fp32_precision != "tf32"
        assert cudnn.deterministic
        assert not cudnn.benchmark
    assert flags() == before


def test_flags_are_put_back_after_an_error() -> None:
    before = flags()
    with pytest.raises(KeyError), precision.computing_in("float32", CUDA):
        raise KeyError
    assert flags() == before


@pytest.mark.parametrize("allowed", [True, False])
def test_the_older_switch_can_be_read_and_set_afterwards(allowed: bool) -> None:
    kept = cudnn.allow_tf32
    try:
        cudnn.allow_tf32 = allowed
        with precision.computing_in("float32" if allowed else "tf32", CUDA):
            pass
        assert cudnn.allow_tf32 == allowed
        cudnn.allow_tf32 = not allowed
        assert (cudnn.conv.fp32_precision == "tf32") == (not allowed)
    finally:
        cudnn.allow_tf32 = kept


@pytest.mark.parametrize("mkldnn", ["ieee", "tf32", "bf16"])
@pytest.mark.parametrize("wanted", ["highest", "high", "medium"])
def test_the_older_setting_of_matrix_products_agrees_inside_and_is_put_back(
    wanted: str, mkldnn: str
) -> None:
    """torch raises an error in a product if the older and the newer setting differ."""
    before = matmul.fp32_precision, torch.backends.mkldnn.matmul.fp32_precision
    try:
        torch.set_float32_matmul_precision(wanted)
        torch.backends.mkldnn.matmul.fp32_precision = mkldnn
        with precision.computing_in("tf32", CUDA):
            assert matmul.fp32_precision != "tf32"
            assert not matmul.allow_tf32  # its getter raises if the two differ
        assert matmul.allow_tf32 == (wanted != "highest")
        assert (matmul.fp32_precision == "tf32") == (wanted != "highest")
        assert torch.backends.mkldnn.matmul.fp32_precision == mkldnn
    finally:
        torch.set_float32_matmul_precision("highest")
        matmul.fp32_precision, torch.backends.mkldnn.matmul.fp32_precision = before


def test_on_the_cpu_nothing_is_set() -> None:
    cudnn.deterministic, cudnn.benchmark = False, True
    before = flags()
    with precision.computing_in("float32", CPU):
        assert flags() == before


@pytest.mark.usefixtures(
    "composed"
)  # on the CPU one kernel makes a pass, in the precision of its numbers
@pytest.mark.parametrize("name", ["fused", "autograd"])
def test_every_pass_of_an_engine_runs_in_its_precision(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Depth counts the passes that are under way, so that a convolution outside of one is seen."""
    asked: list[tuple[str, torch.device]] = []
    depth, convolved = 0, 0
    original = precision.computing_in

    class Watched(AbstractContextManager[None]):
        def __init__(self, name: str, device: torch.device) -> None:
            asked.append((name, device))
            self.inner = original(name, device)

        def __enter__(self) -> None:
            nonlocal depth
            depth += 1
            self.inner.__enter__()

        def __exit__(self, *error: Any) -> None:
            nonlocal depth
            depth -= 1
            self.inner.__exit__(*error)

    class Convolutions(TorchDispatchMode):
        def __torch_dispatch__(
            self, function: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            nonlocal convolved
            if "convolution" in str(function):
                assert depth > 0, function
                convolved += 1
            return function(*args, **(kwargs or {}))

    monkeypatch.setattr(precision, "computing_in", Watched)
    net = pdd_fast.ConvNet(2, 3, 8, width=4, depth=2)
    engine = engines.choose(net, name, "tf32")
    theta = pdd_fast.flatten_parameters(net)
    images, labels, direction = (
        torch.randn(5, 2, 8, 8),
        torch.randint(3, (5,)),
        torch.randn(len(theta)),
    )

    def passes() -> Iterator[Any]:
        yield engine.logits(theta, images)
        for keep in (False, True):
            saved = engine.gradient(theta, images, labels, keep)[2]
            yield saved
            yield engine.dual(theta, images, labels, direction, saved)
        for networks in (1, 3):
            many = theta.expand(networks, -1)
            yield engine.gradients(
                many, images.expand(networks, -1, -1, -1, -1), labels.expand(networks, -1)
            )
            yield engine.logits_of(many, images)

    with Convolutions():
        for _ in passes():
            assert convolved > 0
            assert asked
            assert set(asked) == {("tf32", CPU)}
            convolved = 0
            asked.clear()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no GPU")
def test_on_a_gpu_the_flags_reach_the_convolutions() -> None:
    """TF32 keeps 10 bits of an operand's mantissa: errors of about 2^-11, where float32 has
    2^-24."""
    net = pdd_fast.ConvNet(16, 4, 16, width=32, depth=1).cuda()
    theta, images = pdd_fast.flatten_parameters(net), torch.randn(8, 16, 16, 16, device="cuda")

    def error(name: str) -> float:
        truth: Tensor = engines.choose(net.double()).logits(theta.double(), images.double())
        found = engines.choose(net.float(), "fused", name).logits(theta, images)
        return float((found - truth).norm() / truth.norm())

    assert error("float32") < 1e-5
    assert torch.cuda.get_device_capability() < (8, 0) or 1e-5 < error("tf32") < 1e-2
    assert 1e-4 < error("bfloat16") < 3e-2


# ---- benchmarks/precision.py ----


def test_emulated_tf32_rounds_to_nearest_and_ties_to_even() -> None:
    unit = 2.0**-10  # of numbers in [1, 2)
    given = torch.tensor(
        [
            1.0,
            1 + unit,
            1 + 0.49 * unit,
            1 + 0.51 * unit,
            1 + 0.5 * unit,
            1 + 1.5 * unit,
            0.0,
            2 - unit / 4,
        ]
    )
    expected = torch.tensor([1.0, 1 + unit, 1.0, 1 + unit, 1.0, 1 + 2 * unit, 0.0, 2.0])
    assert torch.equal(precision_benchmark.rounded(given), expected)
    assert torch.equal(precision_benchmark.rounded(-given), -expected)
    many = torch.randn(10000) * 2.0 ** torch.randint(-30, 30, (10000,))
    assert ((precision_benchmark.rounded(many) - many).abs() <= 2.0**-11 * many.abs()).all()


def test_the_benchmark_measures_every_precision(tmp_path: Path) -> None:
    arguments = [
        "--steps",
        "1",
        "2",
        "--batch=4",
        "--seeds=2",
        "--width=4",
        "--depth=2",
        "--size=8",
        "--device=cpu",
    ]
    arguments += ["--threads=1", f"--output={tmp_path / 'record.json'}"]
    command = [sys.executable, "-P", "-m", "pdd_fast.benchmarks.precision", *arguments]
    subprocess.run(command, check=True, capture_output=True, text=True, cwd=tmp_path)
    record = json.loads((tmp_path / "record.json").read_text())
    assert [(row["steps"], row["precision"]) for row in record["results"]] == [
        (steps, name) for steps in (1, 2) for name in ("float32", "tf32, emulated", "bfloat16")
    ]
    for row in record["results"]:
        low, high = {"float32": (0, 1e-4), "tf32, emulated": (1e-5, 0.1), "bfloat16": (1e-4, 0.3)}[
            row["precision"]
        ]
        assert low <= row["images"] < high, row
        assert len(row["images_all"]) == 2
