"""Fixtures that several test files of this folder share."""

from __future__ import annotations

import importlib.util
import shlex
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from build_support import ROOT, Tools


@pytest.fixture
def build(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """setup.py as a module; `build.called` holds what it passes to setuptools."""
    monkeypatch.setitem(
        sys.modules, "pybind11", SimpleNamespace(get_include=lambda: "/where pybind11 lies")
    )
    called: dict[str, Any] = {}
    monkeypatch.setattr("setuptools.setup", called.update)
    spec = importlib.util.spec_from_file_location("pdd_fast_setup", ROOT / "setup.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "pdd_fast_setup", module)  # dataclasses look it up
    spec.loader.exec_module(module)
    module.CUDA_DEFAULT = "/no/cuda"  # type: ignore[attr-defined]
    module.called = called  # type: ignore[attr-defined]
    return module


@pytest.fixture
def tool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Tools:
    """Puts programs on an otherwise empty PATH: they refuse some arguments and answer others."""
    folder = tmp_path / "the tools"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))
    for name in ("CXX", "CUDA_HOME", "PDD_FAST_CUDA", "PDD_FAST_CUDA_ARCHS", "PDD_FAST_WERROR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("platform.machine", lambda: "x86_64")

    def make(
        name: str,
        refuses: tuple[str, ...] = (),
        answers: dict[str, str] | None = None,
        at: str = "",
    ) -> Path:
        cases = [f"{shlex.quote(argument)}) exit 1;;" for argument in refuses]
        cases += [
            f"{argument}) printf '{text}\\n'; exit 0;;"
            for argument, text in (answers or {}).items()
        ]
        path = (tmp_path / at if at else folder) / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(
            '#!/bin/sh\nfor a in "$@"; do case "$a" in\n' + "\n".join(cases) + "\nesac; done\n"
        )
        path.chmod(0o755)
        return path

    return make
