"""PREDICT an iteration's time on a GPU from its launches, bytes and operations.

    python -P -m pdd_fast.benchmarks.predict --page docs/performance.md

The command writes the table into that page. The numbers are predictions, not measurements.

Every implementation runs eagerly on the CPU for one and for two steps at the real sizes. Each
operation that torch dispatches is recorded: the bytes of its inputs and results, and its
floating-point operations. The second step's additional work, times N, is the iteration. On the GPU,
an operation takes the longest of three times: its bytes over the memory bandwidth, its operations
over the arithmetic rate, and a launch. An eager iteration takes at least its number of launches
times the time that Python needs to issue one.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from pdd_fast.benchmarks.baselines import FUNCTIONS, Problem
from pdd_fast.benchmarks.unroll import matching
from pdd_fast.engines import convolution
from pdd_fast.ops import convnet
from pdd_fast.ops._registry import computed_in_32_bits

BEGIN, END = "<!-- written by benchmarks/predict.py -->", "<!-- end -->"

# Data sheet of an H100 SXM (3.35 TB/s; dense: 67, 495, 989 TFLOP/s), times the share that layers of
# this size are assumed to reach.
MEMORY = 0.85 * 3.35e12
ARITHMETIC = {"float32": 0.6 * 67e12, "tf32": 0.4 * 495e12, "bfloat16": 0.4 * 989e12}
IN_GRAPH, EAGER = 2e-6, 6e-6  # seconds per launch: in a graph, and issued by Python
NOT_LAUNCHED = re.compile(
    r"detach|_unsafe_view|empty|lift_fresh|scalar_tensor|_local_scalar_dense|is_pinned"
)
CASES = ((20, 50), (100, 30), (256, 20))
OTHERS = {
    "plain autograd": ("plain", False),
    "plain autograd, channels-last": ("plain", True),
    "frozen weights": ("frozen", False),
    "checkpointed autograd": ("checkpointed", False),
    "torch.func": ("functional", False),
}


@dataclass
class Dispatches(TorchDispatchMode):
    """Record bytes and operations of everything dispatched."""

    taken: list[tuple[int, float]] = field(default_factory=list)  # bytes, operations

    def __post_init__(self) -> None:
        super().__init__()

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        result = function(*args, **kwargs)
        name = function._schema.name
        is_view = any(
            r.alias_info is not None and not r.alias_info.is_write for r in function._schema.returns
        )
        if is_view or NOT_LAUNCHED.search(name):
            return result
        leaves = torch.utils._pytree.tree_leaves((args, kwargs, result))
        size = sum(
            leaf.numel() * leaf.itemsize for leaf in leaves if isinstance(leaf, torch.Tensor)
        )
        flops = flop_registry.get(function.overloadpacket)
        operations = float(flops(*args, **kwargs, out_val=result)) if flops else 0.0
        self.taken.append((size, operations))
        return result


@dataclass(frozen=True)
class Work:
    """Cost of one step of an iteration."""

    launches: int
    bytes: int
    operations: float
    parts: tuple[tuple[int, float], ...]  # bytes and operations of every launch

    def seconds(self, precision: str, graph: bool) -> float:
        """Return the predicted seconds of the step."""
        rate = ARITHMETIC[precision]
        device = sum(
            max(size / MEMORY, operations / rate, IN_GRAPH) for size, operations in self.parts
        )
        return device if graph else max(device, self.launches * EAGER)


def as_on_a_gpu(dispatches: Dispatches) -> Callable[..., torch.Tensor]:
    """Return a replacement for the engine's convolutions that records them as on a GPU.

    The CPU computes the convolutions of 16-bit images in float32.
    """

    def run(
        function: Callable[..., torch.Tensor],
        images: torch.Tensor,
        *others: torch.Tensor,
        groups: int,
    ) -> Any:
        operands = (images, *others)
        with _disable_current_modes():
            result = computed_in_32_bits(function, *operands, groups)
            with FlopCounterMode(display=False) as counter:
                function(*(t.to("meta").float() for t in operands), groups)
        size = sum(t.numel() * t.itemsize for t in (*operands, result))
        dispatches.taken.append((size, float(counter.get_total_flops())))
        return result

    return run


def recorded(
    prepare: Callable[[Problem], Callable[[], Any]], problem: Problem, steps: int
) -> list[tuple[int, float]]:
    """Return bytes and operations of every dispatch in one iteration of ``steps`` steps."""
    problem.steps = steps
    iterate = prepare(problem)
    dispatches = Dispatches()
    with mock.patch.object(
        convnet, "available", return_value=False
    ):  # use the passes that a GPU uses
        iterate()  # complete the one-time work
        with dispatches, mock.patch.object(convolution, "_run", as_on_a_gpu(dispatches)):
            iterate()
    return dispatches.taken


def step_of(prepare: Callable[[Problem], Callable[[], Any]], problem: Problem) -> Work:
    """Return the cost of one step: the difference between two steps and one."""
    one, two = recorded(prepare, problem, 1), recorded(prepare, problem, 2)
    # The multiset difference keeps the entries that two steps have once more than one step.
    left = list(one)
    added = []
    for part in two:
        if part in left:
            left.remove(part)
        else:
            added.append(part)
    return Work(len(added), sum(p[0] for p in added), sum(p[1] for p in added), tuple(added))


def rows(n: int, steps: int) -> list[str]:
    """Return the table's rows for batches of ``n`` images and ``steps`` steps."""

    def problem(channels_last: bool = False) -> Problem:
        # No augmentation: each step samples its own operation, so the two steps would differ in it.
        found = Problem.draw(n, 2, 32, 128, 3, torch.device("cpu"), torch.float32, augment=False)
        found.channels_last = channels_last
        return found

    lines = []
    own = {
        p: step_of(partial(matching, graph=False, precision=p), problem())
        for p in ("float32", "bfloat16")
    }
    entries = [
        (f"ours, graph, {p}", own["bfloat16" if p == "bfloat16" else "float32"], p, True)
        for p in ARITHMETIC
    ]
    entries += [
        (f"ours, eager, {p}", own["bfloat16" if p == "bfloat16" else "float32"], p, False)
        for p in ARITHMETIC
    ]
    for name, (function, channels_last) in OTHERS.items():
        work = step_of(FUNCTIONS[function], problem(channels_last))
        entries += [(f"{name}, {p}", work, p, False) for p in ("float32", "tf32")]
    base = entries[1][1].seconds("tf32", True)
    for name, work, precision, graph in entries:
        seconds = work.seconds(precision, graph)
        lines.append(
            f"| {n} × {steps} | {name} | {work.launches * steps} | "
            f"{work.bytes * steps / 1e9:.1f} | {work.operations * steps / 1e12:.2f} | "
            f"{seconds * steps * 1e3:.0f} | {seconds / base:.1f} |"
        )
    return lines


def main() -> None:
    """Run the program."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--page", type=Path, help="gets the table between its two marks; without, it is printed"
    )
    args = parser.parse_args()
    lines = [
        "| batch × N | | launches | GB | TFLOP | **predicted** ms | times ours (graph, tf32) |",
        "|---|---|---|---|---|---|---|",
        *(line for n, steps in CASES for line in rows(n, steps)),
    ]
    content = "\n".join(lines)
    if args.page is None:
        print(content)
        return
    page = args.page.read_text(encoding="utf-8")
    before, rest = page.split(BEGIN)
    args.page.write_text(
        f"{before}{BEGIN}\n{content}\n{END}{rest.split(END, 1)[1]}", encoding="utf-8"
    )


if __name__ == "__main__":
    main()
