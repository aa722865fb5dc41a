"""The kernels under AddressSanitizer and UndefinedBehaviorSanitizer; native/sanitize.cpp says what
is run.
"""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path
from typing import NoReturn

import host_cuda
import pytest
from host_cuda import ROOT, CompileError, built_with

THREADS = ROOT / "csrc" / "core" / "threads.cpp"
DRIVER = ROOT / "tests" / "native" / "sanitize.cpp"
# The last two are not part of "undefined": what a draw of NaN or 1e300 does when it is cast to an
# integer.
SANITIZERS = "-fsanitize=address,undefined,float-cast-overflow,float-divide-by-zero"
FLAGS = [SANITIZERS, "-fno-sanitize-recover=all", "-g1"]

pytestmark = host_cuda.NEEDS_COMPILER


def supported(level: str) -> bool:
    if level == "baseline":
        return True
    information = Path("/proc/cpuinfo")
    flags = information.read_text(encoding="utf-8") if information.is_file() else ""
    return platform.machine().lower() in ("x86_64", "amd64") and {"avx2", "fma", "bmi2"} <= set(
        flags.split()
    )


def skip_or_fail(error: CompileError, level: str) -> NoReturn:
    if "cannot find" in str(error) and re.search(r"lib[a-z]*san|-l[a-z]*san", str(error)):
        pytest.skip("g++ has no sanitizer libraries")
    if "bad value" in str(error):
        pytest.skip(f"this g++ does not know {' '.join(built_with('CPU_LEVELS')[level])}")
    raise error


def compiled(target: Path, level: str, sources: Iterable[Path], *more: str) -> Path:
    """With -O1 compiling the passes of the whole network takes three times as long, and running no
    less.
    """
    flags = [
        *built_with("CXX_FLAGS"),
        *built_with("CPU_LEVELS")[level],
        f"-DPDD_BACKEND=cpu_{level}",
        *FLAGS,
        *more,
    ]
    try:
        objects = host_cuda.compiled(
            target.parent / f"{target.name}-objects",
            sources,
            [*flags, f"-I{ROOT / 'csrc'}", "-Og", "-fPIC"],
        )
        host_cuda.run_compiler(*objects, SANITIZERS, "-pthread", "-ldl", "-o", target)
    except CompileError as error:
        skip_or_fail(error, level)
    return target


def flags_for_the_host(sources: Path = host_cuda.SOURCES) -> list[str]:
    """For the CUDA kernels; with -O1 compiling takes three times as long, and running little
    less."""
    return [*host_cuda.flags_for(sources), *FLAGS, "-O0"]


def host_objects_for_the_driver(folder: Path) -> list[Path]:
    try:
        return host_cuda.compiled(folder, [*host_cuda.kernels(), DRIVER], flags_for_the_host())
    except CompileError as error:
        skip_or_fail(error, "cuda")


def run(program: Path, *arguments: str, leaks: bool = True) -> subprocess.CompletedProcess[str]:
    settings = {"ASAN_OPTIONS": f"detect_leaks={leaks:d}"}
    result = subprocess.run(
        [str(program), *arguments],
        env=os.environ | settings,
        capture_output=True,
        text=True,
        check=False,
    )
    # Looking for leaks needs ptrace, which some containers and debuggers withhold.
    if leaks and "LeakSanitizer has encountered a fatal error" in result.stderr:
        return run(program, *arguments, leaks=False)
    return result


def require_calls(result: subprocess.CompletedProcess[str], least: int) -> None:
    assert result.returncode == 0, result.stderr
    calls = re.fullmatch(r"(\d+) calls\n", result.stdout)
    assert calls is not None, result.stdout
    assert int(calls[1]) > least


# The last one: the code that AVX-512 has, in two registers of AVX2.
BUILDS = {"baseline": ("baseline",), "avx2": ("avx2",), "wide": ("avx2", "-DPDD_VECTOR_BYTES=64")}


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Compiles the driver and the CPU's kernels as one of BUILDS says, once."""

    @cache
    def compile_once(name: str) -> Path:
        level, *more = BUILDS[name]
        if not supported(level):
            pytest.skip(f"this CPU does not run {level}")
        operators = [*built_with("CPU_OPERATORS"), *built_with("OPERATORS")]
        kernels = [ROOT / "csrc" / "ops" / operator / "cpu.cpp" for operator in operators]
        return compiled(
            tmp_path_factory.mktemp(name) / "driver",
            level,
            [kernels[0], DRIVER, *kernels[1:], THREADS],
            *more,
        )

    return compile_once


