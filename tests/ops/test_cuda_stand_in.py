"""The stand-in for CUDA on the host does what CUDA does, and sees what CUDA would forgive or let
hang.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import host_cuda
import pytest
import torch

pytestmark = host_cuda.NEEDS_COMPILER

ORDERS = ("forward", "backward", "1")
Run = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stand-in")
    sources = [host_cuda.HOST / "stand_in.cu", *host_cuda.STAND_IN]
    try:
        flags = [*host_cuda.flags_for(host_cuda.SOURCES), "-g1", "-fsanitize=address"]
        return host_cuda.linked(
            folder / "stand-in", host_cuda.compiled(folder, sources, flags), "-fsanitize=address"
        )
    except host_cuda.CompileError as error:
        if "cannot find" in str(error):
            pytest.skip("g++ has no AddressSanitizer")
        raise


@pytest.fixture
def run(program: Path) -> Run:
    def run(
        *arguments: object, order: str = "forward", ending: int = 0
    ) -> subprocess.CompletedProcess[str]:
        environment = {"PDD_HOST_ORDER": order, "ASAN_OPTIONS": "detect_leaks=0"}
        result = subprocess.run(
            [program, *map(str, arguments)],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert result.returncode == ending, result.stdout + result.stderr
        return result

    return run


def written(result: subprocess.CompletedProcess[str]) -> list[int]:
    status, numbers = result.stdout.split("\n")
    assert status == "cudaSuccess cudaSuccess cudaSuccess"
    return [int(number) for number in numbers.split()]


# ---- what is right ----


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("width", [32, 8, 1])
@pytest.mark.parametrize("argument", [0, 1, 3, 16, 31])
def test_shuffles(run: Run, argument: int, width: int, order: str) -> None:
    lanes = torch.arange(32)
    first = lanes // width * width
    up, down, xor = lanes - argument, lanes + argument, lanes ^ argument
    found = written(run("shuffles", argument, width, order=order))
    assert found[:32] == (first + argument % width).tolist()
    assert found[32:64] == torch.where(up < first, lanes, up).tolist()
    assert found[64:96] == torch.where(down >= first + width, lanes, down).tolist()
    assert found[96:128] == torch.where(xor >= first + width, lanes, xor).tolist()


@pytest.mark.parametrize("order", ORDERS)
def test_votes_of_half_a_warp(run: Run, order: str) -> None:
    found = written(run("votes", 3, order=order))
    ballot = sum(1 << lane for lane in range(32) if lane % 3 == 0)
    signed = [
        half if half < 2**31 else half - 2**32 for half in (ballot & 0xFFFF, ballot & 0xFFFF0000)
    ]
    assert found[:32] == [signed[0]] * 16 + [signed[1]] * 16
    assert found[32:64] == [1] * 16 + [0] * 16
    assert found[64:96] == [0] * 16 + [1] * 16
    assert found[96:128] == [lane ^ 1 for lane in range(32)]


@pytest.mark.parametrize("order", ORDERS)
def test_every_block_finds_its_shared_memory_spoiled(run: Run, order: str) -> None:
    assert written(run("shared", order=order)) == [-1] * 256


def test_numbers_of_16_bits_round_as_torchs_do(program: Path) -> None:
    torch.manual_seed(0)
    every = torch.arange(65536, dtype=torch.int32).to(torch.int16)
    as_bfloat16, as_float16 = every.view(torch.bfloat16).float(), every.view(torch.float16).float()
    bits = torch.randint(-(2**31), 2**31, (200_000,)).to(torch.int32)
    # All of both types, what lies half-way between two of float16, and floats of any size.
    between = (as_float16[:-1].double() + as_float16[1:].double()).float() / 2
    values = torch.cat(
        [as_bfloat16, as_float16, between, bits.view(torch.float32), torch.randn(200_000)]
    )
    result = subprocess.run(
        [program, "numbers"], input=values.numpy().tobytes(), capture_output=True, check=True
    )
    rounded = torch.frombuffer(bytearray(result.stdout[: 4 * len(values)]), dtype=torch.int16).view(
        -1, 2
    )
    widened = torch.frombuffer(
        bytearray(result.stdout[4 * len(values) :]), dtype=torch.float32
    ).view(-1, 2)
    for k, (dtype, exact) in enumerate(
        ((torch.bfloat16, as_bfloat16), (torch.float16, as_float16))
    ):
        torch.testing.assert_close(
            rounded[:, k].contiguous().view(dtype), values.to(dtype), rtol=0, atol=0, equal_nan=True
        )
        torch.testing.assert_close(
            widened[:, k].contiguous(), exact, rtol=0, atol=0, equal_nan=True
        )


# ---- what is refused ----


@pytest.mark.parametrize(
    "name", ["no block", "no thread", "grid.y", "grid.z", "1056 threads", "block.z"]
)
def test_an_impossible_launch_is_an_error_that_is_reported_once(run: Run, name: str) -> None:
    error = "cudaErrorInvalidConfiguration"
    assert run(name).stdout.split("\n")[0] == f"{error} {error} cudaSuccess"


@pytest.mark.parametrize("name", ["1024 threads", "48 KB"])
def test_the_largest_launch_that_is_possible(run: Run, name: str) -> None:
    written(run(name))


def test_shared_memory_beyond_48_kb_has_to_be_asked_for(run: Run) -> None:
    error = "cudaErrorInvalidValue"
    assert run("more than 48 KB").stdout.split("\n")[0] == f"{error} {error} cudaSuccess"
    assert run("more than 48 KB", 0, 0, 49153).stdout.startswith(
        "cudaSuccess cudaSuccess\ncudaSuccess "
    )
    assert run("more than 48 KB", 0, 0, 49152).stdout.startswith(
        f"cudaSuccess cudaSuccess\n{error} "
    )
    assert run("more than 48 KB", 0, 0, 232448).stdout.startswith(
        "cudaSuccess cudaSuccess\ncudaSuccess "
    )
    assert run("more than 48 KB", 0, 0, 232449).stdout.startswith(f"{error} {error}\n{error} ")


# ---- what is seen ----


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "leaves before a barrier",
            r"no thread of 64 can go on: 63 at __syncthreads in .*stand_in.cu:\d+ \(\(0, 0, 0\) "
            r"the first\), "
            r"1 out of the kernel \(\(5, 0, 0\)\); block \(0, 0, 0\)",
        ),
        (
            "two barriers",
            r"64 can go on: 32 at __syncthreads .* 32 at __syncthreads .*\(\(32, 0, 0\) the "
            r"first\)",
        ),
        ("barrier and shuffle", r"16 at __syncthreads .* 16 at a shuffle with mask 0xffffffff"),
        ("leaves before a shuffle", r"no thread of 64 .* 14 at a shuffle .* 50 out of the kernel"),
        ("lanes that are not there", r"no thread of 20 can go on: 20 at a shuffle"),
        (
            "two masks",
            r"8 at a vote with mask 0xffffffff .* 24 out of the kernel \(\(8, 0, 0\) the first\)",
        ),
        (
            "not in its mask",
            r"thread \(\d+, 0, 0\) is not in the mask that it gives at a vote with mask 0x0000ffff",
        ),
        (
            "source not in the mask",
            r"thread \(\d+, 0, 0\) reads lane \d+, which is not in the mask, at a shuffle",
        ),
    ],
)
def test_a_mistake_ends_the_launch_and_says_who_is_where(run: Run, name: str, message: str) -> None:
    for order in ORDERS:
        found = run(name, order=order, ending=1).stdout
        assert re.search(message, found), found
        assert "of the kernel of {int*, int, int}" in found


def test_a_barrier_that_is_missing_shows_in_some_order(run: Run) -> None:
    forward, backward = (
        written(run("races", order=order))[:64] for order in ("forward", "backward")
    )
    assert forward == [-1] * 32 + list(range(32))
    assert backward == list(range(32, 64)) + [-1] * 32


def test_address_sanitizer_guards_shared_memory(run: Run) -> None:
    written(run("beyond dynamic shared", 99))
    assert "heap-buffer-overflow" in run("beyond dynamic shared", 100, ending=1).stderr
    written(run("beyond fixed shared", 0))
    assert "global-buffer-overflow" in run("beyond fixed shared", 1, ending=1).stderr
