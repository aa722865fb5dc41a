"""A pytest plugin that tells the tests that need a GPU from the rest: pytest -p gpu_tests
--gpu=only (or --gpu=no).

Those are the tests that are skipped where torch finds no GPU, and say so: the fixture `device` on
"cuda", and a few that ask for one themselves.
"""

from __future__ import annotations

import pytest


def needs_gpu(item: pytest.Item) -> bool:
    reasons = [str(mark.kwargs.get("reason", "")) for mark in item.iter_markers("skipif")]
    return any(reason.startswith("torch finds") and "GPU" in reason for reason in reasons)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--gpu", choices=("only", "no"), help="only the tests that need a GPU, or only the others"
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    wanted = config.getoption("--gpu")
    if wanted is None:
        return
    chosen = [item for item in items if needs_gpu(item) == (wanted == "only")]
    config.hook.pytest_deselected(items=[item for item in items if item not in set(chosen)])
    items[:] = chosen
