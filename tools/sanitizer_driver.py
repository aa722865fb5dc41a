"""Run every operator of tests/support/cases.py once per sample input, under compute-sanitizer.

Inputs are created on the CPU and copied to the GPU with their memory layout, so that no kernels but
the package's run on them. compute-sanitizer checks only these kernels and would not see writes by
others. The program prints its number of calls. ``--plant`` makes an error instead, which the tool
of that name must detect.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.append(str(Path(__file__).resolve().parents[1] / "tests" / "support"))

# The tests compare results with the reference; this check only detects a kernel that did not do its
# work. bfloat16: 2^-8.
TOLERANCE = 1e-2


def as_it_lies(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy ``tensor`` with its strides and all of its memory; .to() would pack a slice."""
    count = tensor.untyped_storage().nbytes() // tensor.element_size()
    whole = tensor.as_strided((count,), (1,), 0).to(device)
    return whole.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())


def calls() -> Iterator[tuple[Any, tuple[Any, ...]]]:
    """Yield every operator with each sample input in float32, and in bfloat16 if accepted."""
    import cases

    for operator in cases.OPERATORS:
        for arguments in operator.arguments(torch.float32):
            yield operator, arguments
            if getattr(operator, "takes_half", False):
                yield operator, cases.stored_in(torch.bfloat16, arguments)


def run(device: torch.device) -> int:
    """Run every call and return their number.

    Raises:
        ArithmeticError: a result is far from the CPU's.
    """
    from cases import relative_error

    count = 0
    for operator, arguments in calls():
        moved = [as_it_lies(a, device) if isinstance(a, Tensor) else a for a in arguments]
        found, expected = operator.function(*moved), operator.function(*arguments)
        for part, truth in zip(parts(found), parts(expected), strict=True):
            error = relative_error(part, truth)
            if not error <= TOLERANCE:
                raise ArithmeticError(f"{operator.name}: a result is off by {error:.1e}")
        count += 1
    return count


def parts(value: Any) -> tuple[Tensor, ...]:
    """Return the results as a tuple."""
    return (value,) if isinstance(value, Tensor) else tuple(value)


def plant(tool: str, device: torch.device) -> None:
    """Read beyond an input (memcheck), or read an uninitialized one (initcheck)."""
    from pdd_fast.ops.cross_entropy import cross_entropy

    logits = torch.empty(64, 10, device=device)
    if tool == "memcheck":
        logits.untyped_storage().resize_(64)  # bytes; the shape still claims 2560
    cross_entropy(logits, as_it_lies(torch.arange(64) % 10, device))
    torch.cuda.synchronize(device)


def main() -> None:
    """Run the program."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--plant", choices=("memcheck", "initcheck"))
    args = parser.parse_args()
    torch.manual_seed(0)
    device = torch.device(args.device)
    with torch.no_grad():
        if args.plant:
            plant(args.plant, device)
        else:
            print(f"{run(device)} calls")


if __name__ == "__main__":
    main()
