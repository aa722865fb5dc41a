"""Build the kernels: decide what to compile, run ninja, and record the decision.

The decision is printed too. The build does not need torch. Environment variables:

    PDD_FAST_CUDA         auto (default: if nvcc compiles) | 0 | 1 (fail without nvcc)
    PDD_FAST_CUDA_ARCHS   e.g. "80,90" (default: all of CUDA_ARCHS that this nvcc supports)
    PDD_FAST_WERROR       1: warnings are errors (continuous integration)
    CXX, CUDA_HOME        compiler and CUDA toolkit to use
    NVCC_CCBIN            C++ compiler of nvcc (nvcc's own variable); nvcc rejects newer ones
"""

from __future__ import annotations

import json
import os
import platform
import re
import shlex
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
# Each has a cpu.cpp and a cuda.cu.
OPERATORS = ("norm_relu_pool", "cross_entropy", "dsa", "add_rows")
CPU_OPERATORS = ("convnet",)
CUDA_ARCHS = ("80", "86", "89", "90", "100", "120")
CPU_LEVELS = {  # namespace suffix -> compiler flags; the binding chooses one at run time
    "baseline": [],
    "avx2": ["-march=x86-64-v3"],
    "avx512": ["-march=x86-64-v4", "-mprefer-vector-width=512"],
}
CXX_FLAGS = [
    "-std=c++17",
    "-O3",
    "-fPIC",
    "-fvisibility=hidden",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-pthread",
    "-Wall",
    "-Wextra",
    "-Wno-unknown-pragmas",
    "-Wno-psabi",
]
CUDA_DEFAULT = "/usr/local/cuda"  # the installer leaves its bin off PATH
# Headers that the CUDA kernels include. nvcc rejects an unsupported C++ compiler within the first
# of them.
PROBE = """#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <cmath>
#include <cstdint>
#include <type_traits>
__global__ void probe(float *x) { *x = std::sqrt(*x); }
"""
PROBE_SECONDS = 120.0  # nvcc takes 3 seconds on an idle machine
PROBE_ADVICE = "install a gcc that this nvcc supports and set NVCC_CCBIN to it"


@dataclass
class Plan:
    """Decisions of a build, with their reasons."""

    cxx: str  # a command line: CXX may be "ccache g++"
    levels: list[str]
    nvcc: str | None = None
    nvcc_version: str | None = None
    cuda_archs: list[str] = field(default_factory=list)
    cuda_reason: str = ""
    nvcc_error: str | None = None  # why the nvcc that was found is not used

    def describe(self) -> list[str]:
        """Return the lines that the build prints."""
        cuda = (
            f"CUDA {self.nvcc_version}, sm_{', sm_'.join(self.cuda_archs)} (+PTX)"
            if self.nvcc
            else "no"
        )
        advice = (
            f"pdd-fast: to build them {PROBE_ADVICE}; PDD_FAST_CUDA=0 says that none are wanted"
        )
        return [
            f"pdd-fast: CPU kernels: {', '.join(self.levels)} with {self.cxx}",
            f"pdd-fast: CUDA kernels: {cuda} ({self.cuda_reason})",
            *([advice] if self.nvcc_error else []),
        ]

    def record(self) -> dict[str, object]:
        """Return the record that `pdd-fast env` shows, without paths of the build machine."""
        cuda = {"nvcc": self.nvcc_version, "archs": self.cuda_archs} if self.nvcc else None
        cpu = {"compiler": compiler_version(self.cxx), "levels": self.levels}
        return {
            "cpu": cpu,
            "cuda": cuda,
            "cuda_reason": self.cuda_reason,
            "nvcc_error": self.nvcc_error,
            "commit": commit(),
        }


def output_of(*command: str) -> str:
    """Return the output of a command."""
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def commit() -> str:
    """Return the commit of these sources, or "unknown".

    PDD_FAST_COMMIT gives the commit for a copy without .git. A copy may lie within another
    repository, whose commit would be wrong.
    """
    if given := os.environ.get("PDD_FAST_COMMIT"):
        return given
    git = ("git", "-C", str(ROOT))
    try:
        if Path(output_of(*git, "rev-parse", "--show-toplevel").strip()).resolve() == ROOT:
            return output_of(*git, "describe", "--always", "--dirty").strip()
    except (OSError, subprocess.CalledProcessError):
        pass
    return "unknown"


def compiler_version(cxx: str) -> str:
    """Return the compiler's first line about its version."""
    return output_of(*shlex.split(cxx), "--version").splitlines()[0]


