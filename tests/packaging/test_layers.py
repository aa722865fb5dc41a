"""Imports go down the layers of pyproject.toml only, and the linter sees one that goes up."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tomllib
from itertools import pairwise
from pathlib import Path

import pytest

pytest.importorskip("importlinter")

ROOT = Path(__file__).resolve().parents[2]
(CONTRACT,) = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"][
    "importlinter"
]["contracts"]
# Siblings share a line, as in "settings : recipes".
LAYERS = [[name.strip() for name in line.split(":")] for line in CONTRACT["layers"]]
# Packages that lie beside pdd_fast in the sources and inside it when installed.
BESIDE = ("cli", "benchmarks")


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """Return a copy of the sources, laid out as they are installed."""
    package = tmp_path / "pdd_fast"
    shutil.copytree(
        ROOT / "pdd_fast", package, ignore=shutil.ignore_patterns("*.so", "__pycache__")
    )
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    for name in BESIDE:
        shutil.copytree(ROOT / name, package / name, ignore=shutil.ignore_patterns("results"))
    return package


def lint(package: Path) -> subprocess.CompletedProcess[str]:
    """Run the linter on the copy with the repository's contracts."""
    program = "from importlinter.cli import lint_imports_command as run; run()"
    return subprocess.run(
        [sys.executable, "-c", program, "--no-cache"],
        cwd=package.parent,
        # PYTHONSAFEPATH is unset, because the copy in the working directory is to be found first.
        env={"PYTHONPATH": str(package.parent), "PATH": "", "COLUMNS": "200"},
        capture_output=True,
        text=True,
        check=False,
    )


def test_imports_go_down_only(package: Path) -> None:
    result = lint(package)
    assert result.returncode == 0, result.stdout + result.stderr


def test_every_import_upwards_is_seen(package: Path) -> None:
    """Plant one import from each layer to the one above it."""
    expected = set()
    for (above, *_), (below, *_) in pairwise(LAYERS):
        target = next(
            path
            for path in (package / f"{below}.py", package / below / "__init__.py")
            if path.is_file()
        )
        with target.open("a", encoding="utf-8") as file:
            file.write(f"\nimport pdd_fast.{above}\n")
        expected.add((below, above))
    result = lint(package)
    assert result.returncode == 1
    pattern = r"pdd_fast\.(\w+) is not allowed to import pdd_fast\.(\w+)"
    assert expected <= set(re.findall(pattern, result.stdout))


def test_a_new_folder_must_have_its_layer(package: Path) -> None:
    (package / "elsewhere").mkdir()
    (package / "elsewhere" / "__init__.py").touch()
    result = lint(package)
    assert result.returncode == 1
    assert "elsewhere" in result.stdout
