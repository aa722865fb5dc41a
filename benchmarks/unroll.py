"""Measure one meta-gradient of the matching loss with respect to images and learning rate."""

from __future__ import annotations

import gc
from typing import Any

import torch

import pdd_fast
from pdd_fast import engines
from pdd_fast.augmentation.parameters import PackedAugmentParameters
from pdd_fast.benchmarks import baselines, measure
from pdd_fast.benchmarks.baselines import Gradients, Iteration, Problem
from pdd_fast.benchmarks.cases import Case
from pdd_fast.benchmarks.implementations import Implementation
from pdd_fast.benchmarks.measure import Job
from pdd_fast.methods.mtt.inputs import MatchingInputs
from pdd_fast.methods.mtt.settings import MatchingSettings
from pdd_fast.methods.mtt.step import MatchingState, MatchingStep

_TRUTH = "truth.pt"  # in the case's scratch folder


def unrolled(problem: Problem, **options: Any) -> Iteration:
    """Compute the gradients with the package's public differentiable unroll.

    With ``engine="autograd"`` the network is a module that the package does not know.
    """
    net = problem.net if options.get("engine") == "autograd" else problem.own
    assert net is not None

    def iterate() -> Gradients:
        images, rate = (
            problem.images.detach().requires_grad_(),
            problem.lr.detach().requires_grad_(),
        )
        batches, aug_params = (
            problem.batches[: problem.steps],
            problem.aug_params and problem.aug_params[: problem.steps],
        )
        end = pdd_fast.unroll(
            net, problem.start, images, problem.labels, rate, batches, aug_params, **options
        )
        loss = pdd_fast.trajectory_matching_loss(end, problem.start, problem.target)
        images_grad, rate_grad = torch.autograd.grad(loss, [images, rate])
        return images_grad, rate_grad

    return iterate


def matching(
    problem: Problem,
    *,
    graph: bool,
    precision: str,
    memory: str = "recompute",
    convolution: str = "auto",
) -> Iteration:
    """Compute the gradients with the package's whole iteration.

    Its inputs come from the CPU every time, as in a run; the baselines' inputs are on the device.
    With momentum 0 and a momentum buffer of zeros, the buffers after an iteration are the
    gradients.
    """
    assert problem.own is not None
    engine = engines.choose(problem.own, precision=precision, convolution=convolution)
    state = MatchingState.start(problem.images, float(problem.lr))
    start, target = problem.start.cpu(), problem.target.cpu()

    def prepared(steps: int) -> tuple[MatchingStep, MatchingInputs]:
        aug_params = (
            PackedAugmentParameters.of(problem.aug_params[:steps]) if problem.aug_params else None
        )
        batches = torch.stack(problem.batches[:steps])
        settings = MatchingSettings(
            steps=steps,
            batch=batches.shape[1],
            memory=memory,
            graph=graph,
            operations=len(aug_params.operations) if aug_params else 0,
            cutout=aug_params.cutout_size if aug_params else (0, 0),
        )
        step = MatchingStep(engine, problem.labels, problem.images[:0], settings)
        return step, MatchingInputs(start, target, batches, aug_params)

    made = {problem.steps: prepared(problem.steps)}

    def iterate() -> Gradients:
        if problem.steps not in made:  # during the warm-up
            made[problem.steps] = prepared(problem.steps)
        step, inputs = made[problem.steps]
        found = step(state, inputs).state
        return found.images_momentum_buffer, found.lr_momentum_buffer

    return iterate


def prepared(implementation: Implementation, problem: Problem) -> Iteration:
    """Return an iteration on ``problem``, moved to the memory format and precision it needs."""
    options = implementation.options
    if "function" in options:
        problem.channels_last = options["channels_last"]
        problem.autocast = torch.bfloat16 if implementation.precision == "bfloat16" else None
        return baselines.FUNCTIONS[options["function"]](problem)
    if "graph" in options:
        return matching(problem, precision=implementation.precision, **options)
    return unrolled(problem, precision=implementation.precision, **options)


def warm_up(problem: Problem, iterate: Iteration, keeps: bool = False) -> None:
    """Run until libraries have chosen kernels, compilers have compiled and graphs are captured.

    On a CPU two steps complete all of this. If activations are saved, a full iteration is needed:
    the first one maps the memory for every step's activations, and all later ones use it.
    """
    if problem.images.is_cuda:
        iterate()
        iterate()
        return
    if keeps:
        iterate()
        return
    steps, problem.steps = problem.steps, min(2, problem.steps)
    iterate()
    problem.steps = steps


def problem_of(case: Case, device: torch.device, dtype: torch.dtype) -> Problem:
    """Return the problem of a case."""
    return Problem.draw(
        case.batch, case.steps, case.size, case.width, case.depth, device, dtype, case.augment
    )


def write_truth(case: Case, job: Job) -> dict[str, Any]:
    """Save the float64 gradients for comparison.

    torch.func computes them, independently of the package and with the memory of one step at a
    time.
    """
    found = baselines.functional(problem_of(case, job.device, torch.float64))()
    torch.save([gradient.cpu() for gradient in found], job.scratch / _TRUTH)
    return {"by": "torch.func in float64"}


def errors(found: Gradients, truth: Gradients) -> dict[str, float | None]:
    """Return both gradients' relative errors, and the cosine similarity of the images' gradient.

    A value that is not finite becomes None.
    """
    return measure.image_errors(found[0], truth[0]) | {
        "rate": measure.relative_error(found[1], truth[1])
    }


def measured(case: Case, implementation: Implementation, job: Job) -> dict[str, Any]:
    """Measure one implementation."""
    measure.set_precision(implementation.precision)
    problem = problem_of(case, job.device, torch.float32)
    if implementation.options.get("function") in ("functional", "compiled"):
        measure.load_lazily_loaded()
    memory = measure.Memory(job.device)
    iterate = prepared(implementation, problem)
    warm_up(problem, iterate, keeps=implementation.options.get("memory") == "cache")
    gc.collect()
    memory.forget()
    results: list[Gradients] = []

    def once() -> None:
        results[:] = [iterate()]

    taken = measure.repeated(once, job.device)
    bytes_taken = memory.found(
        holds_graph=job.device.type == "cuda" and _holds_graph(implementation)
    )
    truth = job.scratch / _TRUTH
    found = {"error": errors(results[0], tuple(torch.load(truth)))} if truth.exists() else {}
    return measure.sample({"iteration": taken}, bytes_taken, **found)


def _holds_graph(implementation: Implementation) -> bool:
    """Return whether a CUDA graph holds the memory that an implementation works in."""
    options = implementation.options
    return (
        implementation.compiles
        or bool(options.get("graph"))
        or options.get("function") == "captured"
    )
