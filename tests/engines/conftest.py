"""Fixtures that several test files of this folder share."""

from __future__ import annotations

import pytest


@pytest.fixture
def name(request: pytest.FixtureRequest) -> str:
    """Name of an engine in pdd_fast.engines; in the tests here, `engine` is the engine itself."""
    if request.param != "composed":
        return request.param
    request.getfixturevalue("composed")
    return "fused"
