"""The CUDA kernels' own source, run on the host thread by thread; native/host/cuda_runtime.h says
what that shows.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import cases
import host_cuda
import pytest
import test_ops
import torch
from cases import OPERATORS, Operator
from test_ops import EVERY_OPERATOR, results

from pdd_fast.augmentation.dsa import DSA
from pdd_fast.ops import _native
from pdd_fast.ops import dsa as dsa_ops
from pdd_fast.ops.add_rows import add_rows
from pdd_fast.ops.cross_entropy import cross_entropy, cross_entropy_dual

pytestmark = host_cuda.NEEDS_COMPILER

CPU = torch.device("cpu")
HALF_TYPES = [torch.bfloat16, torch.float16]
NORMS = [operator for operator in OPERATORS if operator.name.startswith("norm_relu_pool")]
# Whole packs of channels with planes of more windows than stay in registers one or a few a thread.
LARGE_IMAGES = [(2, 8, 18, 19), (1, 16, 33, 35)]
LAUNCH_FAILURE = 719  # cudaErrorLaunchFailure

names: dict[str, Any] = {
    "ids": lambda value: getattr(value, "name", str(value).removeprefix("torch."))
}


def in_all_types(operators: list[Operator]) -> list[tuple[Operator, torch.dtype]]:
    full = [(operator, dtype) for operator in operators for dtype in (torch.float32, torch.float64)]
    return full + [
        (operator, dtype) for operator in operators if operator.takes_half for dtype in HALF_TYPES
    ]


@pytest.fixture(scope="module")
def library(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    """The kernels as they are, or those that test_cuda_mutations.py has put a mistake in."""
    if given := os.environ.get("PDD_HOST_LIBRARY"):
        return host_cuda.load_module(Path(given))
    objects = request.getfixturevalue("host_objects")
    return host_cuda.load_module(
        host_cuda.linked(tmp_path_factory.mktemp("host") / "library.so", objects, "-shared")
    )


@pytest.fixture(autouse=True)
def _on_the_host(library: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Results start as NaN, which is what torch allocates then, so that a number that is never
    written is seen.
    """
    host_cuda.use(library, monkeypatch)
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def test_results_start_as_nan() -> None:
    assert torch.empty(3).isnan().all()
    assert torch.zeros(3).new_empty(3).isnan().all()


