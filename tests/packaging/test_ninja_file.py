"""setup.py as units: what it decides to build on which machine, and the ninja file that builds
it."""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from build_support import NVCC, ROOT, Tools, compiler

pytest.importorskip("setuptools")


SOURCES = sorted(path for path in (ROOT / "csrc").rglob("*") if path.suffix in (".cpp", ".cu"))


def commands(ninja: Any, folder: Path) -> list[list[str]]:
    """The commands that ninja would run."""
    program = Path(sys.executable).with_name("ninja")
    found = str(program) if program.exists() else shutil.which("ninja")
    if found is None:
        pytest.skip("ninja is not installed")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "build.ninja").write_text("\n".join(ninja.lines) + "\n")
    text = subprocess.run(
        [found, "-C", folder, "-t", "commands"], capture_output=True, text=True, check=True
    ).stdout
    return [shlex.split(line) for line in text.splitlines()]


def everything(build: ModuleType, folder: Path, archs: list[str] | None = None) -> list[list[str]]:
    """The commands that build both libraries with made-up compilers."""
    plan = build.Plan(
        "my++", ["baseline", "avx2", "avx512"], "my nvcc", "13.0", archs or ["80", "90"]
    )
    ninja = build.NinjaFile(plan, folder)
    ninja.cpu(folder / "_cpu.so")
    ninja.cuda(folder / "_cuda.so")
    return commands(ninja, folder)


@pytest.fixture
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PDD_FAST_WERROR", raising=False)


# ---- the ninja file ----


@pytest.mark.usefixtures("quiet")
def test_every_source_is_compiled(build: ModuleType, tmp_path: Path) -> None:
    found = everything(build, tmp_path)
    compiled = {command[command.index("-c") + 1] for command in found if "-c" in command}
    assert compiled == {str(path) for path in SOURCES}
    folders = {path.name for path in (ROOT / "csrc" / "ops").iterdir() if path.is_dir()}
    assert sorted(build.OPERATORS + build.CPU_OPERATORS) == sorted(folders)


@pytest.mark.usefixtures("quiet")
def test_only_the_operators_are_compiled_for_newer_processors(
    build: ModuleType, tmp_path: Path
) -> None:
    found = [
        command
        for command in everything(build, tmp_path)
        if command[0] == "my++" and "-c" in command
    ]
    # Two modules, a binding, the threads, three levels of every operator.
    assert len(found) == 4 + 3 * (len(build.OPERATORS) + len(build.CPU_OPERATORS))
    for command in found:
        backend = [flag.partition("=")[2] for flag in command if flag.startswith("-DPDD_BACKEND=")]
        march = [flag for flag in command if flag.startswith("-march=")]
        newer = {"cpu_avx2": ["-march=x86-64-v3"], "cpu_avx512": ["-march=x86-64-v4"]}
        assert march == (newer.get(backend[0], []) if backend else [])
        assert ("/where pybind11 lies" in command) == (
            not backend and "module.cpp" in command[command.index("-c") + 1]
        )
        assert "-DPDD_X86" in command
        assert "-pthread" in command


@pytest.mark.usefixtures("quiet")
def test_every_architecture_gets_code_and_the_newest_ptx(build: ModuleType, tmp_path: Path) -> None:
    found = [
        c
        for c in everything(build, tmp_path, ["100", "90a", "80"])
        if c[0] == "my nvcc" and "-c" in c
    ]
    assert len(found) == 1 + len(build.OPERATORS)
    for command in found:
        assert [flag for flag in command if flag.startswith("-gencode")] == [
            "-gencode=arch=compute_100,code=sm_100",
            "-gencode=arch=compute_90a,code=sm_90a",
            "-gencode=arch=compute_80,code=sm_80",
            "-gencode=arch=compute_100,code=compute_100",
        ]


