"""The programs of tools/ as modules. Tests that import this are skipped where the tools are not."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
TOOLS = ROOT / "tools"
if not (TOOLS / "gpu_check.py").is_file():
    pytest.skip("the tools are not beside the tests", allow_module_level=True)
sys.path.append(str(TOOLS))


def module(name: str) -> ModuleType:
    return importlib.import_module(name)


gpu_check, plans, steps = module("gpu_check"), module("plans"), module("steps")


def all_steps(*arguments: str) -> list[Any]:
    args = gpu_check.parser().parse_args(["--out", "out", *arguments])
    return list(plans.PLANS[args.plan](args, {"compute_capability": "9.0"}))
