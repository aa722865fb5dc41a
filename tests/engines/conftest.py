"""Fixtures that several test files of this folder share."""

from __future__ import annotations

import pytest


@pytest.fixture
def name(request: pytest.FixtureRequest) -> str:
    """What an engine is called in pdd_fast.engines; also in its tests here, where `engine` is the
    engine itself.
    """
    if request.param != "composed":
        return request.param
    request.getfixturevalue("composed")
    return "fused"
