"""Fixtures that several test files of this folder share."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from network_kernels_support import CALLED

from pdd_fast.ops import convnet


@pytest.fixture(autouse=True)
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the passes that were run."""
    CALLED.clear()
    for name in ("forward", "backward"):
        original = getattr(convnet.ConvNetPasses, name)

        def counted(
            *args: object,
            name: str = name,
            original: Callable[..., object] = original,
            **kw: object,
        ) -> object:
            CALLED.append(name)
            return original(*args, **kw)

        monkeypatch.setattr(convnet.ConvNetPasses, name, counted)
    return CALLED
