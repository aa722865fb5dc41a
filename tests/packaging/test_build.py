"""setup.py as units: what it decides to build on which machine, and the ninja file that builds
it."""

from __future__ import annotations

import importlib.util
import json
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("setuptools")

ROOT = Path(__file__).resolve().parents[2]
SOURCES = sorted(path for path in (ROOT / "csrc").rglob("*") if path.suffix in (".cpp", ".cu"))
NVCC = {  # how a CUDA 13 compiler answers
    "--list-gpu-arch": "\\n".join(f"compute_{number}" for number in (75, 80, 86, 90, 100, 120)),
    "--version": (
        "nvcc: NVIDIA (R) Cuda compiler driver\\nCuda compilation tools, release 13.0, V13.0.88"
    ),
}


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
    module.called = called  # type: ignore[attr-defined]
    return module


Tools = Callable[..., Path]


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


def compiler(tool: Tools, name: str = "g++", refuses: tuple[str, ...] = (), **options: Any) -> Path:
    return tool(name, refuses, {"--version": f"{name} (made up) 1.2.3\\nCopyright"}, **options)


def refusal(build: ModuleType) -> str:
    """The sentence with which the build ends."""
    with pytest.raises(SystemExit) as exit_:
        build.decide()
    sentence = str(exit_.value.code)
    assert sentence.startswith("pdd-fast: ")
    assert "\n" not in sentence
    return sentence


# ---- the compiler and what it can do ----


def test_all_levels_where_the_compiler_knows_them(build: ModuleType, tool: Tools) -> None:
    path = compiler(tool)
    plan = build.decide()
    assert shlex.split(plan.cxx) == [str(path)]
    assert plan.levels == ["baseline", "avx2", "avx512"]
    assert plan.describe()[0] == f"pdd-fast: CPU kernels: baseline, avx2, avx512 with {plan.cxx}"


@pytest.mark.parametrize("level", ["-march=x86-64-v3", "-march=x86-64-v4"])
def test_a_compiler_that_lacks_a_level_builds_the_baseline(
    level: str, build: ModuleType, tool: Tools
) -> None:
    compiler(tool, refuses=(level,))
    plan = build.decide()
    assert plan.levels == ["baseline"]
    assert not any("PDD_X86" in line for line in build.NinjaFile(plan, Path("x")).lines)