@pytest.mark.parametrize("name", BUILDS)
def test_kernels_stay_in_their_buffers_and_do_nothing_undefined(
    name: str, build: Callable[[str], Path]
) -> None:
    require_calls(run(build(name)), 5000)


def test_the_passes_need_as_much_memory_at_every_level(build: Callable[[str], Path]) -> None:
    """The binding asks one of them and calls another."""
    baseline, *others = (run(build(name), "sizes").stdout for name in BUILDS)
    assert re.fullmatch(r"(\d+ \d+\n){100,}", baseline)
    for sizes in others:
        assert sizes == baseline


@pytest.fixture(scope="module")
def sanitized_module(
    build: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The Python module of the CPU, of the kernels that the driver runs too."""
    import pybind11

    python = [
        f"-isystem{path}" for path in (sysconfig.get_paths()["include"], pybind11.get_include())
    ]
    folder = tmp_path_factory.mktemp("module")
    flags = [
        *built_with("CXX_FLAGS"),
        *FLAGS,
        f"-I{ROOT / 'csrc'}",
        "-O0",
        "-DPDD_CPU",
        "-DPDD_MODULE=_cpu",
    ]
    bindings = [ROOT / "csrc" / "bind" / name for name in ("module.cpp", "cpu.cpp")]
    try:
        objects = host_cuda.compiled(folder, bindings, [*flags, *python])
        kernels = build("baseline").parent / "driver-objects"
        objects += [*sorted(kernels.glob("cpu_*.o")), kernels / "threads_core.o"]
        host_cuda.run_compiler(
            *objects, SANITIZERS, "-pthread", "-ldl", "-shared", "-o", folder / "_cpu.so"
        )
    except CompileError as error:
        skip_or_fail(error, "baseline")
    return folder / "_cpu.so"


STRESS = """
import importlib.util, sys
import torch
from pdd_fast.ops import _native, convnet

spec = importlib.util.spec_from_file_location("_cpu", sys.argv[1])
library = importlib.util.module_from_spec(spec)
spec.loader.exec_module(library)
_native._load = lambda device_type: (library, None)
if sys.argv[2] == "mistake":  # a piece that is said to be larger than it is
    taken = convnet.BufferPool.buffer
    convnet.BufferPool.buffer = lambda pool, size, dtype: taken(pool, size // 2, dtype)
    claimed = convnet._piece
    convnet._piece = lambda buffer: (claimed(buffer)[0], 1 << 40) if buffer is not None else (0, 0)
import test_buffers
test_buffers.test_networks_of_several_sizes_in_many_threads_get_what_one_thread_gets()
test_buffers.test_buffers_can_be_freed_while_other_threads_take_them()
print("done")
"""


@pytest.mark.parametrize("how", ["right", "mistake"])
def test_passes_in_many_threads_stay_in_the_pieces_of_their_pool(
    how: str, sanitized_module: Path
) -> None:
    """The pool's memory is torch's, whose allocations AddressSanitizer guards when it is loaded
    first.
    """
    found = subprocess.run(
        ["g++", "-print-file-name=libasan.so"], capture_output=True, text=True, check=True
    )
    settings = {
        "LD_PRELOAD": found.stdout.strip(),
        "ASAN_OPTIONS": "detect_leaks=0",
        "OMP_WAIT_POLICY": "passive",
        "OMP_NUM_THREADS": "2",
        "PYTHONPATH": os.pathsep.join(str(ROOT / "tests" / name) for name in ("ops", "support")),
    }
    result = subprocess.run(
        [sys.executable, "-P", "-c", STRESS, str(sanitized_module), how],
        env=os.environ | settings,
        capture_output=True,
        text=True,
        check=False,
    )
    if how == "right":
        assert (result.returncode, result.stdout) == (0, "done\n"), result.stderr
    else:
        assert "AddressSanitizer: heap-buffer-overflow" in result.stderr
        assert result.returncode != 0


def test_cuda_kernels_stay_in_their_buffers_and_do_nothing_undefined(tmp_path: Path) -> None:
    objects = host_objects_for_the_driver(tmp_path)
    require_calls(run(host_cuda.linked(tmp_path / "cuda", objects, SANITIZERS)), 3000)


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        ("return block[count];", "heap-buffer-overflow"),
        (
            "return static_cast<int>(static_cast<std::int64_t>(1e300 * count));",
            "outside the range of representable",
        ),
        ("return std::numeric_limits<int>::max() + count;", "signed integer overflow"),
    ],
    ids=["beyond a buffer", "a cast that does not fit", "an overflow"],
)
def test_the_sanitizers_see_mistakes(mistake: str, message: str, tmp_path: Path) -> None:
    """The test above needs this: with these flags such mistakes do end the program."""
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
