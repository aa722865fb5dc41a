"""Mistakes put into the CUDA kernels, one at a time: that the tests of the kernels on the host see
them.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import host_cuda
import pytest
import test_sanitizers
from host_cuda import ROOT, SOURCES

pytestmark = host_cuda.NEEDS_COMPILER

REFERENCE = "test_kernel_equals_reference"
ORDERS = "test_same_bits_in_any_order_of_threads"
LARGE = "test_large_planes"
SANITIZERS = "test_sanitizers.py"

NORM, DSA, CROSS_ENTROPY, ADD_ROWS = (
    f"ops/{operator}/cuda.cu" for operator in ("norm_relu_pool", "dsa", "cross_entropy", "add_rows")
)
CORE, TILE = "core/cuda.cuh", "ops/norm_relu_pool/tile.cuh"


@dataclass(frozen=True)
class Mutation:
    """``old`` becomes ``new`` at its only place in ``file``; ``seen_by``, run for ``operator``,
    then has to fail.
    """

    name: str
    file: str
    old: str
    new: str
    operator: str
    seen_by: str


MUTATIONS = [
    # Barriers.
    Mutation(
        "block sum reads before all have written",
        CORE,
        "partial[warp] = value;\n    __syncthreads();\n",
        "partial[warp] = value;\n",
        "dsa",
        ORDERS,
    ),
    Mutation(
        "plane sum reads before all have written",
        TILE,
        "partial.of[warp][q][v][lane] = value[q][v];\n    __syncthreads();\n",
        "partial.of[warp][q][v][lane] = value[q][v];\n",
        "norm_relu_pool",
        ORDERS,
    ),
    Mutation(
        "plane sum writes while the one before is read",
        TILE,
        "    __syncthreads();  // the previous sums may still be read\n",
        "",
        "norm_relu_pool",
        ORDERS,
    ),
    Mutation(
        "a thread leaves before a barrier",
        TILE,
        "    if (warps == 1) return;\n",
        "    if (warps == 1 || threadIdx.x == 3) return;\n",
        "norm_relu_pool",
        REFERENCE,
    ),
    Mutation(
        "operations begin before the image is loaded",
        DSA,
        "plan.packed_input, size, image);\n        __syncthreads();\n",
        "plan.packed_input, size, image);\n",
        "dsa",
        ORDERS,
    ),
    # Sums over a warp.
    Mutation(
        "half a warp's sum",
        CORE,
        "T warp_sum(T value) {\n#pragma unroll\n    for (int offset = 16;",
        "T warp_sum(T value) {\n#pragma unroll\n    for (int offset = 8;",
        "cross_entropy",
        REFERENCE,
    ),
    Mutation(
        "lanes that share channels are not added",
        TILE,
        "int offset = split.vectors; offset < 32",
        "int offset = split.vectors * 2; offset < 32",
        "norm_relu_pool",
        REFERENCE,
    ),
    Mutation(
        "part of a warp shuffles",
        CORE,
        "value += __shfl_xor_sync(0xffffffffu, value, offset);",
        "if (threadIdx.x % 32 < 31) value += __shfl_xor_sync(0xffffffffu, value, offset);",
        "dsa",
        REFERENCE,
    ),
    Mutation(
        "the last warp is not added",
        TILE,
        "w < warps; w += apart",
        "w + 1 < warps; w += apart",
        "norm_relu_pool",
        REFERENCE,
    ),
    # Tails and strides.
    Mutation(
        "the last number of an image",
        DSA,
        "k < count; k += kThreads",
        "k < count - 1; k += kThreads",
        "dsa",
        REFERENCE,
    ),
    Mutation(
        "a block of one thread more",
        DSA,
        "k < count; k += kThreads",
        "k < count; k += kThreads + 1",
        "dsa",
        REFERENCE,
    ),
    Mutation(
        "tasks beyond the largest grid",
        CROSS_ENTROPY,
        "static_cast<int64_t>(gridDim.x) * kSamples",
        "static_cast<int64_t>(gridDim.x + 1) * kSamples",
        "cross_entropy",
        REFERENCE,
    ),
    Mutation(
        "a window too many",
        TILE,
        "inside && number < windows",
        "inside && number <= windows",
        "norm_relu_pool",
        REFERENCE,
    ),
    Mutation(
        "an odd last column",
        TILE,
        "valid && j + 1 < width",
        "valid && j + 1 <= width",
        "norm_relu_pool",
        REFERENCE,
    ),
    Mutation(
        "windows of large planes",
        TILE,
        "number < place.windows; number += place.rows",
        "number < place.windows - 1; number += place.rows",
        "norm_relu_pool",
        LARGE,
    ),
    Mutation(
        "a pack begins where it does not",
        ADD_ROWS,
        "k = task % packs * V;",
        "k = task % packs;",
        "add_rows",
        REFERENCE,
    ),
    # Only a guard behind a buffer sees these.
    Mutation(
        "a task too many", ADD_ROWS, "task < tasks;", "task <= tasks;", "add_rows", SANITIZERS
    ),
    Mutation(
        "shared memory for one number too few",
        DSA,
        "return 2 * shape.elements() * number_bytes;",
        "return (2 * shape.elements() - 1) * number_bytes;",
        "dsa",
        SANITIZERS,
    ),
    Mutation(
        "one warp too many in a block's sum",
        CORE,
        "lane < warps ? partial[lane]",
        "lane <= warps ? partial[lane]",
        "dsa",
        SANITIZERS,
    ),
]
NOT_SLOW = {"operations begin before the image is loaded", "the last number of an image"}

EVERY_MUTATION = pytest.mark.parametrize(
    "mutation",
    [
        pytest.param(
            mutation, id=mutation.name, marks=[] if mutation.name in NOT_SLOW else pytest.mark.slow
        )
        for mutation in MUTATIONS
    ],
)


def mutated(mutation: Mutation, folder: Path) -> tuple[Path, Path]:
    """A copy of the sources with the mistake, and the kernels in it that the mistake is to be seen
    in.
    """
    sources = folder / "csrc"
    shutil.copytree(SOURCES, sources)
    text = (sources / mutation.file).read_text(encoding="utf-8")
    # The formatter decides where lines break: any white space matches any other.
    old = r"\s*".join(re.escape(part) for part in re.findall(r"\w+|[^\w\s]", mutation.old))
    changed, places = re.subn(old, lambda _: mutation.new, text)
    assert places == 1, f"{mutation.file} must hold this once: {mutation.old!r}"
    (sources / mutation.file).write_text(changed, encoding="utf-8")
    return sources, sources / "ops" / mutation.operator / "cuda.cu"


def with_the_mistake(objects: list[Path], mistaken: list[Path]) -> list[Path]:
    """The mistake comes first: if several objects hold an inline function, the linker takes the
    first.
    """
    return [
        *mistaken,
        *(path for path in objects if path.name not in {other.name for other in mistaken}),
    ]


def run_tests(library: Path, expression: str) -> subprocess.CompletedProcess[str]:
    tests = [
        str(ROOT / "tests" / "ops" / "test_cuda_on_host.py"),
        "-x",
        "-k",
        expression,
        "-p",
        "no:cacheprovider",
    ]
    environment = os.environ | {"PDD_HOST_LIBRARY": str(library)}
    return subprocess.run(
        [sys.executable, "-m", "pytest", *tests],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture(scope="module")
def sanitized(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return test_sanitizers.host_objects_for_the_driver(tmp_path_factory.mktemp("sanitized"))


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.name)
def test_the_text_to_change_is_there(mutation: Mutation, tmp_path: Path) -> None:
    mutated(mutation, tmp_path)


@pytest.mark.slow
def test_without_a_mistake_the_tests_pass(host_objects: list[Path], tmp_path: Path) -> None:
    library = host_cuda.linked(tmp_path / "library.so", host_objects, "-shared")
    result = run_tests(library, f"{REFERENCE} or {ORDERS} or {LARGE}")
    assert result.returncode == 0, result.stdout


@EVERY_MUTATION
def test_a_mistake_is_seen(
    mutation: Mutation, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    sources, kernel = mutated(mutation, tmp_path)
    if mutation.seen_by == SANITIZERS:
        originals = request.getfixturevalue("sanitized")
        objects = host_cuda.compiled(
            tmp_path, [kernel], test_sanitizers.flags_for_the_host(sources)
        )
        program = host_cuda.linked(
            tmp_path / "program", with_the_mistake(originals, objects), test_sanitizers.SANITIZERS
        )
        result = test_sanitizers.run(program)
        assert result.returncode != 0
        assert "buffer-overflow" in result.stderr
    else:
        objects = host_cuda.compiled(tmp_path, [kernel], host_cuda.module_flags(sources))
        originals = request.getfixturevalue("host_objects")
        library = host_cuda.linked(
            tmp_path / "library.so", with_the_mistake(originals, objects), "-shared"
        )
        result = run_tests(library, f"{mutation.seen_by} and {mutation.operator}")
        # 1: a test failed; below 0: the mistake ended the process. All else would be a mistake of
        # this test's.
        assert result.returncode == 1 or result.returncode < 0, result.stdout
        assert result.returncode < 0 or "1 failed" in result.stdout