def test_warnings_become_errors_on_request(
    build: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PDD_FAST_WERROR", "0")
    assert not any("-Werror" in command for command in everything(build, tmp_path))
    monkeypatch.setenv("PDD_FAST_WERROR", "1")
    assert all("-Werror" in command for command in everything(build, tmp_path) if "-c" in command)


@pytest.mark.usefixtures("quiet")
def test_places_with_spaces_colons_and_dollars_reach_the_compiler(
    build: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "my $HOME: it's here"
    (root / "csrc").mkdir(parents=True)
    monkeypatch.setattr(build, "ROOT", root)
    found = everything(build, tmp_path / "build here")
    compilations = [command for command in found if "-c" in command]
    sources = {command[command.index("-c") + 1] for command in compilations}
    assert sources == {str(root / path.relative_to(ROOT)) for path in SOURCES}
    assert all(f"-I{root}/csrc" in command for command in compilations)
    targets = {command[command.index("-o") + 1] for command in found if "-c" not in command}
    assert targets == {str(tmp_path / "build here" / name) for name in ("_cpu.so", "_cuda.so")}


@pytest.mark.usefixtures("quiet")
def test_a_compiler_that_fails_ends_the_build_with_a_sentence(
    build: ModuleType, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    ninja = build.NinjaFile(build.Plan("false", ["baseline"]), tmp_path / "build")
    ninja.cpu(tmp_path / "_cpu.so")
    with pytest.raises(SystemExit, match="pdd-fast: the kernels do not compile"):
        ninja.run()
    assert "FAILED" in capfd.readouterr().out


@pytest.mark.usefixtures("quiet")
def test_without_ninja_the_build_says_what_to_install(
    build: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.executable", str(tmp_path / "python"))
    monkeypatch.setenv("PATH", str(tmp_path))
    ninja = build.NinjaFile(build.Plan("true", ["baseline"]), tmp_path / "build")
    with pytest.raises(
        SystemExit, match="pdd-fast: ninja is needed to build; install it with `pip install ninja`"
    ):
        ninja.run()


@pytest.fixture
def command(build: ModuleType, tool: Tools, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """build_ext in place, in an empty project; ninja is not run."""
    from setuptools import Distribution

    (tmp_path / "pdd_fast").mkdir()
    monkeypatch.chdir(tmp_path)
    compiler(tool)
    distribution = Distribution({"name": "pdd-fast", "packages": ["pdd_fast"], **build.called})  # type: ignore[attr-defined]
    command = distribution.get_command_obj("build_ext")
    command.inplace = True
    command.ensure_finalized()
    monkeypatch.setattr(build.NinjaFile, "run", lambda self: None)
    return command


# ---- the command ----


def test_the_build_prints_and_records_what_it_decided(
    command: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command.run()
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].startswith("pdd-fast: CPU kernels: baseline, avx2, avx512 with ")
    assert printed[1] == "pdd-fast: CUDA kernels: no (no nvcc on PATH, in CUDA_HOME or in /no/cuda)"
    record = json.loads((tmp_path / "pdd_fast" / "_build.json").read_text())
    assert record["cpu"] == {
        "compiler": "g++ (made up) 1.2.3",
        "levels": ["baseline", "avx2", "avx512"],
    }
    assert record["cuda"] is None
    assert [extension.name for extension in command.extensions] == ["pdd_fast._cpu"]


def test_the_build_records_the_commit_that_it_is_told(
    command: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PDD_FAST_COMMIT", "abc1234")
    command.run()
    record = json.loads((tmp_path / "pdd_fast" / "_build.json").read_text())
    assert record["commit"] == "abc1234"


def test_the_commit_is_that_of_the_sources_own_repository(
    build: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if shutil.which("git") is None:
        pytest.skip("git is not installed")
    monkeypatch.delenv("PDD_FAST_COMMIT", raising=False)
    sources = tmp_path / "outer" / "sources"
    sources.mkdir(parents=True)
    monkeypatch.setattr(build, "ROOT", sources)
    assert build.commit() == "unknown"

    def git(folder: Path, *arguments: str) -> str:
        who = ("-c", "user.name=a", "-c", "user.email=a@b")
        call = ["git", "-C", str(folder), *who, *arguments]
        return subprocess.run(call, capture_output=True, text=True, check=True).stdout.strip()

    for folder in (tmp_path / "outer", sources):
        assert build.commit() == "unknown"  # the outer repository's would be wrong
        git(folder, "init")
        git(folder, "commit", "--allow-empty", "-m", "first")
    assert build.commit() == git(sources, "rev-parse", "--short", "HEAD")


def test_cuda_kernels_of_an_earlier_build_do_not_stay(
    command: Any, tool: Tools, tmp_path: Path
) -> None:
    library = tmp_path / command.get_ext_filename("pdd_fast._cuda")
    library.write_text("of an earlier build")
    command.run()
    assert not library.exists()


def test_with_nvcc_both_libraries_are_built(command: Any, tool: Tools, tmp_path: Path) -> None:
    tool("nvcc", answers=NVCC)
    library = tmp_path / command.get_ext_filename("pdd_fast._cuda")
    library.write_text("of an earlier build")
    command.run()
    assert library.exists()  # ninja replaces it
    assert [extension.name for extension in command.extensions] == [
        "pdd_fast._cpu",
        "pdd_fast._cuda",
    ]
    record = json.loads((tmp_path / "pdd_fast" / "_build.json").read_text())
    assert record["cuda"] == {"nvcc": "13.0", "archs": ["80", "86", "90", "100", "120"]}


def test_the_build_needs_no_torch() -> None:
    program = (
        "import setuptools, sys; setuptools.setup = dict; sys.path.insert(0, "
        f"{str(ROOT)!r}); import setup"
    )
    found = subprocess.run(
        [
            sys.executable,
            "-c",
            f"{program}; print('torch' in sys.modules, setup.CPU_LEVELS['baseline'])",
        ],
        capture_output=True,
        text=True,
        check=True,
    )
    assert found.stdout == "False []\n"
