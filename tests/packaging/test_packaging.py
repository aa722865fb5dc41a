"""Contents of the installation, of a source distribution, and of a wheel built from it."""

from __future__ import annotations

import ast
import importlib.machinery
import importlib.metadata
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from collections.abc import Iterable
from importlib import resources
from pathlib import Path
from typing import Any

import pytest

import pdd_fast
from pdd_fast import _version

ROOT = Path(__file__).resolve().parents[2]
DISTRIBUTION = importlib.metadata.distribution("pdd-fast")
# Large, or made by working here.
NOT_COPIED = {
    ".git",
    ".venv",
    "bench",
    "build",
    "data",
    "dist",
    "pdd_fast.egg-info",
    "runs",
    "venv",
}
MAPPED = (
    "benchmarks",
    "cli",
)  # folders beside pdd_fast/ that are packages inside of it once installed
IMPORTED_AS = {"scikit-learn": "sklearn", "pillow": "PIL"}


def project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def is_editable() -> bool:
    text = DISTRIBUTION.read_text("direct_url.json")
    return text is not None and json.loads(text).get("dir_info", {}).get("editable", False)


def sources() -> set[str]:
    """The files of the packages in the repository, under the names that they are installed by."""
    found = {
        path.relative_to(ROOT)
        for path in (ROOT / "pdd_fast").rglob("*")
        if path.suffix in (".py", ".toml")
    }
    names = {str(path) for path in found} | {"pdd_fast/py.typed"}
    return names | {
        f"pdd_fast/{mapped}/{path.name}"
        for mapped in MAPPED
        for path in (ROOT / mapped).glob("*.py")
    }


def require_contents(found: Iterable[str]) -> None:
    """The packages' files are ``sources()``, the build's record and libraries, and nothing else."""
    files = {name for name in found if not name.endswith(".pyc")}
    libraries = {
        name for name in files if name.endswith(tuple(importlib.machinery.EXTENSION_SUFFIXES))
    }
    assert {name.partition(".")[0] for name in libraries} - {"pdd_fast/_cuda"} == {"pdd_fast/_cpu"}
    assert files - libraries == sources() | {"pdd_fast/_build.json"}


# ---- what is installed ----


def test_the_metadata_are_the_projects() -> None:
    metadata = DISTRIBUTION.metadata
    assert DISTRIBUTION.version == pdd_fast.__version__
    assert metadata["Requires-Python"] == project()["project"]["requires-python"]
    assert metadata["License-Expression"] == "MIT"
    assert metadata["Summary"] == project()["project"]["description"]
    license = [file for file in DISTRIBUTION.files or () if file.name == "LICENSE"]
    assert [Path(str(file.locate())).read_bytes() for file in license] == [
        (ROOT / "LICENSE").read_bytes()
    ]


def test_the_entry_point_is_the_command_line() -> None:
    (entry,) = (e for e in DISTRIBUTION.entry_points if e.group == "console_scripts")
    assert (entry.name, entry.value) == ("pdd-fast", "pdd_fast.cli.main:main")
    from pdd_fast.cli.main import main

    assert entry.load() is main


def test_the_command_is_on_the_path() -> None:
    (script,) = (f for f in DISTRIBUTION.files or () if f.name in ("pdd-fast", "pdd-fast.exe"))
    found = subprocess.run(
        [str(script.locate()), "--version"], capture_output=True, text=True, check=True
    )
    record = json.loads((resources.files("pdd_fast") / "_build.json").read_text(encoding="utf-8"))
    assert found.stdout == f"pdd-fast, version {pdd_fast.__version__} (commit {record['commit']})\n"


def test_an_installation_without_a_record_is_of_an_unknown_commit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_version, "__file__", str(tmp_path / "_version.py"))
    assert _version.commit() == "unknown"
    (tmp_path / "_build.json").write_text('{"cpu": null}')  # of an earlier version
    assert _version.commit() == "unknown"
    (tmp_path / "_build.json").write_text('{"commit": "abc1234"}')
    assert _version.commit() == "abc1234"


def test_no_other_top_level_name_is_installed() -> None:
    assert (DISTRIBUTION.read_text("top_level.txt") or "").split() == ["pdd_fast"]
    tops = {
        file.parts[0]
        for file in DISTRIBUTION.files or ()
        if file.parts[0] not in ("..", "__pycache__")
    }
    ours = {
        top
        for top in tops
        if not re.fullmatch(r"pdd_fast-.*\.dist-info|__editable__.*pdd_fast.*", top)
    }
    assert ours == (set() if is_editable() else {"pdd_fast"})


