"""Inputs of captured work arrive whole and in the same place."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from torch import Tensor

from pdd_fast.training import cuda_graphs as graphs
from pdd_fast.training.cuda_graphs import Upload

CPU = torch.device("cpu")
CUDA = torch.device("cuda", 0)
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no GPU")


SHAPES: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
    "vector": ((5,), torch.float32),
    "flag": ((), torch.bool),
    "matrix": ((3, 7), torch.float64),
    "indices": ((2, 2), torch.int64),
    "small": ((3,), torch.int32),
}


def drawn(seed: int) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return {
        name: torch.randint(0, 2, shape, generator=draw).to(dtype)
        for name, (shape, dtype) in SHAPES.items()
    }


def test_every_write_arrives_whole_in_the_same_place(device: torch.device) -> None:
    upload = Upload(SHAPES, device)
    places = {name: tensor.data_ptr() for name, tensor in upload.tensors.items()}
    seen = []
    for seed in range(10):
        sources = drawn(seed)
        upload.write(**sources)
        seen.append({name: tensor.clone() for name, tensor in upload.tensors.items()})
        for source in sources.values():
            source.zero_()  # the caller's again at once, though the copy may be under way
    for seed, found in enumerate(seen):
        for name, expected in drawn(seed).items():
            assert found[name].dtype == expected.dtype
            assert torch.equal(found[name].cpu(), expected), (seed, name)
    assert {name: tensor.data_ptr() for name, tensor in upload.tensors.items()} == places
    assert all(place % 16 == 0 for place in places.values())


def test_sources_may_have_any_strides_and_another_type(device: torch.device) -> None:
    upload = Upload({"matrix": ((3, 7), torch.float64)}, device)
    source = torch.arange(21).view(7, 3).t()
    upload.write(matrix=source)
    assert torch.equal(upload.tensors["matrix"].cpu(), source.double())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"vector": None},
            "sources must be vector, flag, matrix, indices, small, got flag, matrix, indices, "
            "small",
        ),
        ({"other": torch.zeros(1)}, "sources must be vector, .*, got .*, other"),
        ({"vector": torch.zeros(1)}, r"vector must have shape \(5,\), got \(1,\)"),
    ],
)
def test_sources_that_do_not_fit_are_named_and_nothing_is_written(
    change: dict[str, Tensor | None], message: str
) -> None:
    upload = Upload(SHAPES, CPU)
    upload.write(**drawn(0))
    sources = {name: source for name, source in (drawn(1) | change).items() if source is not None}
    with pytest.raises(ValueError, match=message):
        upload.write(**sources)
    for name, expected in drawn(0).items():
        assert torch.equal(upload.tensors[name], expected)


def test_a_buffer_is_written_again_only_after_its_last_copy(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    log: list[str] = []

    class Event:
        def __init__(self, name: str) -> None:
            self.name = name

        def synchronize(self) -> None:
            log.append(f"wait for {self.name}")

        def record(self) -> None:
            log.append(f"{self.name} under way")

    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    upload = Upload(SHAPES, CPU)
    for name in "ab":
        pinned = torch.empty_like(upload._buffer)
        upload._stages.append(graphs._Stage(pinned, upload._views(pinned), Event(name)))  # type: ignore[arg-type]
    for seed in range(4):
        upload.write(**drawn(seed))
        for name, expected in drawn(seed).items():
            assert torch.equal(upload.tensors[name], expected)
        if seed > 0:  # the other buffer, whose copy may not have begun
            for name, expected in drawn(seed - 1).items():
                assert torch.equal(upload._stages[(seed - 1) % 2].tensors[name], expected)
    assert log == ["wait for a", "a under way", "wait for b", "b under way"] * 2
