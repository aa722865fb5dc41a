"""Who takes part in iteration.py, ours and the baselines in the precisions that are fair to each, and how one of them
is measured."""

from __future__ import annotations

import gc
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import baselines
import measure
import torch
from baselines import Gradients, Iteration, Problem

import pdd_fast
from pdd_fast import engines
from pdd_fast.augmentation import PackedDraws
from pdd_fast.matching.step import MatchingInputs, MatchingState, MatchingStep

PRECISIONS = {"cuda": ["float32", "tf32", "bfloat16"], "cpu": ["float32"]}


def unrolled(problem: Problem, engine: str = "auto", memory: str = "recompute") -> Iteration:
    """The installed package by its public differentiable unroll."""

    def iterate() -> Gradients:
        images, rate = problem.images.detach().requires_grad_(), problem.rate.detach().requires_grad_()
        batches, draws = problem.batches[: problem.steps], problem.draws and problem.draws[: problem.steps]
        end = pdd_fast.unroll(
            problem.net, problem.start, images, problem.labels, rate, batches, draws, engine=engine, memory=memory
        )
        loss = pdd_fast.trajectory_matching_loss(end, problem.start, problem.target)
        images_grad, rate_grad = torch.autograd.grad(loss, [images, rate])
        return images_grad, rate_grad

    return iterate


def ours(problem: Problem, graph: bool, precision: str, memory: str) -> Iteration:
    """The installed package's iteration. Its inputs come from the CPU every time, as in a run; baselines have theirs.

    At rest and with momentum 0 the velocities after an iteration are the gradients.
    """
    engine = engines.choose(problem.net, precision=precision)
    state = MatchingState.start(problem.images, float(problem.rate))
    start, target = problem.start.cpu(), problem.target.cpu()

    def prepared(steps: int) -> tuple[MatchingStep, MatchingInputs]:
        draws = PackedDraws.of(problem.draws[:steps]) if problem.draws else None
        batches = torch.stack(problem.batches[:steps])
        step = MatchingStep(
            engine, problem.labels, problem.images[:0], steps=steps, batch=batches.shape[1], memory=memory, graph=graph,
            operations=len(draws.operations) if draws else 0, cutout=draws.cutout_size if draws else (0, 0),
        )  # fmt: skip
        return step, MatchingInputs(start, target, batches, draws)

    made = {problem.steps: prepared(problem.steps)}

    def iterate() -> Gradients:
        if problem.steps not in made:  # warming up
            made[problem.steps] = prepared(problem.steps)
        step, inputs = made[problem.steps]
        found = step(state, inputs).state
        return found.images_velocity, found.rate_velocity

    return iterate


@dataclass(frozen=True)
class Contender:
    precision: str
    note: str
    prepare: Callable[[Problem], Iteration]
    channels_last: bool = False
    holds_graph: bool = False  # a CUDA graph keeps what it works in


def contenders(device: str, memory: str) -> dict[str, Contender]:
    """Everything that is measured on a kind of device, by name."""
    on_gpu = device == "cuda"
    found: dict[str, Contender] = {}
    for graph in (True, False) if on_gpu else (False,):
        for p in PRECISIONS[device]:
            own = partial(ours, graph=graph, precision=p, memory=memory)
            note = f"exact; memory={memory!r}{', one CUDA graph' if graph else ''}"
            found[f"ours, {'graph' if graph else 'eager'}, {p}"] = Contender(p, note, own, holds_graph=graph)
    compiled = partial(baselines.functional, compiled=True)
    for label, note, prepare, last, precisions in (
        ("plain autograd", "exact; create_graph=True through all steps", baselines.plain, False, ("float32", "tf32")),
        ("plain autograd, channels-last", "the same; bfloat16 by autocast", baselines.plain, True, PRECISIONS["cuda"]),
        ("frozen weights", "TESLA's approximation, not exact", baselines.frozen, False, ("float32", "tf32")),
        ("checkpointed autograd", "exact; one step's graph at a time", baselines.checkpointed, False, ("float32",)),
        ("torch.func", "exact; jvp of grad", baselines.functional, False, ("float32",)),
        ("torch.func, compiled", "the same; torch.compile", compiled, False, ("float32", "tf32")),
    ):  # fmt: skip
        for p in (p for p in precisions if p in PRECISIONS[device]):
            found[f"{label}, {p}"] = Contender(p, note, prepare, last, on_gpu and prepare is compiled)
    return found


def reference(names: Sequence[str], name: str) -> str | None:
    """Ours that ``name`` is compared with: of the same precision, as a graph where that was measured."""
    precision = name.rpartition(", ")[2]
    return next((n for n in names if n.startswith("ours") and n.endswith(f", {precision}")), None)


# ---- one measurement ----------------------------------------------------------------------------------------------


def warm_up(problem: Problem, iterate: Iteration) -> None:
    """Libraries choose kernels, compilers compile, graphs are captured. On a CPU two steps have all of that behind."""
    if problem.images.is_cuda:
        iterate()
        iterate()
        return
    steps, problem.steps = problem.steps, min(2, problem.steps)
    iterate()
    problem.steps = steps


def peak(contender: Contender, device: torch.device) -> int:
    if device.type == "cpu":
        return measure.resident_peak()
    # What a graph works in was set aside when it was captured and no longer counts as allocated.
    return torch.cuda.max_memory_reserved() if contender.holds_graph else torch.cuda.max_memory_allocated()


def timed(contender: Contender, problem: Problem, repeats: int = 0) -> tuple[torch.Tensor, dict[str, Any]]:
    """The images' gradient, and the seconds and bytes it took."""
    device = problem.images.device
    measure.set_precision(contender.precision)
    problem.channels_last = contender.channels_last
    problem.autocast = torch.bfloat16 if contender.precision == "bfloat16" else None
    iterate = contender.prepare(problem)
    warm_up(problem, iterate)
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    taken: list[float] = []
    for _ in range(repeats or (5 if device.type == "cuda" else 1)):
        seconds, (gradient, _) = measure.timed(iterate, device)
        taken.append(seconds)
    found = {"seconds": statistics.median(taken), "seconds_each": taken, "peak_bytes": peak(contender, device)}
    return gradient, found


def error_of(gradient: torch.Tensor, truth: Path) -> dict[str, Any]:
    """The relative error against the gradient in the file, where there is one; None for one that is not finite."""
    if not truth.exists():
        return {}
    expected = torch.load(truth)
    error = float((gradient.cpu().double() - expected).norm() / expected.norm())
    return {"error": error if math.isfinite(error) else None}


def write_truth(problem: Problem, truth: Path) -> dict[str, Any]:
    """The images' gradient of a problem in float64, by torch.func: without the package, a step's memory at a time."""
    torch.save(baselines.functional(problem)()[0].cpu(), truth)
    return {}