@pytest.mark.parametrize("machine", ["aarch64", "arm64", "ppc64le"])
def test_other_machines_build_the_baseline(
    machine: str, build: ModuleType, tool: Tools, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler(tool)
    monkeypatch.setattr("platform.machine", lambda: machine)
    assert build.decide().levels == ["baseline"]


def test_clang_takes_the_place_of_gcc(build: ModuleType, tool: Tools) -> None:
    path = compiler(tool, "clang++")
    assert shlex.split(build.decide().cxx) == [str(path)]


def test_cxx_chooses_and_may_be_a_command_line(
    build: ModuleType, tool: Tools, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler(tool)
    other = compiler(tool, "other++", at="elsewhere")
    monkeypatch.setenv("CXX", f"/usr/bin/env NAME=value {shlex.quote(str(other))}")
    plan = build.decide()
    assert plan.cxx == f"/usr/bin/env NAME=value {shlex.quote(str(other))}"
    assert plan.record()["cpu"]["compiler"] == "other++ (made up) 1.2.3"


def test_without_a_compiler_the_build_says_what_to_install(build: ModuleType, tool: Tools) -> None:
    sentence = refusal(build)
    for words in ("C++17", "g++", "clang++", "CXX"):
        assert words in sentence


@pytest.mark.parametrize("cxx", ["nowhere++", "old++"])
def test_a_compiler_that_does_not_compile_is_named(
    cxx: str, build: ModuleType, tool: Tools, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler(tool, "old++", refuses=("-std=c++17",))
    monkeypatch.setenv("CXX", cxx)
    sentence = refusal(build)
    assert f"{cxx} does not compile" in sentence
    assert "C++17" in sentence


# ---- CUDA ----


def test_without_nvcc_the_build_is_for_the_cpu_and_says_why(build: ModuleType, tool: Tools) -> None:
    compiler(tool)
    plan = build.decide()
    assert plan.nvcc is None
    assert plan.describe()[1] == "pdd-fast: CUDA kernels: no (no nvcc on PATH or in CUDA_HOME)"
    assert plan.record()["cuda"] is None
    assert plan.record()["cuda_reason"] == "no nvcc on PATH or in CUDA_HOME"


def test_nvcc_builds_for_every_architecture_that_it_knows(build: ModuleType, tool: Tools) -> None:
    compiler(tool)
    path = tool("nvcc", answers=NVCC)
    plan = build.decide()
    assert plan.nvcc == str(path)
    assert plan.cuda_archs == [
        "80",
        "86",
        "90",
        "100",
        "120",
    ]  # 89 is wanted too, but this nvcc does not know it
    assert plan.describe()[1] == (
        "pdd-fast: CUDA kernels: CUDA 13.0, sm_80, sm_86, sm_90, sm_100, sm_120 (+PTX) (nvcc found)"
    )
    assert plan.record()["cuda"] == {"nvcc": "13.0", "archs": plan.cuda_archs}


def test_cuda_home_comes_before_path(
    build: ModuleType, tool: Tools, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler(tool)
    on_path, at_home = tool("nvcc", answers=NVCC), tool("nvcc", answers=NVCC, at="home/bin")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "home"))
    assert build.decide().nvcc == str(at_home)
    at_home.unlink()
    assert build.decide().nvcc == str(on_path)


def test_cuda_0_leaves_cuda_out(
    build: ModuleType, tool: Tools, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler(tool)
    tool("nvcc", answers=NVCC)
    monkeypatch.setenv("PDD_FAST_CUDA", "0")
    plan = build.decide()
    assert (plan.nvcc, plan.cuda_archs, plan.cuda_reason) == (None, [], "PDD_FAST_CUDA=0")


def test_cuda_1_insists_on_nvcc(
    build: ModuleType, tool: Tools, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler(tool)
    monkeypatch.setenv("PDD_FAST_CUDA", "1")
    assert refusal(build) == "pdd-fast: PDD_FAST_CUDA=1 but no nvcc on PATH or in CUDA_HOME"
    tool("nvcc", answers=NVCC)
    assert build.decide().cuda_reason == "PDD_FAST_CUDA=1"


@pytest.mark.parametrize("value", ["yes", "true", "2", ""])
def test_an_unknown_wish_for_cuda_is_refused(
    value: str, build: ModuleType, tool: Tools, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler(tool)
    monkeypatch.setenv("PDD_FAST_CUDA", value)
    assert refusal(build) == f"pdd-fast: PDD_FAST_CUDA must be auto, 0 or 1, got {value!r}"


def test_an_nvcc_that_does_not_run_is_passed_over_unless_asked_for(
    build: ModuleType, tool: Tools, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler(tool)
    path = tool("nvcc", refuses=("--list-gpu-arch",), answers={"--version": NVCC["--version"]})
    plan = build.decide()
    assert plan.nvcc is None
    assert plan.cuda_reason == "nvcc does not name its architectures"
    monkeypatch.setenv("PDD_FAST_CUDA", "1")
    assert refusal(build).startswith(
        f"pdd-fast: PDD_FAST_CUDA=1 but {path} does not name its architectures: it ends with "
    )


GCC_REFUSED = """In file included from /usr/local/cuda/bin/../include/cuda_runtime.h:82,
                 from <command-line>:
/usr/local/cuda/bin/../include/crt/host_config.h:143:2: error: #error -- unsupported GNU version! \
gcc versions later than 13 are not supported! The nvcc flag '-allow-unsupported-compiler' can \
be used to override this version check; however, using an unsupported host compiler may cause \
compilation failure or incorrect run time execution."""
LINKER_FAILS = """/usr/bin/ld: cannot find -lstdc++: No such file or directory
collect2: error: ld returned 1 exit status"""
NO_HEADERS = (
    "cc1plus: fatal error: cuda_runtime.h: No such file or directory\ncompilation terminated."
)


def failing_nvcc(tool: Tools, script: str, **options: Any) -> Path:
    """An nvcc that answers questions and fails to compile."""
    path = tool("nvcc", answers=NVCC, **options)
    path.write_text(path.read_text() + script + "\n")
    return path


def says(text: str) -> str:
    return f"echo {shlex.quote(text)} >&2; exit 1"


@pytest.mark.parametrize(
    ("script", "words"),
    [
        (
            says(GCC_REFUSED),
            "host_config.h:143:2: error: #error -- unsupported GNU version! gcc versions later "
            "than 13",
        ),
        (says(LINKER_FAILS), "ld: cannot find -lstdc++: No such file or directory"),
        (says(NO_HEADERS), "cc1plus: fatal error: cuda_runtime.h: No such file or directory"),
        (
            "echo 'nvcc error   : '\\''cicc'\\'' died due to signal 11'; exit 255",
            "nvcc error   : 'cicc' died due to signal 11",
        ),
        ("exit 3", "it ends with status 3"),
        ("kill -SEGV $$", "it was ended by signal 11"),
        ("/bin/sleep 60 & /bin/sleep 60", "it gives no answer within 0.5 seconds"),
    ],
    ids=["gcc too new", "linker", "no headers", "words on stdout", "silent", "crash", "hangs"],
)
def test_an_nvcc_that_does_not_compile_is_passed_over_with_its_words(
    script: str,
    words: str,
    build: ModuleType,
    tool: Tools,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    compiler(tool)
    failing_nvcc(tool, script)
    if "sleep" in script:
        monkeypatch.setattr(build, "PROBE_SECONDS", 0.5)
    began = time.monotonic()
    plan = build.decide()
    assert time.monotonic() - began < 30  # what it started does not keep the build waiting
    assert (plan.nvcc, plan.cuda_archs) == (None, [])
    assert plan.nvcc_error.startswith(words)
    assert plan.cuda_reason == f"nvcc does not compile: {plan.nvcc_error}"
    assert len(plan.nvcc_error) <= 200
    assert plan.record()["nvcc_error"] == plan.nvcc_error
    assert "/usr" not in json.dumps(plan.record())
    assert str(tmp_path) not in json.dumps(plan.record())
    assert plan.describe()[1] == f"pdd-fast: CUDA kernels: no ({plan.cuda_reason})"
    assert "NVCC_CCBIN" in plan.describe()[2]
    assert "PDD_FAST_CUDA=0" in plan.describe()[2]

    monkeypatch.setenv("PDD_FAST_CUDA", "1")
    sentence = refusal(build)
    assert sentence.startswith(f"pdd-fast: PDD_FAST_CUDA=1 but nvcc does not compile: {words}")
    assert "NVCC_CCBIN" in sentence
    assert sentence.endswith("set PDD_FAST_CUDA=0 to build without CUDA")

    monkeypatch.setenv("PDD_FAST_CUDA", "0")
    monkeypatch.setattr(build, "PROBE_SECONDS", -1.0)  # nvcc is not even asked
    assert build.decide().cuda_reason == "PDD_FAST_CUDA=0"


def test_nvcc_is_tried_on_a_small_file_with_its_own_compiler(
    build: ModuleType, tool: Tools, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler(tool)
    seen = tmp_path / "seen"
    failing_nvcc(
        tool,
        f'echo "$NVCC_CCBIN $@" > {shlex.quote(str(seen))}; for a in "$@"; do case "$a" in *.cu) '
        f'/bin/cat "$a" >> {shlex.quote(str(seen))};; esac; done',
    )
    monkeypatch.setenv("NVCC_CCBIN", "/opt/gcc-13/bin/g++")
    monkeypatch.setenv("PDD_FAST_CUDA_ARCHS", "90,80")
    plan = build.decide()
    assert plan.nvcc is not None
    assert plan.nvcc_error is None
    call, *source = seen.read_text().splitlines()
    assert call.startswith("/opt/gcc-13/bin/g++ ")
    assert "-arch=sm_90" in call
    assert "#include <cuda_runtime.h>" in source


def test_an_nvcc_of_another_wording_is_still_used(build: ModuleType, tool: Tools) -> None:
    compiler(tool)
    tool("nvcc", answers=NVCC | {"--version": "a wrapper"})
    assert build.decide().nvcc_version == "of unknown release"


@pytest.mark.parametrize(
    ("asked", "archs"),
    [
        ("90", ["90"]),
        ("80,90", ["80", "90"]),
        ("90; 80;", ["90", "80"]),
        ("90a", ["90a"]),
        (" ", None),
        ("", None),
    ],
)
def test_architectures_can_be_chosen(
    asked: str,
    archs: list[str] | None,
    build: ModuleType,
    tool: Tools,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    compiler(tool)
    tool("nvcc", answers=NVCC)
    monkeypatch.setenv("PDD_FAST_CUDA_ARCHS", asked)
    assert build.decide().cuda_archs == (archs or ["80", "86", "90", "100", "120"])


@pytest.mark.parametrize("unknown", ["70", "sm_90", "9.0", "all"])
def test_architectures_that_nvcc_does_not_know_are_refused(
    unknown: str, build: ModuleType, tool: Tools, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler(tool)
    tool("nvcc", answers=NVCC)
    monkeypatch.setenv("PDD_FAST_CUDA_ARCHS", f"80,{unknown}")
    sentence = refusal(build)
    assert sentence.startswith(
        "pdd-fast: PDD_FAST_CUDA_ARCHS must name architectures that this nvcc knows (75, 80, "
    )
    assert sentence.endswith(f", got {unknown}")


def test_the_record_holds_no_path_of_the_machine(
    build: ModuleType, tool: Tools, tmp_path: Path
) -> None:
    compiler(tool)
    tool("nvcc", answers=NVCC)
    text = json.dumps(build.decide().record())
    assert "g++ (made up) 1.2.3" in text
    assert str(tmp_path) not in text


# ---- the ninja file ----


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


# ---- the command ----


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


def test_the_build_prints_and_records_what_it_decided(
    command: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command.run()
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].startswith("pdd-fast: CPU kernels: baseline, avx2, avx512 with ")
    assert printed[1] == "pdd-fast: CUDA kernels: no (no nvcc on PATH or in CUDA_HOME)"
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
        f"import setuptools, sys; setuptools.setup = dict; sys.path.insert(0, "
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
