"""Device names, on machines with and without a GPU."""

from __future__ import annotations

import pytest
import torch

from pdd_fast.runtime.devices import resolve_device
from pdd_fast.runtime.errors import UsageError


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> int:
    """A machine on which torch finds so many GPUs."""
    count: int = request.param
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    return count


WITH = pytest.mark.parametrize("gpus", [2], indirect=True)
WITHOUT = pytest.mark.parametrize("gpus", [0], indirect=True)
EITHER = pytest.mark.parametrize("gpus", [0, 2], indirect=True)


@WITHOUT
@pytest.mark.usefixtures("gpus")
def test_auto_is_the_cpu_where_there_is_no_gpu() -> None:
    assert resolve_device("auto") == torch.device("cpu")


@WITH
@pytest.mark.usefixtures("gpus")
def test_auto_is_the_gpu_where_there_is_one() -> None:
    assert resolve_device("auto").type == "cuda"


@EITHER
@pytest.mark.usefixtures("gpus")
@pytest.mark.parametrize("name", ["cpu", "cpu:0"])
def test_the_cpu_is_always_there_and_is_called_as_tensors_call_it(name: str) -> None:
    assert resolve_device(name) == torch.zeros(1).device


@WITH
@pytest.mark.usefixtures("gpus")
@pytest.mark.parametrize("name", ["cuda", "cuda:0", "cuda:1"])
def test_a_gpu_is_taken_by_its_name(name: str) -> None:
    assert resolve_device(name) == torch.device(name)


@WITH
@pytest.mark.usefixtures("gpus")
def test_a_gpu_too_many_is_named() -> None:
    with pytest.raises(UsageError, match="device must be below cuda:2, got 'cuda:2'"):
        resolve_device("cuda:2")


@WITHOUT
@pytest.mark.usefixtures("gpus")
@pytest.mark.parametrize("name", ["cuda", "cuda:0", "cuda:7"])
def test_a_gpu_that_is_not_there_is_named_with_the_command_that_says_more(name: str) -> None:
    with pytest.raises(
        UsageError, match=f"device '{name}' cannot be used: torch finds no GPU; `pdd-fast env`"
    ):
        resolve_device(name)


@EITHER
@pytest.mark.usefixtures("gpus")
@pytest.mark.parametrize(
    "name", ["", "gpu", "CUDA", "cuda:", "cuda:x", "cuda:-1", "cpu:1", "cpu:-1", "mps", "meta"]
)
def test_other_names_are_refused(name: str) -> None:
    with pytest.raises(UsageError, match=f"device must be auto, cpu, cuda or cuda:N, got '{name}'"):
        resolve_device(name)


def test_what_auto_gives_can_be_computed_on() -> None:
    assert torch.ones(2, device=resolve_device("auto")).sum().item() == 2
