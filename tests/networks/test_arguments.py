"""Labels and batches that unroll and gradient_matching take, and their errors for others."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import pdd_fast
from pdd_fast.networks.arguments import as_indices, as_labels

INDICES = torch.tensor([0, 2, 1, 3, 3, 0])


def problem() -> tuple[pdd_fast.ConvNet, Tensor, Tensor]:
    torch.manual_seed(0)
    net = pdd_fast.ConvNet(3, 4, 8, width=4, depth=2)
    return net, pdd_fast.flatten_parameters(net), torch.randn(6, 3, 8, 8)


def unrolled(labels: Any = INDICES, batches: Any = ((0, 1, 2, 3, 4, 5),)) -> Tensor:
    net, theta, images = problem()
    return pdd_fast.unroll(net, theta, images, labels, 0.1, batches)


def matched(labels: Any) -> Tensor:
    net, theta, images = problem()
    return pdd_fast.gradient_matching(net, theta, images, labels, images.flip(0), labels.flip(0))


@pytest.mark.parametrize("use", [unrolled, matched])
@pytest.mark.parametrize(
    "convert",
    [
        torch.Tensor.int,
        torch.Tensor.byte,
        torch.Tensor.short,
        torch.Tensor.char,
        torch.Tensor.float,
        torch.Tensor.double,
        torch.Tensor.half,
    ],
    ids=lambda convert: convert.__name__,
)
def test_class_indices_of_any_type_mean_the_same(
    convert: Callable[[Tensor], Tensor], use: Callable[..., Tensor]
) -> None:
    assert torch.equal(use(convert(INDICES)), use(INDICES))


@pytest.mark.parametrize("use", [unrolled, matched])
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8, torch.bool])
def test_one_hot_rows_of_integers_are_weights(
    dtype: torch.dtype, use: Callable[..., Tensor]
) -> None:
    one_hot = nn.functional.one_hot(INDICES, 4)
    assert torch.equal(use(one_hot.to(dtype)), use(one_hot.float()))


def test_pairs_of_batches_convert_each() -> None:
    net, theta, images = problem()
    pairs = torch.stack([images, images + 1])
    found = [
        pdd_fast.gradient_matching(net, theta, pairs, labels, pairs.flip(1), labels)
        for labels in (
            torch.stack([INDICES, INDICES]),
            [INDICES.int(), nn.functional.one_hot(INDICES, 4).float()],
        )
    ]
    torch.testing.assert_close(*found)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (
            torch.rand(6, 1),
            r"labels must be class indices \[n\], or weights .*, got \(6, 1\); pass "
            r".*labels\.squeeze",
        ),
        (
            INDICES[:, None],
            r"labels must be class indices \[n\], or weights .*, got \(6, 1\); pass "
            r".*labels\.squeeze",
        ),
        (torch.rand(6), r"labels must be class indices or weights .*no whole numbers"),
        (torch.full((6,), torch.inf), "labels must be class indices or weights .*no whole numbers"),
        (torch.full((6,), torch.nan), "labels must be class indices or weights .*no whole numbers"),
        (
            INDICES.float().requires_grad_(),
            "labels must be class indices or weights .*require gradients",
        ),
        (torch.ones(6, 4, dtype=torch.int64), r"labels must be one-hot where they are integers"),
        (2 * nn.functional.one_hot(INDICES, 4), r"labels must be one-hot where they are integers"),
        (INDICES.float() + 4, r"labels must lie in \[0, 4\), got 4\.\.7"),
        (
            torch.tensor([255] * 6, dtype=torch.uint8),
            r"labels must lie in \[0, 4\), got 255\.\.255",
        ),
        (nn.functional.one_hot(INDICES, 5), r"labels must have shape \(6, 4\), got \(6, 5\)"),
    ],
)
def test_other_labels_are_named(labels: Tensor, message: str) -> None:
    for use in (unrolled, matched):
        with pytest.raises(ValueError, match=message):
            use(labels)


def test_one_column_is_refused_for_every_module() -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(192, 1))
    _, _, images = problem()
    for labels in (torch.rand(6, 1), torch.zeros(6, 1, dtype=torch.int64)):
        with pytest.raises(ValueError, match="labels must be class indices"):
            pdd_fast.unroll(net, pdd_fast.flatten_parameters(net), images, labels, 0.1, [range(6)])


@pytest.mark.parametrize(
    "batch",
    [
        [3, 0, 0, 5],
        (3, 0, 0, 5),
        np.array([3, 0, 0, 5]),
        torch.tensor([3, 0, 0, 5], dtype=torch.int32),
        [torch.tensor(3), 0, np.int64(0), 5],
        torch.tensor([3, 0, 0, 5], dtype=torch.uint8),
    ],
    ids=["list", "tuple", "array", "int32", "mixed", "uint8"],
)
def test_batches_may_be_anything_that_holds_whole_numbers(batch: Any) -> None:
    assert torch.equal(
        unrolled(batches=[batch, range(6)]),
        unrolled(batches=[torch.tensor([3, 0, 0, 5]), torch.arange(6)]),
    )


def test_batches_may_be_one_tensor_or_a_generator() -> None:
    rows = torch.tensor([[0, 1], [2, 3], [5, 5]])
    expected = unrolled(batches=list(rows))
    assert torch.equal(unrolled(batches=rows), expected)
    assert torch.equal(unrolled(batches=(row for row in rows.tolist())), expected)


@pytest.mark.parametrize(
    ("batches", "error", "message"),
    [
        ([[0.5, 1]], TypeError, r"batches\[0\] must be a vector of whole numbers, got \[0\.5, 1\]"),
        ([[True, False]], TypeError, r"batches\[0\] must be a vector of whole numbers, got \[True"),
        ([0, 1, 2], TypeError, r"batches\[0\] must be a vector of whole numbers, got 0"),
        (["012"], TypeError, r"batches\[0\] must be a vector of whole numbers, got '012'"),
        ([[0], [2**70]], TypeError, r"batches\[1\] must be a vector of whole numbers"),
        (
            [torch.tensor([True, False])],
            TypeError,
            r"batches\[0\] must be int64, got torch\.bool; pass mask\.nonzero",
        ),
        ([torch.tensor([0.0])], TypeError, r"batches\[0\] must be int64, got torch\.float32"),
        ([[0], []], ValueError, r"batches\[1\] must be a vector of indices, got \(0,\)"),
        ([torch.tensor(0)], ValueError, r"batches\[0\] must be a vector of indices, got \(\)"),
        ([[0, 6]], ValueError, r"batches\[0\] must hold indices in \[0, 6\), got 0\.\.6"),
        ([[-1]], ValueError, r"batches\[0\] must hold indices in \[0, 6\), got -1\.\.-1"),
    ],
)
def test_other_batches_are_named(batches: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        unrolled(batches=batches)


@given(st.lists(st.integers(0, 2**40), min_size=1, max_size=20))
def test_indices_keep_their_values(numbers: list[int]) -> None:
    found = as_indices("f", numbers, "x")
    assert found.dtype == torch.int64
    assert found.tolist() == numbers


@given(
    st.lists(st.integers(0, 99), min_size=1, max_size=20),
    st.sampled_from([torch.uint8, torch.int32, torch.float16]),
)
def test_labels_keep_their_values(numbers: list[int], dtype: torch.dtype) -> None:
    assert as_labels("f", torch.tensor(numbers).to(dtype), torch.float32).tolist() == numbers


def test_weights_and_what_requires_gradients_stay_as_they_are() -> None:
    weights = torch.rand(6, 4).requires_grad_()
    assert as_labels("f", weights, torch.float32) is weights


@pytest.mark.parametrize(
    "net", [nn.Flatten(), nn.Sequential(nn.ReLU(), nn.Flatten())], ids=["a layer", "several"]
)
def test_a_network_without_parameters_is_named(net: nn.Module) -> None:
    images, labels = torch.randn(2, 3, 1, 1), torch.arange(2)
    with pytest.raises(
        ValueError, match="unroll: net must have parameters, got a network without any"
    ):
        pdd_fast.unroll(net, torch.zeros(0), images, labels, 0.1, [[0]])
    with pytest.raises(ValueError, match=r"gradient_matching: .*parameters"):
        pdd_fast.gradient_matching(net, torch.zeros(0), images, labels, images, labels)
    with pytest.raises(ValueError, match="flatten_parameters: net must have parameters, got none"):
        pdd_fast.flatten_parameters(net)


def test_what_the_caller_writes_to_later_changes_nothing() -> None:
    net, theta, images = problem()
    x, dsa = images.clone().requires_grad_(), pdd_fast.DSA(mode="multiple")
    index, labels, drawn = (
        torch.tensor([0, 1, 2]),
        INDICES.clone(),
        dsa.sample(3, 8, torch.Generator().manual_seed(0)),
    )

    def gradient(write: bool) -> Tensor:
        end = pdd_fast.unroll(net, theta, x, labels.int(), 0.5, [index], [drawn])
        if write:
            index.copy_(torch.tensor([3, 4, 5]))
            drawn.values.zero_()
        return torch.autograd.grad(end.square().sum(), x)[0]

    expected = gradient(False)
    assert torch.equal(gradient(True), expected)


def test_rates_may_be_a_list_of_tensors_that_get_gradients() -> None:
    net, theta, images = problem()
    first, second = (torch.tensor(lr, requires_grad=True) for lr in (0.1, 0.2))
    end = pdd_fast.unroll(net, theta, images, INDICES, [first, second], [range(6)] * 2)
    lrs = torch.tensor([0.1, 0.2], requires_grad=True)
    same = pdd_fast.unroll(net, theta, images, INDICES, lrs, [range(6)] * 2)
    assert torch.equal(end, same)
    found = torch.stack(torch.autograd.grad(end.square().sum(), (first, second)))
    assert torch.equal(found, torch.autograd.grad(same.square().sum(), lrs)[0])
    with pytest.raises(
        ValueError, match=r"learning_rate must be a number or have shape \(2,\), got \(1,\)"
    ):
        pdd_fast.unroll(net, theta, images, INDICES, [first], [range(6)] * 2)


@pytest.mark.parametrize(
    "labels", [INDICES.tolist(), INDICES.numpy(), tuple(INDICES.tolist())], ids=str
)
def test_labels_may_be_anything_that_becomes_a_tensor(labels: Any) -> None:
    assert torch.equal(unrolled(labels), unrolled(INDICES))
    with pytest.raises(
        TypeError, match="labels must be a tensor of class indices or weights, got str"
    ):
        unrolled("012310")


def test_no_label_is_left_out_of_the_loss() -> None:
    """torch's cross-entropy takes -100 for "no label"."""
    net = nn.Sequential(nn.Flatten(), nn.Linear(192, 4))
    _, _, images = problem()
    with pytest.raises(ValueError, match="labels must lie from 0 on, got -100"):
        pdd_fast.unroll(
            net, pdd_fast.flatten_parameters(net), images, torch.full((6,), -100), 0.1, [range(6)]
        )
