"""Shared fixtures: the devices to test on, and the slow tests' flag."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from forks import Forks
from hypothesis import settings

from pdd_fast.ops import _native, convnet
from pdd_fast.training.cuda_graphs import CudaBackend

# Processes that the tests start import the installed package, not the source tree in the working
# directory, which has no compiled kernels and no pdd_fast.cli.
os.environ["PYTHONSAFEPATH"] = "1"

# A shell that starts pytest in the background makes it ignore Ctrl-C, and with it every process
# that it starts.
signal.signal(signal.SIGINT, signal.default_int_handler)

settings.register_profile("pdd-fast", deadline=None, derandomize=True, max_examples=40)
settings.load_profile("pdd-fast")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="also run the tests marked slow")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--slow"):
        return
    for item in items:
        if "slow" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="slow; run with --slow"))


@pytest.fixture(
    params=[
        "cpu",
        pytest.param(
            "cuda",
            marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no GPU"),
        ),
    ]
)
def device(request: pytest.FixtureRequest) -> torch.device:
    """Every device there is; random inputs are drawn on the CPU and moved."""
    return torch.device(request.param)


@pytest.fixture
def composed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fused engine puts its passes together from operators and torch's convolutions, as it does
    on a GPU.
    """
    monkeypatch.setattr(convnet, "available", lambda: False)


@pytest.fixture
def engine(request: pytest.FixtureRequest) -> str:
    """For indirect parameters: what an engine is called in pdd_fast.engines, and "composed"."""
    if request.param != "composed":
        return request.param
    request.getfixturevalue("composed")
    return "fused"


@pytest.fixture(scope="session")
def forks() -> Iterator[Forks]:
    """Run Python programs in processes of their own, without the seconds of importing torch."""
    with Forks.started() as server:
        yield server


@pytest.fixture(scope="session")
def host_objects(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The CUDA kernels and their binding, compiled for the host, to be linked as they are or with a
    mistake in one.
    """
    from host_cuda import module_objects

    return module_objects(tmp_path_factory.mktemp("host-objects"))


@pytest.fixture
def every_region_shared() -> Iterator[None]:
    """Kernels on the CPU use as many threads as torch has, however little there is to do and few
    the processors.
    """
    library = _native.load("cpu")
    if library is None:
        yield
        return
    before = library.set_worth_a_thread(0.0)
    yield
    library.set_worth_a_thread(before)


@pytest.fixture(autouse=True)
def _captures_may_be_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forget a capture that failed in another test, after which the process captures no more."""
    monkeypatch.setattr(CudaBackend, "failure", "")


@pytest.fixture(autouse=True)
def _seed_and_threads() -> Iterator[None]:
    """Seed torch before a test, and restore the number of threads after it."""
    threads = torch.get_num_threads()
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)
