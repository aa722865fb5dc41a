"""The CPU kernels under AddressSanitizer and UndefinedBehaviorSanitizer; native/sanitize.cpp says what is run."""

from __future__ import annotations

import ast
import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
DRIVER = ROOT / "tests" / "native" / "sanitize.cpp"
COMPILER = shutil.which("g++")
# The last two are not part of "undefined": what a draw of NaN or 1e300 does when it is cast to an integer.
SANITIZERS = "address,undefined,float-cast-overflow,float-divide-by-zero"

pytestmark = [
    pytest.mark.skipif(COMPILER is None, reason="g++ is not on PATH"),
    pytest.mark.skipif(sys.platform != "linux", reason="g++ may be another compiler, without OpenMP"),
    pytest.mark.skipif(not (ROOT / "setup.py").is_file(), reason="the sources are not beside the tests"),
]


def built_with(name: str) -> Any:
    """A constant of setup.py, which cannot be imported: it would build."""
    for statement in ast.parse((ROOT / "setup.py").read_text(encoding="utf-8")).body:
        if isinstance(statement, ast.Assign) and ast.unparse(statement.targets[0]) == name:
            return ast.literal_eval(statement.value)
    raise AssertionError(f"setup.py sets no {name}")


def supported(level: str) -> bool:
    if level == "baseline":
        return True
    information = Path("/proc/cpuinfo")
    flags = information.read_text(encoding="utf-8") if information.is_file() else ""
    return platform.machine().lower() in ("x86_64", "amd64") and {"avx2", "fma", "bmi2"} <= set(flags.split())


def compiled(target: Path, level: str, sources: list[Path]) -> Path:
    assert COMPILER is not None
    flags = [
        *built_with("CXX_FLAGS"),
        *built_with("CPU_LEVELS")[level],
        f"-DPDD_BACKEND=cpu_{level}",
        f"-I{ROOT / 'csrc'}",
        f"-fsanitize={SANITIZERS}",
        *("-O1", "-g1", "-fopenmp", "-fno-sanitize-recover=all"),
    ]
    result = subprocess.run(
        [COMPILER, *flags, *map(str, sources), "-o", str(target)], capture_output=True, text=True, check=False
    )
    if "cannot find" in result.stderr and re.search(r"lib[a-z]*san|-l[a-z]*san", result.stderr):
        pytest.skip("g++ has no sanitizer libraries")
    if "bad value" in result.stderr:
        pytest.skip(f"this g++ does not know {' '.join(built_with('CPU_LEVELS')[level])}")
    assert result.returncode == 0, result.stderr
    return target


def run(program: Path, leaks: bool = True) -> subprocess.CompletedProcess[str]:
    """Waiting threads sleep: spinning, they would take the other threads' cores in every small loop."""
    settings = {"ASAN_OPTIONS": f"detect_leaks={leaks:d}", "OMP_WAIT_POLICY": "passive"}
    result = subprocess.run([str(program)], env=os.environ | settings, capture_output=True, text=True, check=False)
    # Looking for leaks needs ptrace, which some containers and debuggers withhold.
    if leaks and "LeakSanitizer has encountered a fatal error" in result.stderr:
        return run(program, leaks=False)
    return result


@pytest.mark.parametrize("level", ["baseline", "avx2"])
def test_kernels_stay_in_their_buffers_and_do_nothing_undefined(level: str, tmp_path: Path) -> None:
    if not supported(level):
        pytest.skip(f"this CPU does not run {level}")
    kernels = [ROOT / "csrc" / "ops" / operator / "cpu.cpp" for operator in built_with("OPERATORS")]
    result = run(compiled(tmp_path / level, level, [*kernels, DRIVER]))
    assert result.returncode == 0, result.stderr
    calls = re.fullmatch(r"(\d+) calls\n", result.stdout)
    assert calls is not None, result.stdout
    assert int(calls[1]) > 5000


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