def supports(cxx: str, *flags: str) -> bool:
    """Return whether the compiler accepts the flags."""
    command = [*shlex.split(cxx), *flags, "-x", "c++", "-", "-o", os.devnull]
    try:
        return (
            subprocess.run(
                command, input="int main() {}", capture_output=True, text=True
            ).returncode
            == 0
        )
    except OSError:
        return False


class ToolError(Exception):
    """A tool's own message about its failure, without paths of this machine."""


def answer_of(*command: str) -> str:
    """Return the output of a command.

    Raises:
        ToolError: the command does not run, fails, or does not answer in time. Its child processes
            end with it.
    """
    try:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            start_new_session=True,
        )
    except OSError as error:
        raise ToolError(f"it does not run ({error.strerror})") from error
    try:
        out, err = process.communicate(timeout=PROBE_SECONDS)
    except BaseException as error:  # an interrupt does not reach another session
        with suppress(OSError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        if isinstance(error, subprocess.TimeoutExpired):
            raise ToolError(f"it gives no answer within {PROBE_SECONDS:g} seconds") from error
        raise
    if process.returncode < 0:
        raise ToolError(f"it was ended by signal {-process.returncode}")
    if process.returncode:
        raise ToolError(
            first_error(err + "\n" + out) or f"it ends with status {process.returncode}"
        )
    return out


def first_error(text: str) -> str:
    """Return the first line that names an error, else the first line.

    The line has no paths and at most 200 characters.
    """
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    wrong = re.compile(
        r"\b(error|fatal|unsupported|cannot|undefined|not found|No such)\b", re.IGNORECASE
    )
    line = next((line for line in lines if wrong.search(line)), lines[0] if lines else "")
    line = re.sub(r"[^\s'\"(]*/", "", line)
    return line if len(line) <= 200 else line[:197] + "..."


def nvcc_problem(nvcc: str, arch: str) -> str | None:
    """Return why nvcc cannot build; None if it compiles and links a small file."""
    with tempfile.TemporaryDirectory(prefix="pdd-fast-") as folder:
        source = Path(folder) / "probe.cu"
        source.write_text(PROBE)
        flags = [
            "-std=c++17",
            f"-arch=sm_{arch}",
            "-Xcompiler=-fPIC",
            "-shared",
            "-cudart",
            "static",
        ]
        try:
            answer_of(nvcc, *flags, str(source), "-o", str(source.with_suffix(".so")))
        except ToolError as error:
            return str(error)
    return None


def find_nvcc() -> str | None:
    """Return the path of nvcc: in CUDA_HOME, on PATH, or where NVIDIA's installer puts it."""

    def within(toolkit: str | None) -> str | None:
        nvcc = Path(toolkit or "") / "bin" / "nvcc"
        return str(nvcc) if toolkit and nvcc.is_file() else None

    return within(os.environ.get("CUDA_HOME")) or shutil.which("nvcc") or within(CUDA_DEFAULT)


def decide() -> Plan:
    """Decide what to build."""
    found = shutil.which("g++") or shutil.which("clang++")
    cxx = os.environ.get("CXX") or (shlex.quote(found) if found else None)
    if cxx is None:
        sys.exit(
            "pdd-fast: a C++17 compiler is needed to build; install g++ or clang++, or set CXX"
        )
    if not supports(cxx, "-std=c++17"):
        sys.exit(
            f"pdd-fast: a C++17 compiler is needed to build, but {cxx} does not compile; set CXX "
            "to another"
        )
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    # All levels or the baseline alone, as the binding requires: gcc supports x86-64-v3 from release
    # 11 on, clang from 12.
    levels = (
        list(CPU_LEVELS)
        if x86 and all(supports(cxx, *flags) for flags in CPU_LEVELS.values())
        else ["baseline"]
    )
    plan = Plan(cxx=cxx, levels=levels)

    wanted = os.environ.get("PDD_FAST_CUDA", "auto")
    if wanted not in ("auto", "0", "1"):
        sys.exit(f"pdd-fast: PDD_FAST_CUDA must be auto, 0 or 1, got {wanted!r}")
    nvcc = find_nvcc()
    if wanted == "0":
        plan.cuda_reason = "PDD_FAST_CUDA=0"
    elif nvcc is None:
        if wanted == "1":
            sys.exit(
                f"pdd-fast: PDD_FAST_CUDA=1 but no nvcc on PATH, in CUDA_HOME or in {CUDA_DEFAULT}"
            )
        plan.cuda_reason = f"no nvcc on PATH, in CUDA_HOME or in {CUDA_DEFAULT}"
    else:
        try:
            listed, version = answer_of(nvcc, "--list-gpu-arch"), answer_of(nvcc, "--version")
        except ToolError as error:  # broken, or too old for this option
            if wanted == "1":
                sys.exit(
                    f"pdd-fast: PDD_FAST_CUDA=1 but {nvcc} does not name its architectures: "
                    f"{error}; install a newer "
                    "CUDA toolkit, or set PDD_FAST_CUDA=0 to build without CUDA"
                )
            plan.cuda_reason = "nvcc does not name its architectures"
            return plan
        known = [line.removeprefix("compute_") for line in listed.split()]
        asked = os.environ.get("PDD_FAST_CUDA_ARCHS", "").replace(";", ",").split(",")
        archs = [arch.strip() for arch in asked if arch.strip()] or [
            arch for arch in CUDA_ARCHS if arch in known
        ]
        unknown = [arch for arch in archs if arch.rstrip("af") not in known]
        if unknown:
            sys.exit(
                "pdd-fast: PDD_FAST_CUDA_ARCHS must name architectures that this nvcc knows "
                f"({', '.join(known)}), got {', '.join(unknown)}"
            )
        plan.nvcc_error = nvcc_problem(nvcc, archs[0])
        if plan.nvcc_error is not None:
            if wanted == "1":
                sys.exit(
                    f"pdd-fast: PDD_FAST_CUDA=1 but nvcc does not compile: {plan.nvcc_error}; "
                    f"{PROBE_ADVICE}, or set PDD_FAST_CUDA=0 to build without CUDA"
                )
            plan.cuda_reason = f"nvcc does not compile: {plan.nvcc_error}"
            return plan
        plan.nvcc, plan.cuda_archs = nvcc, archs
        release = re.search(r"release ([^,\s]+)", version)
        plan.nvcc_version = release[1] if release else "of unknown release"
        plan.cuda_reason = "PDD_FAST_CUDA=1" if wanted == "1" else "nvcc found"
    return plan


def argument(path: str | Path) -> str:
    """Return a path for a command of a ninja file."""
    return shlex.quote(str(path)).replace("$", "$$")


def file(path: str | Path) -> str:
    """Return a path for the inputs and outputs of a ninja file."""
    return re.sub(r"([ :$])", r"$\1", str(path))


class NinjaFile:
    """Compile and link steps of both libraries."""

    def __init__(self, plan: Plan, folder: Path) -> None:
        import pybind11

        self.plan, self.folder = plan, folder
        include = [f"-I{argument(ROOT / 'csrc')}"]
        python = [
            f"-isystem {argument(path)}"
            for path in (sysconfig.get_paths()["include"], pybind11.get_include())
        ]
        werror = ["-Werror"] if os.environ.get("PDD_FAST_WERROR") == "1" else []
        system = ["-undefined dynamic_lookup"] if sys.platform == "darwin" else ["-s", "-ldl"]
        link = ["-shared", "-pthread", *system]
        x86 = ["-DPDD_X86"] if "avx2" in plan.levels else []
        gencode = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in plan.cuda_archs]
        if gencode:
            newest = max(plan.cuda_archs, key=lambda arch: int(arch.rstrip("af")))
            gencode.append(f"-gencode=arch=compute_{newest},code=compute_{newest}")
        cxx, compiler = plan.cxx.replace("$", "$$"), argument(plan.nvcc or "nvcc")
        nvcc_werror = ["-Werror all-warnings"] if werror else []
        # Architectures compile in parallel: one file has fifty kernels and takes 25 seconds for
        # each architecture.
        nvcc = [
            "-std=c++17",
            "-O3",
            "--threads=0",
            "-DPDD_BACKEND=cuda",
            "-DPDD_HALF",
            "-Xcompiler=-fPIC,-fvisibility=hidden",
            *nvcc_werror,
        ]
        self.lines = [
            "ninja_required_version = 1.8",
            f"cxxflags = {' '.join([*CXX_FLAGS, *x86, *include, *werror])}",
            f"python = {' '.join(python)}",
            f"nvccflags = {' '.join([*nvcc, *include, *gencode])}",
            "rule cxx",
            f"  command = {cxx} -MMD -MF $out.d $cxxflags $flags -c $in -o $out",
            "  depfile = $out.d",
            "  deps = gcc",
            "rule nvcc",
            f"  command = {compiler} -MD -MF $out.d $nvccflags -c $in -o $out",
            "  depfile = $out.d",
            "  deps = gcc",
            "rule link",
            f"  command = {cxx} $in {' '.join(link)} -o $out",
            # nvcc knows the location of its runtime; statically linked, the library loads without a
            # driver.
            "rule cuda_link",
            f"  command = {compiler} -shared -cudart static -Xlinker -s $in -o $out",
        ]

    def object(self, rule: str, source: str, name: str, flags: str = "") -> str:
        """Add a compile step and return the object's name."""
        self.lines += [
            f"build {name}.o: {rule} {file(ROOT / 'csrc' / source)}",
            f"  flags = {flags}",
        ]
        return f"{name}.o"

    def library(self, rule: str, target: Path, objects: list[str]) -> None:
        """Add a link step."""
        self.lines.append(f"build {file(target)}: {rule} {' '.join(objects)}")

    def cpu(self, target: Path) -> None:
        """Add the steps of the CPU library."""
        objects = [
            self.object(
                "cxx", "bind/module.cpp", "cpu_module", "$python -DPDD_MODULE=_cpu -DPDD_CPU"
            ),
            self.object("cxx", "bind/cpu.cpp", "cpu_bind", "-DPDD_CPU"),
            self.object("cxx", "core/threads.cpp", "threads"),
        ]
        for level in self.plan.levels:
            flags = " ".join([*CPU_LEVELS[level], f"-DPDD_BACKEND=cpu_{level}"])
            operators = OPERATORS + CPU_OPERATORS
            objects += [
                self.object("cxx", f"ops/{op}/cpu.cpp", f"{op}_{level}", flags) for op in operators
            ]
        self.library("link", target, objects)

    def cuda(self, target: Path) -> None:
        """Add the steps of the CUDA library."""
        objects = [
            self.object(
                "cxx", "bind/module.cpp", "cuda_module", "$python -DPDD_MODULE=_cuda -DPDD_HALF"
            ),
            self.object("nvcc", "bind/cuda.cpp", "cuda_bind"),
        ]
        objects += [self.object("nvcc", f"ops/{op}/cuda.cu", f"{op}_cuda") for op in OPERATORS]
        self.library("cuda_link", target, objects)

    def run(self) -> None:
        """Write the ninja file and run it."""
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "build.ninja").write_text("\n".join(self.lines) + "\n")
        beside = Path(sys.executable).parent / "ninja"
        ninja = str(beside) if beside.is_file() else shutil.which("ninja")
        if ninja is None:
            sys.exit("pdd-fast: ninja is needed to build; install it with `pip install ninja`")
        if subprocess.run([ninja, "-C", str(self.folder)]).returncode:
            without = "; PDD_FAST_CUDA=0 builds without CUDA" if self.plan.nvcc else ""
            sys.exit(
                f"pdd-fast: the kernels do not compile; the compiler's messages are above{without}"
            )