def test_folders_of_the_repository_cannot_be_imported(tmp_path: Path) -> None:
    program = (
        "import importlib.util as u, json, sys\n"
        "specs = {name: u.find_spec(name) for name in sys.argv[1:]}\n"
        "print(json.dumps({n: [s.origin, *(s.submodule_search_locations or [])] for n, s in "
        "specs.items() if s}))\n"
    )
    folders = [path.name for path in ROOT.iterdir() if path.is_dir() and path.name.isidentifier()]
    assert {"benchmarks", "cli", "csrc", "tests", "pdd_fast"} <= set(folders)
    found = subprocess.run(
        [sys.executable, "-I", "-c", program, *folders, "setup"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    ours = {
        name
        for name, places in json.loads(found.stdout).items()
        if any(place and Path(place).is_relative_to(ROOT) for place in places)
    }
    assert ours <= {"pdd_fast"}


def test_types_recipes_record_and_library_are_installed() -> None:
    package = resources.files("pdd_fast")
    assert (package / "py.typed").is_file()
    recipes = {
        entry.name for entry in (package / "recipes").iterdir() if entry.name.endswith(".toml")
    }
    assert recipes == {path.name for path in (ROOT / "pdd_fast" / "recipes").glob("*.toml")}
    assert "digits.toml" in recipes
    assert set(json.loads((package / "_build.json").read_text(encoding="utf-8"))) == {
        "cpu",
        "cuda",
        "cuda_reason",
        "nvcc_error",
        "commit",
    }
    spec = importlib.util.find_spec("pdd_fast._cpu")
    assert spec is not None
    assert isinstance(spec.loader, importlib.machinery.ExtensionFileLoader)


def test_the_cuda_library_of_all_architectures_stays_below_40_megabytes() -> None:
    spec = importlib.util.find_spec("pdd_fast._cuda")
    if spec is None or spec.origin is None:
        pytest.skip("built without CUDA")
    record = json.loads((resources.files("pdd_fast") / "_build.json").read_text(encoding="utf-8"))
    assert Path(spec.origin).stat().st_size < 40e6 / 6 * max(len(record["cuda"]["archs"]), 1)


@pytest.mark.skipif(
    is_editable(), reason="an editable install holds a pointer to the sources, not the files"
)
def test_every_file_is_installed_and_no_other() -> None:
    require_contents(str(file) for file in DISTRIBUTION.files or () if file.parts[0] == "pdd_fast")


def test_every_package_is_listed() -> None:
    folders = {path.parent.relative_to(ROOT) for path in (ROOT / "pdd_fast").rglob("__init__.py")}
    names = {".".join(folder.parts) for folder in folders} | {
        f"pdd_fast.{mapped}" for mapped in MAPPED
    }
    setuptools = project()["tool"]["setuptools"]
    assert set(setuptools["packages"]) == names
    assert setuptools["package-dir"] == {
        "pdd_fast": "pdd_fast",
        **{f"pdd_fast.{mapped}": mapped for mapped in MAPPED},
    }


# ---- dependencies ----


def requirements(extra: str | None = None) -> set[str]:
    """Names that the installed distribution requires, or that one of its extras adds."""
    names = set()
    for line in DISTRIBUTION.requires or ():
        requirement, _, marker = line.partition(";")
        asked = re.search(r"extra == ['\"](.+?)['\"]", marker)
        if (asked[1] if asked else None) == extra:
            names.add(re.split(r"[^A-Za-z0-9_.-]", requirement.strip())[0].lower())
    return names


def imported(*folders: Path) -> set[str]:
    """Top-level names that the modules in ``folders`` import from elsewhere."""
    names, own = (
        set(),
        {"pdd_fast", "setup", *(path.stem for path in (ROOT / "tests").rglob("*.py"))},
    )
    for path in (path for folder in folders for path in folder.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                names.add((node.module or "").partition(".")[0])
    return names - own - sys.stdlib_module_names


def modules(distributions: set[str]) -> set[str]:
    return {IMPORTED_AS.get(name, name) for name in distributions}


def test_what_is_imported_is_required_and_what_is_required_is_imported() -> None:
    found = imported(ROOT / "pdd_fast", *(ROOT / mapped for mapped in MAPPED))
    assert found == modules(requirements()) | modules(requirements("torchvision"))
    assert requirements("torchvision") == {"torchvision"}


def test_the_tests_import_what_their_extra_brings() -> None:
    brings = (
        modules(requirements())
        | modules(requirements("test"))
        | modules(requirements("torchvision"))
    )
    build = {re.split(r"[^a-z0-9]", name)[0] for name in project()["build-system"]["requires"]}
    assert imported(ROOT / "tests") - build <= brings


def test_installing_brings_no_heavier_extra() -> None:
    assert not {"torchvision", "pytest", "ninja", "pybind11", "setuptools"} & requirements()
    assert {"torch", "click"} <= requirements()


# ---- a source distribution, and a wheel from it ----


def backend(function: str, target: Path, folder: Path, **environment: str) -> Path:
    """Calls a hook of the build backend in ``folder``, as pip does; what it made in ``target``."""
    setuptools = pytest.importorskip("setuptools")
    if int(setuptools.__version__.partition(".")[0]) < 77:
        pytest.skip("setuptools is older than the project's build requires")
    target.mkdir()
    program = (
        "import sys; from setuptools import build_meta; getattr(build_meta, "
        "sys.argv[1])(sys.argv[2])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, function, str(target)],
        cwd=folder,
        env=os.environ | environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (made,) = target.iterdir()
    return made


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A source distribution, packed from a copy of a repository that was worked in."""
    folder = tmp_path_factory.mktemp("sdist")
    copy = folder / "repository"

    def left_out(place: str, names: list[str]) -> set[str]:
        return NOT_COPIED & set(names) if Path(place) == ROOT else set()

    shutil.copytree(ROOT, copy, ignore=left_out)
    for name in (
        "pdd_fast/_build.json",
        "pdd_fast/_cpu.made-here.so",
        "cli/__pycache__/main.pyc",
        "csrc/core/here.so",
    ):
        (copy / name).parent.mkdir(exist_ok=True)
        (copy / name).write_text("{}")
    return backend("build_sdist", folder / "out", copy)


def packed(archive: Path) -> set[str]:
    """The files in a source distribution, without its first folder."""
    with tarfile.open(archive) as tar:
        assert all(member.isfile() or member.isdir() for member in tar)
        names = [member.name for member in tar if member.isfile()]
    assert {name.partition("/")[0] for name in names} == {f"pdd_fast-{pdd_fast.__version__}"}
    return {name.partition("/")[2] for name in names}


def test_a_source_distribution_holds_all_that_a_build_reads(archive: Path) -> None:
    files = packed(archive)
    below = [
        path
        for folder in ("csrc", *MAPPED)
        for path in (ROOT / folder).rglob("*")
        if path.is_file()
    ]
    needed = {
        str(path.relative_to(ROOT))
        for path in below
        if path.suffix in (".h", ".cuh", ".cpp", ".cu", ".py")
    }
    assert len({name for name in needed if name.endswith((".h", ".cuh"))}) >= 10
    needed |= {
        name
        for name in sources()
        if not name.startswith(tuple(f"pdd_fast/{mapped}/" for mapped in MAPPED))
    }
    assert needed | {"setup.py", "pyproject.toml", "README.md", "LICENSE", "MANIFEST.in"} <= files


def test_a_source_distribution_holds_the_tests(archive: Path) -> None:
    suffixes = (".py", ".cpp", ".cu", ".h")
    needed = {
        str(path.relative_to(ROOT))
        for path in (ROOT / "tests").rglob("*")
        if path.suffix in suffixes
    }
    assert needed <= packed(archive)


def test_a_source_distribution_holds_nothing_else(archive: Path) -> None:
    files = packed(archive)
    suffixes = {
        "csrc": (".h", ".cuh", ".cpp", ".cu"),
        "benchmarks": (".py",),
        "cli": (".py",),
        "pdd_fast": (".py", ".toml", ".typed"),
        "tests": (".py", ".cpp", ".cu", ".h"),
        "docs": (".md",),
        "pdd_fast.egg-info": (".txt", "PKG-INFO"),
    }
    top = {"setup.py", "setup.cfg", "pyproject.toml", "LICENSE", "MANIFEST.in", "PKG-INFO"}
    for name in files:
        folder, slash, _ = name.partition("/")
        assert (
            name.endswith(suffixes.get(folder, ()))
            if slash
            else name in top or name.endswith(".md")
        ), name
        assert "__pycache__" not in name
    assert "pdd_fast/_build.json" not in files


@pytest.mark.slow
def test_a_wheel_from_the_source_distribution_runs(archive: Path, tmp_path: Path) -> None:
    with tarfile.open(archive) as tar:
        tar.extractall(tmp_path / "a place with spaces", filter="data")
    (folder,) = (tmp_path / "a place with spaces").iterdir()
    wheel = backend("build_wheel", tmp_path / "out", folder, PDD_FAST_CUDA="0")
    with zipfile.ZipFile(wheel) as file:
        names = [name for name in file.namelist() if not name.endswith("/")]
        tops = {name.partition("/")[0] for name in names}
        assert tops == {"pdd_fast", f"pdd_fast-{pdd_fast.__version__}.dist-info"}
        require_contents(name for name in names if name.startswith("pdd_fast/"))
        file.extractall(tmp_path / "installed")
    # The folder comes before an installed pdd_fast, an editable one too.
    program = (
        "import pdd_fast; from pdd_fast.cli.main import run; print(pdd_fast.__file__); "
        "run(['env', '--json'])"
    )
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "installed"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    place, facts = done.stdout.splitlines()
    assert Path(place) == tmp_path / "installed" / "pdd_fast" / "__init__.py"
    assert json.loads(facts)["CPU kernels"]["library"] == "loads"
    assert json.loads(facts)["built"]["why no CUDA"] == "PDD_FAST_CUDA=0"
