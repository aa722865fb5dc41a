"""Requirements of every operator, over all rows of cases.OPERATORS."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import HALF_TOLERANCE, OPERATORS, TOLERANCE, Operator, relative_error, stored_in

from pdd_fast.ops import _native

EVERY_OPERATOR = pytest.mark.parametrize("operator", OPERATORS, ids=lambda operator: operator.name)
EVERY_TYPE = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64], ids=["float32", "float64"]
)


def results(value: Any) -> tuple[torch.Tensor, ...]:
    return (value,) if isinstance(value, torch.Tensor) else tuple(value)


def moved(arguments: tuple[Any, ...], device: torch.device) -> tuple[Any, ...]:
    """``arguments`` on ``device`` with the strides they have: ``to`` alone would pack a slice."""

    def as_it_lies(a: torch.Tensor) -> torch.Tensor:
        return torch.empty_strided(a.shape, a.stride(), dtype=a.dtype, device=device).copy_(a)

    return tuple(as_it_lies(a) if isinstance(a, torch.Tensor) else a for a in arguments)


def test_the_kernels_are_there(device: torch.device) -> None:
    assert _native.load(device.type) is not None, _native.load_error(device.type)


@EVERY_OPERATOR
@EVERY_TYPE
def test_kernel_equals_reference(
    operator: Operator, dtype: torch.dtype, device: torch.device
) -> None:
    for arguments in operator.arguments(dtype):
        # The reference in float64 at the same point, so that float32 is held to the truth and not
        # to its own rounding.
        exact = tuple(
            a.double() if isinstance(a, torch.Tensor) and a.is_floating_point() else a
            for a in arguments
        )
        expected = results(operator.reference(*exact))
        found = results(operator.function(*moved(arguments, device)))
        assert len(found) == len(expected)
        for part, truth in zip(found, expected, strict=True):
            assert part.shape == truth.shape
            assert part.dtype == dtype
            assert relative_error(part, truth) <= TOLERANCE[dtype], [
                getattr(a, "shape", a) for a in arguments
            ]


@pytest.mark.parametrize(
    "operator", [o for o in OPERATORS if o.takes_half], ids=lambda operator: operator.name
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_images_in_16_bits(operator: Operator, dtype: torch.dtype, device: torch.device) -> None:
    """Arithmetic in 32 bits: images are off by their own rounding alone, everything else by that of
    float32.
    """
    for arguments in operator.arguments(torch.float32):
        stored = stored_in(dtype, arguments)
        exact = tuple(
            a.double() if isinstance(a, torch.Tensor) and a.is_floating_point() else a
            for a in stored
        )
        expected = results(operator.reference(*exact))
        for part, truth in zip(
            results(operator.function(*moved(stored, device))), expected, strict=True
        ):
            assert part.dtype == (dtype if truth.dim() == 4 else torch.float32)
            tolerance = HALF_TOLERANCE[dtype] if truth.dim() == 4 else TOLERANCE[torch.float32]
            assert relative_error(part, truth) <= tolerance, [
                getattr(a, "shape", a) for a in arguments
            ]


@pytest.mark.parametrize(
    "operator", [o for o in OPERATORS if o.takes_half], ids=lambda operator: operator.name
)
def test_tensors_may_begin_anywhere(operator: Operator, device: torch.device) -> None:
    """Kernels that move 16 bytes at once have to see where they can't: a weight is a slice of a
    flat vector.
    """

    def further_on(a: Any) -> Any:
        if not isinstance(a, torch.Tensor) or not a.is_floating_point() or not a.is_contiguous():
            return a
        return torch.cat([a.new_zeros(1), a.flatten()])[1:].view(a.shape)

    for arguments in operator.arguments(torch.float32):
        arguments = moved(arguments, device)
        found = results(operator.function(*(further_on(a) for a in arguments)))
        for part, expected in zip(found, results(operator.function(*arguments)), strict=True):
            # Another kernel may take over, which adds in another order.
            assert relative_error(part, expected) <= TOLERANCE[torch.float32]


@pytest.mark.usefixtures("every_region_shared")
@EVERY_OPERATOR
def test_same_bits_again_and_for_any_number_of_threads(
    operator: Operator, device: torch.device
) -> None:
    threads = torch.get_num_threads()
    try:
        for arguments in operator.arguments(torch.float32):
            arguments = moved(arguments, device)
            first = results(operator.function(*arguments))
            torch.set_num_threads(1)
            one_thread = results(operator.function(*arguments))
            torch.set_num_threads(3)
            three_threads = results(operator.function(*arguments))
            for a, b, c in zip(first, one_thread, three_threads, strict=True):
                assert torch.equal(a, b)
                assert torch.equal(a, c)
    finally:
        torch.set_num_threads(threads)


@EVERY_OPERATOR
def test_arguments_are_left_alone(operator: Operator, device: torch.device) -> None:
    arguments = moved(next(operator.arguments(torch.float64)), device)
    copies = [a.clone() if isinstance(a, torch.Tensor) else a for a in arguments]
    operator.function(*arguments)
    for argument, copy in zip(arguments, copies, strict=True):
        assert (
            torch.equal(argument, copy) if isinstance(argument, torch.Tensor) else argument == copy
        )


@EVERY_OPERATOR
def test_opcheck(operator: Operator, device: torch.device) -> None:
    for number, arguments in enumerate(operator.arguments(torch.float64)):
        if number % 7 == 0:  # each takes 50 ms; the shapes repeat
            torch.library.opcheck(
                operator.function,
                moved(arguments, device),
                test_utils=("test_schema", "test_faketensor"),
            )


@EVERY_OPERATOR
def test_wrong_types_and_shapes_are_named(operator: Operator) -> None:
    arguments = next(operator.arguments(torch.float32))
    with pytest.raises(TypeError, match=f"{operator.name}: .* must be"):
        operator.function(arguments[0].to(torch.int32), *arguments[1:])
    for i, argument in enumerate(arguments):
        if isinstance(argument, torch.Tensor):
            wrong = (*arguments[:i], argument.new_zeros((*argument.shape, 2)), *arguments[i + 1 :])
            with pytest.raises(ValueError, match=f"{operator.name}: .* must .*, got"):
                operator.function(*wrong)


@pytest.mark.parametrize("value", [0.0, 1.1, 3.3e4, -3.3e7])
@pytest.mark.parametrize("size", [(9, 7), (32, 32), (3, 3)])
def test_a_constant_plane_has_no_variance(
    value: float, size: tuple[int, int], device: torch.device
) -> None:
    """Its mean is rounded; taken as it is, the rounding would be amplified by up to 1/sqrt(eps) =
    316.
    """
    from pdd_fast.ops.norm_relu_pool import norm_relu_pool

    z = torch.full((1, 20, *size), value, device=device)
    out, mean, rstd = norm_relu_pool(
        z, torch.ones(20, device=device), torch.zeros(20, device=device)
    )
    assert not out.any()
    assert torch.equal(mean, z[:, :, 0, 0])
    assert torch.allclose(rstd, torch.tensor(1e-5).rsqrt().to(device))


def test_reference_runs_with_a_warning_where_nothing_was_built(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from pdd_fast.ops.cross_entropy import cross_entropy

    logits, labels = torch.randn(4, 3), torch.randint(3, (4,))
    expected = cross_entropy(logits, labels)
    monkeypatch.setattr(
        _native, "_load", lambda device: (None, f"pdd_fast._{device} was not built")
    )
    _native.explain_missing.cache_clear()
    with pytest.warns(
        _native.MissingKernelsWarning, match="pdd_fast._cpu was not built.*pdd-fast env"
    ):
        found = cross_entropy(logits, labels)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)
    cross_entropy(logits, labels)  # the warning comes once: a second one would be an error here
    _native.explain_missing.cache_clear()
