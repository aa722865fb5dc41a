"""Helpers of the tests of build."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


NVCC = {  # how a CUDA 13 compiler answers
    "--list-gpu-arch": "\\n".join(f"compute_{number}" for number in (75, 80, 86, 90, 100, 120)),
    "--version": (
        "nvcc: NVIDIA (R) Cuda compiler driver\\nCuda compilation tools, release 13.0, V13.0.88"
    ),
}


Tools = Callable[..., Path]


def compiler(tool: Tools, name: str = "g++", refuses: tuple[str, ...] = (), **options: Any) -> Path:
    return tool(name, refuses, {"--version": f"{name} (made up) 1.2.3\\nCopyright"}, **options)
