"""Select tests by their need for a GPU: pytest -p gpu_tests --gpu=only (or --gpu=no).

A test needs a GPU if it is skipped when torch finds none and its reason says so. These are the
tests with the fixture `device` on "cuda", and a few that check for a GPU themselves.
"""

from __future__ import annotations

import pytest


def needs_gpu(item: pytest.Item) -> bool:
    """Return whether a test needs a GPU."""
    reasons = [str(mark.kwargs.get("reason", "")) for mark in item.iter_markers("skipif")]
    return any(reason.startswith("torch finds") and "GPU" in reason for reason in reasons)


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the option --gpu."""
    parser.addoption(
        "--gpu", choices=("only", "no"), help="only the tests that need a GPU, or only the others"
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Keep only the tests that --gpu selects."""
    wanted = config.getoption("--gpu")
    if wanted is None:
        return
    chosen = [item for item in items if needs_gpu(item) == (wanted == "only")]
    config.hook.pytest_deselected(items=[item for item in items if item not in set(chosen)])
    items[:] = chosen
