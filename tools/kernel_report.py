"""List registers, shared memory and spills of every CUDA kernel for docs/kernels.md.

    python tools/kernel_report.py            # compiles and writes the table
    python tools/kernel_report.py --check    # writes nothing; fails if the table is outdated

Both commands fail if a kernel spills registers or keeps an array in local memory.

The program needs nvcc but no GPU. The table is for sm_90; sm_80 and sm_100 must satisfy the same
rule.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "kernels.md"
BEGIN, END = "<!-- written by tools/kernel_report.py -->", "<!-- end -->"
ARCHITECTURES = ("80", "90", "100")
SHOWN = "90"
FLAGS = (
    "-std=c++17",
    "-O3",
    "-DPDD_BACKEND=cuda",
    "-DPDD_HALF",
    f"-I{ROOT / 'csrc'}",
    "-Xptxas=-v",
    "-cubin",
)
TYPES = {"f": "float32", "d": "float64", "N3pdd8bfloat16E": "bfloat16", "N3pdd7float16E": "float16"}


@dataclass(frozen=True)
class Kernel:
    """Resources of one kernel."""

    name: str
    type: str
    numbers: tuple[int, ...]  # template arguments: elements per pack, windows kept in registers
    registers: int
    shared: int  # bytes, static
    stack: int  # bytes
    spills: int  # bytes, stores and loads together

    @property
    def row(self) -> str:
        """Return the kernel's row of the table."""
        pack = f"{self.numbers[0]}" if self.numbers else ""
        kept = f"{self.numbers[1]}" if len(self.numbers) > 1 else ""
        return (
            f"| `{self.name}` | {self.type} | {pack} | {kept} | {self.registers} | "
            f"{self.shared} | {self.spills} |"
        )


def demangled(symbol: str) -> tuple[str, str, tuple[int, ...]]:
    """Return a kernel's name, type and numbers, from its symbol.

    An example is ..22norm_relu_pool_kernelIN3pdd8bfloat16ELi8ELi2EE..
    """
    match = re.search(r"\d([a-z_]+)_kernelI(.+?)EEv", symbol)
    if match is None:
        raise ValueError(f"{symbol} is not the symbol of a kernel template")
    name, arguments = match.groups()
    numbers = tuple(int(number) for number in re.findall(r"Li(\d+)E?", arguments))
    letter = arguments.split("Li")[0]
    # N S <substitution> _ <length and name>: the namespace occurred before.
    if letter.startswith("NS"):
        letter = "N3pdd" + re.sub(r"^NS\d*_", "", letter)
    found = TYPES.get(letter) or TYPES.get(letter + "E")
    if found is None:
        raise ValueError(f"{symbol} has an unknown type {letter!r}")
    return name, found, numbers


def parsed(report: str) -> list[Kernel]:
    """Return the kernels in the output of ``ptxas -v``."""
    kernels = []
    for part in re.split(r"Compiling entry function '", report)[1:]:
        name, kind, numbers = demangled(part.split("'")[0])

        def number(pattern: str, text: str = part) -> int:
            match = re.search(pattern, text)
            return int(match.group(1)) if match else 0

        kernels.append(
            Kernel(
                name,
                kind,
                numbers,
                number(r"Used (\d+) registers"),
                number(r"(\d+) bytes smem"),
                number(r"(\d+) bytes stack frame"),
                number(r"(\d+) bytes spill stores") + number(r"(\d+) bytes spill loads"),
            )
        )
    return kernels


def report_of(source: Path, architecture: str) -> list[Kernel]:
    """Compile a source for an architecture and return its kernels."""
    with tempfile.TemporaryDirectory() as folder:
        command = [
            "nvcc",
            *FLAGS,
            f"-arch=sm_{architecture}",
            str(source),
            "-o",
            f"{folder}/kernels.cubin",
        ]
        result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        sys.exit(f"{source} does not compile for sm_{architecture}:\n{result.stderr}")
    return parsed(result.stderr)


def table(kernels: list[Kernel], compiler: str) -> str:
    """Return the table in Markdown."""
    order = list(TYPES.values())
    lines = [
        f"nvcc {compiler}, sm_{SHOWN}. A thread reads a pack at once, and keeps windows in "
        "registers (0: reads again).",
        "",
        "| kernel | type | elements per pack | windows kept | registers | shared bytes | "
        "spilled bytes |",
        "|---|---|---|---|---|---|---|",
        *(k.row for k in sorted(kernels, key=lambda k: (k.name, order.index(k.type), k.numbers))),
    ]
    return "\n".join(lines)


def replaced(page: str, content: str) -> str:
    """Return the page with the text between its two marks replaced."""
    before, rest = page.split(BEGIN)
    return f"{before}{BEGIN}\n{content}\n{END}{rest.split(END, 1)[1]}"


def main() -> None:
    """Run the program."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--check",
        action="store_true",
        help="write nothing; exit status 1 where something is not as it has to be",
    )
    args = parser.parse_args()
    try:
        version = subprocess.run(
            ["nvcc", "--version"], check=True, capture_output=True, text=True
        ).stdout
    except OSError:
        sys.exit("nvcc is not on PATH")
    compiler = version.split("release ")[1].split(",")[0]
    sources = sorted((ROOT / "csrc" / "ops").glob("*/cuda.cu"))
    tasks = [(source, architecture) for architecture in ARCHITECTURES for source in sources]
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(lambda task: report_of(*task), tasks))

    wrong, shown = [], []
    for (_, architecture), kernels in zip(tasks, found, strict=True):
        wrong += [
            f"sm_{architecture}: {k.name} {k.type} {k.numbers}"
            for k in kernels
            if k.spills or k.stack
        ]
        if architecture == SHOWN:
            shown += kernels
    if wrong:
        sys.exit(
            "these kernels spill registers or keep arrays in local memory:\n  " + "\n  ".join(wrong)
        )
    page = PAGE.read_text(encoding="utf-8")
    new = replaced(page, table(shown, compiler))
    if not args.check:
        PAGE.write_text(new, encoding="utf-8")
    elif f"nvcc {compiler}," in page and new != page:  # another compiler's registers are no error
        sys.exit(f"{PAGE.relative_to(ROOT)} is not up to date; run python tools/kernel_report.py")
    print(f"{len(shown)} kernels, no spills, no local memory for sm_{', sm_'.join(ARCHITECTURES)}")


if __name__ == "__main__":
    main()
