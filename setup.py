"""Builds the kernels: decides what to compile, writes a ninja file, runs it, and prints and records what it decided.

torch is not needed. What can be set from outside:
    PDD_FAST_CUDA         auto (default: where nvcc is found) | 0 | 1 (fail without nvcc)
    PDD_FAST_CUDA_ARCHS   e.g. "80,90" (default: all of CUDA_ARCHS that this nvcc knows)
    PDD_FAST_WERROR       1: warnings are errors (continuous integration)
    CXX, CUDA_HOME        the compiler and the CUDA toolkit to use
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import dataclass, field
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
OPERATORS = ("norm_relu_pool", "cross_entropy", "dsa")
CUDA_ARCHS = ("80", "86", "89", "90", "100", "120")
CPU_LEVELS = {  # namespace suffix -> compiler flags; the binding chooses one at run time
    "baseline": [],
    "avx2": ["-march=x86-64-v3"],
    "avx512": ["-march=x86-64-v4", "-mprefer-vector-width=512"],
}
CXX_FLAGS = [
    "-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-fno-math-errno", "-fno-trapping-math",
    "-Wall", "-Wextra", "-Wno-unknown-pragmas", "-Wno-psabi",
]  # fmt: skip


@dataclass
class Plan:
    """What will be built, and why."""

    cxx: str
    levels: list[str]
    openmp: bool
    nvcc: str | None = None
    nvcc_version: str | None = None
    cuda_archs: list[str] = field(default_factory=list)
    cuda_reason: str = ""

    def describe(self) -> list[str]:
        cuda = f"CUDA {self.nvcc_version}, sm_{', sm_'.join(self.cuda_archs)} (+PTX)" if self.nvcc else "no"
        return [
            f"pdd-fast: CPU kernels: {', '.join(self.levels)} with {self.cxx}"
            f"{', OpenMP' if self.openmp else ', one thread (no OpenMP)'}",
            f"pdd-fast: CUDA kernels: {cuda} ({self.cuda_reason})",
        ]

    def record(self) -> dict[str, object]:
        """What `pdd-fast env` shows; holds no path of the machine that built."""
        cuda = {"nvcc": self.nvcc_version, "archs": self.cuda_archs} if self.nvcc else None
        cpu = {"compiler": compiler_version(self.cxx), "levels": self.levels, "openmp": self.openmp}
        return {"cpu": cpu, "cuda": cuda, "cuda_reason": self.cuda_reason}


def output_of(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def compiler_version(cxx: str) -> str:
    return output_of(cxx, "--version").splitlines()[0]


def supports(cxx: str, *flags: str) -> bool:
    command = [cxx, *flags, "-x", "c++", "-", "-o", os.devnull]
    return subprocess.run(command, input="int main() {}", capture_output=True, text=True).returncode == 0


def find_nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME")
    if home and (Path(home) / "bin" / "nvcc").is_file():
        return str(Path(home) / "bin" / "nvcc")
    return shutil.which("nvcc")


def decide() -> Plan:
    cxx = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if cxx is None:
        sys.exit("pdd-fast: a C++17 compiler is needed to build; install g++ or clang++, or set CXX")
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    levels = [level for level in CPU_LEVELS if level == "baseline" or x86]
    plan = Plan(cxx=cxx, levels=levels, openmp=supports(cxx, "-fopenmp"))

    wanted = os.environ.get("PDD_FAST_CUDA", "auto")
    if wanted not in ("auto", "0", "1"):
        sys.exit(f"pdd-fast: PDD_FAST_CUDA must be auto, 0 or 1, got {wanted!r}")
    nvcc = find_nvcc()
    if wanted == "0":
        plan.cuda_reason = "PDD_FAST_CUDA=0"
    elif nvcc is None:
        if wanted == "1":
            sys.exit("pdd-fast: PDD_FAST_CUDA=1 but no nvcc on PATH or in CUDA_HOME")
        plan.cuda_reason = "no nvcc on PATH or in CUDA_HOME"
    else:
        known = {line.strip().removeprefix("compute_") for line in output_of(nvcc, "--list-gpu-arch").split()}
        asked = os.environ.get("PDD_FAST_CUDA_ARCHS")
        archs = asked.replace(";", ",").split(",") if asked else [arch for arch in CUDA_ARCHS if arch in known]
        unknown = [arch for arch in archs if arch not in known]
        if unknown:
            sys.exit(f"pdd-fast: PDD_FAST_CUDA_ARCHS: this nvcc does not know {', '.join(unknown)}")
        plan.nvcc, plan.cuda_archs = nvcc, archs
        plan.nvcc_version = output_of(nvcc, "--version").split("release ")[1].split(",")[0]
        plan.cuda_reason = "PDD_FAST_CUDA=1" if wanted == "1" else "nvcc found"
    return plan


class NinjaFile:
    """The compile and link steps of both libraries."""

    def __init__(self, plan: Plan, folder: Path) -> None:
        import pybind11

        self.plan, self.folder = plan, folder
        include = [f"-I{ROOT / 'csrc'}"]
        python = [f"-isystem {sysconfig.get_paths()['include']}", f"-isystem {pybind11.get_include()}"]
        werror = ["-Werror"] if os.environ.get("PDD_FAST_WERROR") == "1" else []
        openmp = ["-fopenmp"] if plan.openmp else []
        link = ["-shared", *openmp, *(["-undefined dynamic_lookup"] if sys.platform == "darwin" else ["-s"])]
        x86 = ["-DPDD_X86"] if "avx2" in plan.levels else []
        gencode = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in plan.cuda_archs]
        if gencode:
            newest = max(plan.cuda_archs, key=lambda arch: int(arch.rstrip("af")))
            gencode.append(f"-gencode=arch=compute_{newest},code=compute_{newest}")
        nvcc_werror = ["-Werror all-warnings"] if werror else []
        nvcc = ["-std=c++17", "-O3", "-DPDD_BACKEND=cuda", "-Xcompiler=-fPIC,-fvisibility=hidden", *nvcc_werror]
        self.lines = [
            "ninja_required_version = 1.8",
            f"cxxflags = {' '.join([*CXX_FLAGS, *openmp, *x86, *include, *werror])}",
            f"python = {' '.join(python)}",
            f"nvccflags = {' '.join([*nvcc, *include, *gencode])}",
            "rule cxx",
            f"  command = {plan.cxx} -MMD -MF $out.d $cxxflags $flags -c $in -o $out",
            "  depfile = $out.d",
            "  deps = gcc",
            "rule nvcc",
            f"  command = {plan.nvcc} -MD -MF $out.d $nvccflags -c $in -o $out",
            "  depfile = $out.d",
            "  deps = gcc",
            "rule link",
            f"  command = {plan.cxx} $in {' '.join(link)} -o $out",
            # nvcc knows where its own runtime lies; statically linked, the library loads without a driver.
            "rule cuda_link",
            f"  command = {plan.nvcc} -shared -cudart static -Xlinker -s $in -o $out",
        ]

    def object(self, rule: str, source: str, name: str, flags: str = "") -> str:
        self.lines += [f"build {name}.o: {rule} {ROOT / 'csrc' / source}", f"  flags = {flags}"]
        return f"{name}.o"

    def library(self, rule: str, target: Path, objects: list[str]) -> None:
        self.lines.append(f"build {target}: {rule} {' '.join(objects)}")

    def cpu(self, target: Path) -> None:
        objects = [
            self.object("cxx", "bind/module.cpp", "cpu_module", "$python -DPDD_MODULE=_cpu"),
            self.object("cxx", "bind/cpu.cpp", "cpu_bind"),
        ]
        for level in self.plan.levels:
            flags = " ".join([*CPU_LEVELS[level], f"-DPDD_BACKEND=cpu_{level}"])
            objects += [self.object("cxx", f"ops/{op}/cpu.cpp", f"{op}_{level}", flags) for op in OPERATORS]
        self.library("link", target, objects)

    def cuda(self, target: Path) -> None:
        objects = [
            self.object("cxx", "bind/module.cpp", "cuda_module", "$python -DPDD_MODULE=_cuda"),
            self.object("nvcc", "bind/cuda.cpp", "cuda_bind"),
        ]
        objects += [self.object("nvcc", f"ops/{op}/cuda.cu", f"{op}_cuda") for op in OPERATORS]
        self.library("cuda_link", target, objects)

    def run(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "build.ninja").write_text("\n".join(self.lines) + "\n")
        ninja = Path(sys.executable).parent / "ninja"
        command = [str(ninja)] if ninja.is_file() else [shutil.which("ninja") or "ninja"]
        subprocess.run([*command, "-C", str(self.folder)], check=True)


class BuildKernels(build_ext):
    """setuptools finds the places, ninja does the work."""

    def run(self) -> None:
        plan = decide()
        print(*plan.describe(), sep="\n", flush=True)
        ninja = NinjaFile(plan, Path(self.build_temp).resolve() / "kernels")
        targets = {"_cpu": ninja.cpu} | ({"_cuda": ninja.cuda} if plan.nvcc else {})
        self.extensions = [ext for ext in self.extensions if ext.name.rpartition(".")[2] in targets]
        for ext in self.extensions:
            target = Path(self.get_ext_fullpath(ext.name)).resolve()
            target.parent.mkdir(parents=True, exist_ok=True)
            targets[ext.name.rpartition(".")[2]](target)
        ninja.run()
        record = Path(self.get_ext_fullpath("pdd_fast._cpu")).resolve().parent / "_build.json"
        record.write_text(json.dumps(plan.record(), indent=1) + "\n")


setup(
    ext_modules=[Extension("pdd_fast._cpu", []), Extension("pdd_fast._cuda", [])], cmdclass={"build_ext": BuildKernels}
)
