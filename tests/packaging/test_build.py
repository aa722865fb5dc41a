"""setup.py as units: what it decides to build on which machine, and the ninja file that builds
it."""

from __future__ import annotations

import json
import shlex
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from build_support import NVCC, Tools, compiler

pytest.importorskip("setuptools")


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
    assert (
        plan.describe()[1]
        == "pdd-fast: CUDA kernels: no (no nvcc on PATH, in CUDA_HOME or in /no/cuda)"
    )
    assert plan.record()["cuda"] is None
    assert plan.record()["cuda_reason"] == "no nvcc on PATH, in CUDA_HOME or in /no/cuda"


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


def test_the_installers_folder_comes_last(
    build: ModuleType, tool: Tools, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler(tool)
    monkeypatch.setattr(build, "CUDA_DEFAULT", str(tmp_path / "default"))
    by_default = tool("nvcc", answers=NVCC, at="default/bin")
    assert build.decide().nvcc == str(by_default)
    on_path = tool("nvcc", answers=NVCC)
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
    assert (
        refusal(build)
        == "pdd-fast: PDD_FAST_CUDA=1 but no nvcc on PATH, in CUDA_HOME or in /no/cuda"
    )
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
