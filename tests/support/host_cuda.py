"""Compiles the CUDA sources for the host, where native/host stands in for CUDA, and runs the
operators with them.
"""

from __future__ import annotations

import ast
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from pdd_fast.ops import _native, _registry

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ROOT / "csrc"
HOST = ROOT / "tests" / "native" / "host"
STAND_IN = [HOST / name for name in ("block.cpp", "fiber.cpp", "runtime.cpp")]
COMPILER = shutil.which("g++")
# The kernels' .bss, which holds their static shared memory alone, between two symbols for block.cpp
# to spoil: g++ ignores a section attribute in a template.
SHARED_MEMORY = """SECTIONS {
  .pdd_shared (NOLOAD) : {
    PROVIDE_HIDDEN(__start_pdd_shared = .);
    *.cu.o(.bss .bss.* COMMON)
    . = ALIGN(8);
    PROVIDE_HIDDEN(__stop_pdd_shared = .);
  }
} INSERT AFTER .bss;
"""

# pytestmark of what compiles here.
NEEDS_COMPILER = [
    pytest.mark.skipif(COMPILER is None, reason="g++ is not on PATH"),
    pytest.mark.skipif(
        sys.platform != "linux", reason="g++ may be another compiler, without OpenMP and GNU ld"
    ),
    pytest.mark.skipif(
        not (ROOT / "setup.py").is_file(), reason="the sources are not beside the tests"
    ),
]


class CompileError(Exception):
    """Error with the compiler's output."""


def built_with(name: str) -> Any:
    """A constant of setup.py, which cannot be imported: it would build."""
    for statement in ast.parse((ROOT / "setup.py").read_text(encoding="utf-8")).body:
        if isinstance(statement, ast.Assign) and ast.unparse(statement.targets[0]) == name:
            return ast.literal_eval(statement.value)
    raise AssertionError(f"setup.py sets no {name}")


def run_compiler(*arguments: str | Path) -> None:
    assert COMPILER is not None
    result = subprocess.run(
        [COMPILER, *map(str, arguments)], capture_output=True, text=True, check=False
    )
    if result.returncode:
        raise CompileError(result.stderr)


def flags_for(sources: Path) -> list[str]:
    """How the kernels below ``sources`` are compiled; their packs are read through other types, as
    nvcc allows.
    """
    return [
        *("-std=c++17", "-O1", "-w", "-fPIC", "-fvisibility=hidden", "-fno-strict-aliasing"),
        *("-DPDD_BACKEND=cuda", "-DPDD_HALF", "-DPDD_CUDA_ON_HOST", f"-I{HOST}", f"-I{sources}"),
    ]


def compiled(folder: Path, sources: Iterable[Path], flags: Sequence[str]) -> list[Path]:
    """One object for every source, two compilers at a time; SHARED_MEMORY goes by the names of the
    kernels' objects.
    """
    folder.mkdir(parents=True, exist_ok=True)

    def one(source: Path) -> Path:
        name = (
            f"{source.parent.name}.cu.o"
            if source.suffix == ".cu"
            else f"{source.stem}_{source.parent.name}.o"
        )
        run_compiler(*flags, "-x", "c++", "-c", source, "-o", folder / name)
        return folder / name

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(one, sources))


def linked(target: Path, objects: Iterable[Path], *flags: str) -> Path:
    script = target.parent / "shared.ld"
    script.write_text(SHARED_MEMORY, encoding="utf-8")
    run_compiler(*objects, f"-Wl,-T,{script}", *flags, "-o", target)
    return target


def kernels(sources: Path = SOURCES) -> list[Path]:
    """All that runs the kernels, the largest first: two compilers are then done at about the same
    time.
    """
    found = [sources / "ops" / operator / "cuda.cu" for operator in built_with("OPERATORS")]
    return [*sorted(found, key=lambda path: -path.stat().st_size), *STAND_IN]


def module_flags(sources: Path = SOURCES) -> list[str]:
    """For the Python module; grids have at most 3 blocks, so that blocks have more than one task to
    do.
    """
    import pybind11

    python = [
        f"-isystem{path}" for path in (sysconfig.get_paths()["include"], pybind11.get_include())
    ]
    return [*flags_for(sources), *python, "-DPDD_MODULE=_cuda_host", "-DPDD_LARGEST_GRID=3"]


def module_objects(folder: Path) -> list[Path]:
    bindings = [SOURCES / "bind" / "module.cpp", SOURCES / "bind" / "cuda.cpp"]
    return compiled(folder, [bindings[0], *kernels(), bindings[1]], module_flags())


def load_module(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("_cuda_host", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def use(library: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """The operators call ``library`` for tensors on the CPU, images of 16 bits included."""
    monkeypatch.setattr(_native, "_load", lambda device_type: (library, None))
    monkeypatch.setattr(
        _registry, "computed_in_32_bits", lambda function, *arguments: function(*arguments)
    )
    for name in [name for name in os.environ if name.startswith("PDD_HOST_")]:
        monkeypatch.delenv(name)