def dsa_arguments(
    *shape: int, strategy: str = "crop_rotate_color"
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    draws = DSA(strategy, mode="multiple").sample(shape[0], (shape[2], shape[3])).packed(CPU)
    return torch.randn(shape), draws.values, draws.operations


# ---- results ----


def require_reference(operator: Operator, dtype: torch.dtype) -> None:
    test = (
        test_ops.test_images_in_16_bits
        if dtype in HALF_TYPES
        else test_ops.test_kernel_equals_reference
    )
    test(operator, dtype, CPU)


def require_the_same_bits_in_any_order(
    operator: Operator, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    for arguments in operator.arguments(torch.float32 if dtype in HALF_TYPES else dtype):
        stored = cases.stored_in(dtype, arguments) if dtype in HALF_TYPES else arguments
        found = []
        for order in ("forward", "backward", "1"):
            monkeypatch.setenv("PDD_HOST_ORDER", order)
            found.append(results(operator.function(*stored)))
        for others in found[1:]:
            for part, other in zip(found[0], others, strict=True):
                assert torch.equal(part, other), [getattr(a, "shape", a) for a in arguments]


@pytest.mark.parametrize(("operator", "dtype"), in_all_types(OPERATORS), **names)
def test_kernel_equals_reference(operator: Operator, dtype: torch.dtype) -> None:
    require_reference(operator, dtype)


@pytest.mark.parametrize(("operator", "dtype"), in_all_types(OPERATORS), **names)
def test_same_bits_in_any_order_of_threads(
    operator: Operator, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A barrier that is missing shows in one of them: a warp then reads what another has yet to
    write.
    """
    require_the_same_bits_in_any_order(operator, dtype, monkeypatch)


@pytest.mark.parametrize(("operator", "dtype"), in_all_types(NORMS), **names)
def test_large_planes(
    operator: Operator, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cases, "IMAGES", LARGE_IMAGES)
    require_reference(operator, dtype)
    require_the_same_bits_in_any_order(operator, dtype, monkeypatch)


@EVERY_OPERATOR
def test_arguments_are_left_alone(operator: Operator) -> None:
    test_ops.test_arguments_are_left_alone(operator, CPU)


@pytest.mark.parametrize("value", [0.0, 1.1, -3.3e7])
def test_a_constant_plane_has_no_variance(value: float) -> None:
    test_ops.test_a_constant_plane_has_no_variance(value, (9, 7), CPU)


# ---- shared memory of dsa ----


@pytest.mark.parametrize("side", [64, 100], ids=["more than 48 KB", "more than there is"])
def test_dsa_of_large_images(side: int) -> None:
    images, draws, operations = dsa_arguments(5, 3, side, side)
    for dtype, tolerance in (cases.TOLERANCE | cases.HALF_TOLERANCE).items():
        given, rest = images.to(dtype), (draws, operations, [9, 9])
        forward = dsa_ops.dsa.reference(given.double(), *rest, False)
        adjoint = dsa_ops.dsa_adjoint.reference(given.double(), *rest)
        assert cases.relative_error(dsa_ops.dsa(given, *rest), forward) <= tolerance
        assert cases.relative_error(dsa_ops.dsa_adjoint(given, *rest), adjoint) <= tolerance


def test_the_limit_of_shared_memory_is_never_lowered() -> None:
    """The stand-in for the runtime refuses it, since a captured graph may need the larger one."""
    for side in (64, 52, 64):
        images, draws, operations = dsa_arguments(2, 3, side, side)
        dsa_ops.dsa(images, draws, operations, [9, 9])


def test_dsa_in_scratch_gives_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Five images share the scratch of three blocks."""
    for dtype in (torch.float32, torch.float64, *HALF_TYPES):
        images, draws, operations = dsa_arguments(5, 3, 9, 11)
        arguments = images.to(dtype), draws, operations, [4, 4]
        monkeypatch.delenv("PDD_HOST_SHARED_BYTES", raising=False)
        assert _native.scratch_images(arguments[0], 4) == 0
        shared = dsa_ops.dsa(*arguments), dsa_ops.dsa_adjoint(*arguments)
        monkeypatch.setenv("PDD_HOST_SHARED_BYTES", "2000")
        assert _native.scratch_images(arguments[0], 4) == 5
        scratch = dsa_ops.dsa(*arguments), dsa_ops.dsa_adjoint(*arguments)
        assert torch.equal(shared[0], scratch[0])
        assert torch.equal(shared[1], scratch[1])


def test_shared_memory_that_the_runtime_refuses_is_an_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    images, draws, operations = dsa_arguments(1, 3, 64, 64)
    monkeypatch.setattr(_native, "scratch_images", lambda images, number_bytes: 0)
    monkeypatch.setenv("PDD_HOST_SHARED_BYTES", "60000")
    with pytest.raises(RuntimeError, match="dsa: cudaErrorInvalidValue"):
        dsa_ops.dsa(images, draws, operations, [9, 9])


# ---- errors ----


@EVERY_OPERATOR
def test_a_failed_launch_is_an_error_with_the_operators_name(
    operator: Operator, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = next(operator.arguments(torch.float32))
    monkeypatch.setenv("PDD_HOST_FAIL", str(LAUNCH_FAILURE))
    with pytest.raises(RuntimeError, match=f"^{operator.name}: cudaErrorLaunchFailure: "):
        operator.function(*arguments)
    monkeypatch.delenv("PDD_HOST_FAIL")
    operator.function(*arguments)


@pytest.mark.parametrize("label", [3, -1, 2**62])
def test_a_label_out_of_range_gives_a_loss_of_nan(label: int) -> None:
    logits, labels = torch.randn(5, 3), torch.tensor([0, 1, label, 2, 0])
    for losses in (
        cross_entropy(logits, labels)[0],
        cross_entropy_dual(logits, torch.randn(5, 3), labels)[0],
    ):
        assert losses.isnan().tolist() == [False, False, True, False, False]


@pytest.mark.parametrize("number", [-2, 6, 2**31 - 1])
def test_an_unknown_operation_gives_an_image_of_nan(number: int) -> None:
    images, draws, operations = dsa_arguments(3, 2, 5, 4, strategy="flip")
    operations = operations.expand(1, 3).clone()
    operations[0, 1] = number
    for found in (
        dsa_ops.dsa(images, draws, operations, [2, 2]),
        dsa_ops.dsa_adjoint(images, draws, operations, [2, 2]),
    ):
        assert found.isnan().flatten(1).all(1).tolist() == [False, True, False]
        assert found[::2].isfinite().all()


@pytest.mark.parametrize("row", [-1, 4, 2**62])
def test_a_row_out_of_range_is_left_out(row: int) -> None:
    target, rows = torch.randn(4, 3), torch.randn(2, 3)
    expected = target.clone()
    expected[3] += rows[1]
    assert torch.equal(add_rows(target, torch.tensor([row, 3]), rows), expected)