class BuildKernels(build_ext):
    """Build the extensions with ninja, at the paths that setuptools chooses."""

    def run(self) -> None:
        """Build the kernels and write their record."""
        plan = decide()
        print(*plan.describe(), sep="\n", flush=True)
        ninja = NinjaFile(plan, Path(self.build_temp).resolve() / "kernels")
        targets = {"_cpu": ninja.cpu} | ({"_cuda": ninja.cuda} if plan.nvcc else {})
        for ext in self.extensions:
            # A library left by an earlier build would be installed and preferred although it was
            # not requested.
            if ext.name.rpartition(".")[2] not in targets:
                Path(self.get_ext_fullpath(ext.name)).unlink(missing_ok=True)
        self.extensions = [ext for ext in self.extensions if ext.name.rpartition(".")[2] in targets]
        for ext in self.extensions:
            target = Path(self.get_ext_fullpath(ext.name)).resolve()
            target.parent.mkdir(parents=True, exist_ok=True)
            targets[ext.name.rpartition(".")[2]](target)
        ninja.run()
        record = Path(self.get_ext_fullpath("pdd_fast._cpu")).resolve().parent / "_build.json"
        record.write_text(json.dumps(plan.record(), indent=1) + "\n")


setup(
    ext_modules=[Extension("pdd_fast._cpu", []), Extension("pdd_fast._cuda", [])],
    cmdclass={"build_ext": BuildKernels},
)
