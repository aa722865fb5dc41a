"""The kernels under AddressSanitizer and UndefinedBehaviorSanitizer; native/sanitize.cpp says what is run."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from pathlib import Path
from typing import NoReturn

import host_cuda
import pytest
from host_cuda import ROOT, CompileError, built_with

DRIVER = ROOT / "tests" / "native" / "sanitize.cpp"
# The last two are not part of "undefined": what a draw of NaN or 1e300 does when it is cast to an integer.
SANITIZERS = "-fsanitize=address,undefined,float-cast-overflow,float-divide-by-zero"
FLAGS = [SANITIZERS, "-fno-sanitize-recover=all", "-g1"]

pytestmark = host_cuda.NEEDS_COMPILER


def supported(level: str) -> bool:
    if level == "baseline":
        return True
    information = Path("/proc/cpuinfo")
    flags = information.read_text(encoding="utf-8") if information.is_file() else ""
    return platform.machine().lower() in ("x86_64", "amd64") and {"avx2", "fma", "bmi2"} <= set(flags.split())


def skip_or_fail(error: CompileError, level: str) -> NoReturn:
    if "cannot find" in str(error) and re.search(r"lib[a-z]*san|-l[a-z]*san", str(error)):
        pytest.skip("g++ has no sanitizer libraries")
    if "bad value" in str(error):
        pytest.skip(f"this g++ does not know {' '.join(built_with('CPU_LEVELS')[level])}")
    raise error


def compiled(target: Path, level: str, sources: list[Path]) -> Path:
    flags = [*built_with("CXX_FLAGS"), *built_with("CPU_LEVELS")[level], f"-DPDD_BACKEND=cpu_{level}", *FLAGS]
    try:
        host_cuda.run_compiler(*flags, f"-I{ROOT / 'csrc'}", "-O1", "-fopenmp", *sources, "-o", target)
    except CompileError as error:
        skip_or_fail(error, level)
    return target


def flags_for_the_host(sources: Path = host_cuda.SOURCES) -> list[str]:
    """For the CUDA kernels; with -O1 compiling takes three times as long, and running little less."""
    return [*host_cuda.flags_for(sources), *FLAGS, "-O0"]


def host_objects_for_the_driver(folder: Path) -> list[Path]:
    try:
        return host_cuda.compiled(folder, [*host_cuda.kernels(), DRIVER], flags_for_the_host())
    except CompileError as error:
        skip_or_fail(error, "cuda")


def run(program: Path, leaks: bool = True) -> subprocess.CompletedProcess[str]:
    """Waiting threads sleep: spinning, they would take the other threads' cores in every small loop."""
    settings = {"ASAN_OPTIONS": f"detect_leaks={leaks:d}", "OMP_WAIT_POLICY": "passive"}
    result = subprocess.run([str(program)], env=os.environ | settings, capture_output=True, text=True, check=False)
    # Looking for leaks needs ptrace, which some containers and debuggers withhold.
    if leaks and "LeakSanitizer has encountered a fatal error" in result.stderr:
        return run(program, leaks=False)
    return result


def require_calls(result: subprocess.CompletedProcess[str], least: int) -> None:
    assert result.returncode == 0, result.stderr
    calls = re.fullmatch(r"(\d+) calls\n", result.stdout)
    assert calls is not None, result.stdout
    assert int(calls[1]) > least


@pytest.mark.parametrize("level", ["baseline", "avx2"])
def test_kernels_stay_in_their_buffers_and_do_nothing_undefined(level: str, tmp_path: Path) -> None:
    if not supported(level):
        pytest.skip(f"this CPU does not run {level}")
    kernels = [ROOT / "csrc" / "ops" / operator / "cpu.cpp" for operator in built_with("OPERATORS")]
    require_calls(run(compiled(tmp_path / level, level, [*kernels, DRIVER])), 5000)


def test_cuda_kernels_stay_in_their_buffers_and_do_nothing_undefined(tmp_path: Path) -> None:
    objects = host_objects_for_the_driver(tmp_path)
    require_calls(run(host_cuda.linked(tmp_path / "cuda", objects, SANITIZERS)), 3000)


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        ("return block[count];", "heap-buffer-overflow"),
        ("return static_cast<int>(static_cast<std::int64_t>(1e300 * count));", "outside the range of representable"),
        ("return std::numeric_limits<int>::max() + count;", "signed integer overflow"),
    ],
    ids=["beyond a buffer", "a cast that does not fit", "an overflow"],
)
def test_the_sanitizers_see_mistakes(mistake: str, message: str, tmp_path: Path) -> None:
    """What the test above stands on: with these flags such mistakes do end the program."""
    source = tmp_path / "mistake.cpp"
    source.write_text(
        "#include <cstdint>\n#include <limits>\n#include <memory>\n"
        "int main(int count, char**) {\n"
        "    std::unique_ptr<int[]> block(new int[static_cast<unsigned>(count)]());\n"
        f"    {mistake}\n"
        "}\n",
        encoding="utf-8",
    )
    result = run(compiled(tmp_path / "mistake", "baseline", [source]))
    assert result.returncode != 0
    assert message in result.stderr
