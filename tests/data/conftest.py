"""Fixtures that several test files of this folder share."""

from __future__ import annotations

import pytest
from whitening_support import finished

from pdd_fast.storage.run import Run


@pytest.fixture(scope="module")
def white(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return finished(tmp_path_factory.mktemp("runs") / "white")
