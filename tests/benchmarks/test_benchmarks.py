"""The benchmarks' baselines compute what they claim to, and what is measured, counted and concluded
is right. No timing is held to anything here. The command is tested in test_bench_command.py.
"""

from __future__ import annotations

import json
import os
import re
import sys
import warnings
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import relative_error
from plain import unroll
from torch import Tensor

import pdd_fast
from pdd_fast import engines
from pdd_fast.augmentation.dsa import AugmentParameters, PackedAugmentParameters, augment_adjoint
from pdd_fast.benchmarks import (
    baselines,
    dsa,
    evaluation,
    gradient_matching,
    implementations,
    machine,
    measure,
    processes,
    results,
    roofline,
    roofline_counts,
    stage,
    training_step,
    worker,
)
from pdd_fast.benchmarks import unroll as unroll_benchmark
from pdd_fast.benchmarks.baselines import Problem
from pdd_fast.benchmarks.cases import parse
from pdd_fast.benchmarks.implementations import Implementation
from pdd_fast.benchmarks.measure import Job
from pdd_fast.benchmarks.plain_dsa import DRAWS_OF, PlainAugment, PlainDraws
from pdd_fast.benchmarks.plain_network import plain_convnet
from pdd_fast.benchmarks.plain_training import PlainTraining
from pdd_fast.benchmarks.processes import Outcome
from pdd_fast.evaluation.evaluate import evaluate_run
from pdd_fast.ops._native import MissingKernelsWarning
from pdd_fast.storage.trajectories import list_trajectories

STRATEGY = "color_crop_cutout_flip_scale_rotate"


def problem(device: torch.device, **changes: Any) -> Problem:
    """Six images, five steps; a rate at which what is left out of an approximation shows."""
    found = Problem.draw(6, 5, 8, 5, 2, device, torch.float64, **changes)
    found.lr = found.lr * 20
    return found


def by_autograd(p: Any, end: Any) -> tuple[Tensor, Tensor]:
    """Gradients of the matching loss at ``end(images, rate)``."""
    images, rate = p.images.clone().requires_grad_(), p.lr.clone().requires_grad_()
    images_grad, rate_grad = torch.autograd.grad(p.matching_loss(end(images, rate)), [images, rate])
    return images_grad, rate_grad


def textbook(p: Any) -> tuple[Tensor, Tensor]:
    """What the package's own tests are held to."""
    theta = p.start.clone().requires_grad_()
    return by_autograd(
        p, lambda images, rate: unroll(p.net, theta, images, p.labels, rate, p.index, p.draws)
    )


@pytest.fixture(autouse=True)
def _flags_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    """A benchmark sets torch's flags for its whole process, which here is that of all tests."""
    for module in (measure, roofline):
        monkeypatch.setattr(module, "set_precision", lambda name: None)


@pytest.fixture
def _in_haste(monkeypatch: pytest.MonkeyPatch) -> None:
    repeated = partial(measure.repeated, budget=0.0)
    few = partial(measure.seconds_per_call, at_least=1e-4)
    monkeypatch.setattr(measure, "repeated", lambda call, device, **more: repeated(call, device))
    monkeypatch.setattr(
        measure, "seconds_per_call", lambda call, device, at_least=0.0: few(call, device)
    )
    monkeypatch.setattr(roofline, "AT_LEAST", 1e-4)


# ---- the baselines ----


@pytest.mark.parametrize("operation", ["color", "crop", "cutout", "flip", "scale", "rotate", "all"])
def test_plain_dsa_is_the_packages(operation: str, device: torch.device) -> None:
    strategy = STRATEGY if operation == "all" else operation
    draw = pdd_fast.DSA(strategy, mode="multiple").sample(5, (9, 12))
    images, grad = (torch.randn(5, 3, 9, 12, dtype=torch.float64).to(device) for _ in range(2))
    images.requires_grad_()
    found = PlainAugment.of(draw, device, torch.float64)(images)
    assert relative_error(found, pdd_fast.augment(images.detach(), draw)) < 1e-12
    (found_adjoint,) = torch.autograd.grad(found, images, grad)
    assert relative_error(found_adjoint, augment_adjoint(grad, draw)) < 1e-12


@pytest.mark.parametrize("size", [(8, 8), (9, 12)])
def test_plain_draws_have_the_packages_ranges(size: tuple[int, int], device: torch.device) -> None:
    strategy = pdd_fast.DSA(STRATEGY, mode="multiple")
    plain = PlainDraws(strategy, device, torch.float32).draw(4000, size)
    ours = strategy.sample(4000, size)
    assert (plain.operations, plain.cutout_size) == (ours.operations, ours.cutout_size)
    assert set(plain.numbers) == {name for names in DRAWS_OF.values() for name in names}
    for name, value in plain.numbers.items():
        found, expected = value.flatten().double().cpu(), getattr(ours, name).double()
        width = float(expected.max() - expected.min())
        # The ends of a range and its middle, of 4000 draws: two and five hundredths of its width
        # are many deviations.
        for statistic, off in ((Tensor.min, 0.02), (Tensor.max, 0.02), (Tensor.mean, 0.05)):
            assert abs(float(statistic(found) - statistic(expected))) <= off * width, name


def test_one_plain_draw_of_single_is_of_one_operation() -> None:
    draws = PlainDraws(pdd_fast.DSA(STRATEGY), torch.device("cpu"), torch.float32)
    seen = {draws.draw(2, (8, 8)).operations for _ in range(100)}
    assert seen == {(name,) for name in STRATEGY.split("_")}


EXACT = {
    "plain": lambda p: baselines.plain(p),
    "checkpointed": lambda p: baselines.checkpointed(p),
    "torch.func": lambda p: baselines.functional(p),
    "unrolled": lambda p: unroll_benchmark.unrolled(p),
    "unrolled, autograd, cache": lambda p: unroll_benchmark.unrolled(
        p, engine="autograd", memory="cache"
    ),
    "ours": lambda p: unroll_benchmark.matching(p, graph=False, precision="float32"),
    "ours, cache": lambda p: unroll_benchmark.matching(
        p, graph=False, precision="float32", memory="cache"
    ),
}


@pytest.mark.parametrize("name", EXACT)
@pytest.mark.parametrize("augment", [True, False], ids=["DSA", "none"])
def test_exact_implementations_give_the_gradient_of_plain_autograd(
    name: str, augment: bool, device: torch.device
) -> None:
    p = problem(device, augment=augment)
    for found, expected in zip(EXACT[name](p)(), textbook(p), strict=True):
        assert relative_error(found, expected) < 1e-9


@pytest.mark.parametrize(
    "name", ["plain", "checkpointed"]
)  # torch 2.13 has no jvp of a channels-last group norm
def test_channels_last_changes_no_value(name: str, device: torch.device) -> None:
    p = problem(device)
    p.channels_last = True
    for found, expected in zip(EXACT[name](p)(), textbook(p), strict=True):
        assert relative_error(found, expected) < 1e-9


@pytest.mark.slow
def test_the_compiled_implementation_is_exact_too(device: torch.device) -> None:
    p = problem(device)
    for found, expected in zip(baselines.functional(p, compiled=True)(), textbook(p), strict=True):
        assert relative_error(found, expected) < 1e-9


def test_frozen_weights_are_what_they_are_defined_as_and_not_the_gradient(
    device: torch.device,
) -> None:
    p = problem(device)
    path, _ = baselines.training_path(p)

    def end(images: Tensor, rate: Tensor) -> Tensor:
        theta = p.start
        for i in range(p.steps):
            held = path[i].detach().requires_grad_()
            (gradient,) = torch.autograd.grad(p.step_loss(i, held, images), held, create_graph=True)
            theta = theta - rate * gradient
        return theta

    found = baselines.frozen(p)()
    for part, defined, exact in zip(found, by_autograd(p, end), textbook(p), strict=True):
        assert relative_error(part, defined) < 1e-9
        assert relative_error(part, exact) > 1e-2


@pytest.mark.parametrize("name", ["plain", "checkpointed", "torch.func", "unrolled", "ours"])
def test_a_warm_up_takes_fewer_steps(name: str, device: torch.device) -> None:
    p, shorter = problem(device), problem(device)
    iterate = EXACT[name](p)
    p.steps = 2
    shorter.batches, shorter.draws = shorter.batches[:2], (shorter.draws or [])[:2]
    shorter.__post_init__()
    assert relative_error(iterate()[0], textbook(shorter)[0]) < 1e-9
    p.steps = 5
    assert relative_error(iterate()[0], textbook(p)[0]) < 1e-9


class PackagesDraws:
    """Draws as the package makes them, from the generator that orders the images too."""

    def __init__(
        self, generator: torch.Generator, device: torch.device, dtype: torch.dtype
    ) -> None:
        self.generator, self.device, self.dtype = generator, device, dtype
        self.made: list[AugmentParameters] = []

    def draw(self, batch: int, size: tuple[int, int]) -> PlainAugment:
        self.made.append(pdd_fast.DSA(STRATEGY).sample(batch, size, self.generator))
        return PlainAugment.of(self.made[-1], self.device, self.dtype)


def small_net(device: torch.device) -> tuple[pdd_fast.ConvNet, Tensor, Tensor]:
    torch.manual_seed(1)
    net = pdd_fast.ConvNet(3, 10, 8, 4, 2).double().to(device)
    return (
        net,
        torch.randn(6, 3, 8, 8, dtype=torch.float64).to(device),
        (torch.arange(6) % 10).to(device),
    )


@pytest.mark.parametrize("augment", [True, False], ids=["DSA", "none"])
@pytest.mark.parametrize("channels_last", [True, False], ids=["channels-last", "planar"])
def test_training_steps_of_ours_and_of_eager_pytorch_agree(
    augment: bool, channels_last: bool
) -> None:
    device = torch.device("cpu")  # where both order the images by the same generator
    net, images, labels = small_net(device)
    own, _ = implementations.implementations(parse("step-b6-w4-s8"), "cpu")[:2]
    make, ours = training_step.ours(own, net, images, labels, augment)
    make()
    net, images, labels = small_net(device)
    generator = torch.Generator().manual_seed(0)
    draws = PackagesDraws(generator, device, torch.float64) if augment else None
    eager = Implementation("", "", options={"channels_last": channels_last})
    make, parameters = training_step.plain(eager, net, images, labels, draws, generator)
    make()
    assert relative_error(parameters(), ours()) < 1e-9


def test_the_plain_network_is_the_packages_and_none_of_it() -> None:
    own = pdd_fast.ConvNet(3, 7, (16, 8), 5, 2).double()
    plain = plain_convnet(3, 7, (16, 8), 5, 2).double()
    assert [p.shape for p in plain.parameters()] == [p.shape for p in own.parameters()]
    pdd_fast.load_parameters(plain, pdd_fast.flatten_parameters(own))
    images = torch.randn(2, 3, 16, 8, dtype=torch.float64)
    assert relative_error(plain(images), own(images)) < 1e-12
    assert {type(module).__module__.partition(".")[0] for module in plain.modules()} == {"torch"}


def test_baselines_run_nothing_of_the_package(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The package's network, engines and operators refuse to work while they are at it."""

    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("a baseline ran the package")

    job = Job(torch.device("cpu"), tmp_path)
    monkeypatch.setattr(pdd_fast.ConvNet, "forward", refuse)
    monkeypatch.setattr(engines, "choose", refuse)
    monkeypatch.setattr(PackedAugmentParameters, "apply", refuse)
    monkeypatch.setattr(measure, "repeated", lambda call, device: [measure.timed(call, device)[0]])
    for name in ("unroll-b4-n2-w4-s8-dsa", "gradient-matching-b4-r3-k3-w4-s8", "step-b4-w4-s8-dsa"):
        every = implementations.implementations(parse(name), "cpu")
        with pytest.raises(AssertionError, match="a baseline ran the package"):
            worker.work(parse(name), every[0].name, job)
        for implementation in every:
            if not implementation.ours and not implementation.compiles:
                worker.work(parse(name), implementation.name, job)


def test_the_rate_of_plain_training_falls_to_a_tenth_at_half_time() -> None:
    net, images, labels = small_net(torch.device("cpu"))
    training = PlainTraining(net, None, torch.Generator().manual_seed(0), batch=4)
    rates = []
    step = training.step
    training.step = lambda x, y: (
        rates.append(training.optimizer.param_groups[0]["lr"]),
        step(x, y),
    )  # type: ignore[method-assign,assignment]
    training.run(images, labels, 0.5, 5)
    assert rates == [0.5, 0.5, 0.5, 0.05, 0.05]
    expected = 100 * float((net(images).argmax(1) == labels).double().mean())
    assert training.accuracy(images, labels, batch=4) == pytest.approx(expected)


@pytest.mark.parametrize("device_type", ["cpu", "cuda"])
def test_implementations_of_gradient_matching_give_the_gradient_of_plain_autograd(
    device_type: str, device: torch.device
) -> None:
    p = gradient_matching.Problem.draw(
        parse("gradient-matching-b4-r3-k3-w4-s8"), device, torch.float64
    )
    theta = p.theta.clone().requires_grad_()
    images = p.images.clone().requires_grad_()
    shapes = [parameter.shape for parameter in p.net.parameters()]
    names = [name for name, _ in p.net.named_parameters()]

    def gradient(x: Tensor, y: Tensor) -> Tensor:
        """Of the convolutions' weights."""
        parts = [
            part.view(s)
            for part, s in zip(theta.split([s.numel() for s in shapes]), shapes, strict=True)
        ]
        logits = torch.func.functional_call(p.net, dict(zip(names, parts, strict=True)), (x,))
        loss = torch.nn.functional.cross_entropy(logits, y)
        found = torch.autograd.grad(loss, parts, create_graph=True)
        return torch.cat([g.flatten() for g in found if g.dim() == 4])

    distances = [
        (gradient(images[k], p.labels[k]) - gradient(p.real[k], p.real_labels[k]).detach())
        .square()
        .sum()
        for k in range(3)
    ]
    (expected,) = torch.autograd.grad(torch.stack(distances).sum(), images)
    seen = 0
    for implementation in implementations.implementations(parse("gradient-matching"), device_type):
        if implementation.precision != "float32":
            continue
        run = gradient_matching.prepared(implementation, p)
        assert relative_error(run(3), expected) < 1e-9, implementation.name
        assert relative_error(run(2), expected[:2]) < 1e-9, implementation.name
        seen += 1
    assert seen >= 4


# ---- whole evaluations and stages ----


def test_a_plain_evaluation_takes_the_courses_and_steps_of_the_packages(tmp_path: Path) -> None:
    job, case = Job(torch.device("cpu"), tmp_path), parse("evaluate-w4-e3")
    run, ctx = evaluation.begin(case, job, tmp_path)
    union = evaluation.real_union(ctx, 2)
    union.distilled(ctx).save(run.distilled_file)
    ours = evaluate_run(run).model_dump()
    schedules = evaluation.schedules(ctx, union)
    assert [[phase[3] for phase in schedule] for schedule in schedules] == [
        ours["steps"],
        ours["steps"],
        [sum(ours["steps"])],
    ]
    assert [[len(phase[0]) for phase in schedule] for schedule in schedules] == [
        [20, 40],
        [20, 40],
        [40],
    ]
    assert {r["name"] for r in ours["results"]} == {"pdd", "random", "last-union"}
    found = evaluation.plain(ctx, union, channels_last=True)
    assert len(found) == 5
    assert all(0 <= accuracy <= 100 for accuracy in found)


def test_a_plain_stage_learns_images_and_rate(tmp_path: Path) -> None:
    job, case = Job(torch.device("cpu"), tmp_path), parse("stage-n3-i2-w4")
    run, ctx = stage.begin(case, job, tmp_path, convolution="direct")
    union = stage.before_the_stage(run, ctx)
    starts = [trajectory.checkpoint(0) for trajectory in list_trajectories(run.experts_dir)]
    plain = stage.PlainStage(ctx, union, starts, channels_last=False)
    trajectory = plain.trajectory(starts[0])
    assert len(trajectory) == ctx.config.transition_real_epochs + 1
    images, rate = plain.learn([trajectory, trajectory])
    before = ctx.train.images[ctx.random_real_rows(ctx.config.ipc_by_stage, "initial images")[1]]
    assert images.shape == before.shape
    assert 1e-6 < relative_error(images, before) < 10
    assert rate != ctx.config.inner_lr
    assert 0 <= plain.select(images, rate) <= 100


def test_one_iteration_of_a_plain_stage_is_the_packages(tmp_path: Path) -> None:
    """The gradient that its update takes, with earlier images in the batches."""
    job, case = Job(torch.device("cpu"), tmp_path), parse("stage-n3-i1-w4")
    run, ctx = stage.begin(case, job, tmp_path)
    union = stage.before_the_stage(run, ctx)
    plain = stage.PlainStage(ctx, union, [], channels_last=False)
    draws = PackagesDraws(torch.Generator().manual_seed(3), job.device, torch.float32)
    plain.draws = draws  # type: ignore[assignment]
    experts = list_trajectories(run.experts_dir)
    trajectory = [experts[0].checkpoint(epoch) for epoch in range(experts[0].epochs + 1)]
    images, labels = (
        torch.cat([union.images, union.images + 0.1]),
        torch.cat([union.labels, union.labels]),
    )
    p = plain.problem([trajectory], images, labels)
    assert len(draws.made) == len(p.batches) == 3

    learned, rate = images[20:].clone().requires_grad_(), torch.tensor(0.02, requires_grad=True)
    together = torch.cat([images[:20], learned])
    theirs = p.matching_loss(baselines.trained(p, together, rate))
    end = pdd_fast.unroll(ctx.engine.net, p.start, together, labels, rate, p.batches, draws.made)
    ours = pdd_fast.trajectory_matching_loss(end, p.start, p.target)
    pairs = zip(
        *(torch.autograd.grad(loss, [learned, rate]) for loss in (theirs, ours)), strict=True
    )
    assert all(relative_error(found, expected) < 1e-4 for found, expected in pairs)


# ---- measuring ----


@pytest.mark.usefixtures("_in_haste")
def test_every_implementation_of_every_kind_can_be_measured(
    device: torch.device, tmp_path: Path
) -> None:
    job = Job(device, tmp_path)
    for name in (
        "unroll-b4-n2-w4-s8-dsa",
        "gradient-matching-b4-r3-k3-w4-s8",
        "step-b4-w4-s8",
        "dsa-multiple-b4-s8",
        "evaluate-w4-e1",
        "stage-n2-i1-w4",
    ):
        case = parse(name)
        if errors := results.KINDS[case.kind].errors:
            worker.work(case, implementations.TRUTH, job)
        for implementation in implementations.implementations(case, device.type):
            if implementation.compiles:  # half a minute each
                continue
            found = worker.work(case, implementation.name, job)
            assert set(found["seconds"]) == set(results.KINDS[case.kind].parts), implementation.name
            assert all(each and min(each) > 0 for each in found["seconds"].values())
            assert found["peak_bytes"] > 0
            assert found["above_start_bytes"] >= 0
            if errors:
                assert tuple(found["error"]) == errors
                # On a GPU convolutions take TF32 unless a flag says otherwise.
                exact = (
                    0.5
                    if implementation.precision == "bfloat16"
                    else 0.05
                    if device.type == "cuda"
                    else 1e-4
                )
                assert (found["error"]["images"] < exact) == implementation.exact, (
                    implementation.name
                )
        json.dumps(found)


@pytest.mark.parametrize("device_type", ["cpu", "cuda"])
def test_the_first_implementation_of_every_precision_is_ours(device_type: str) -> None:
    for name in ("unroll", "gradient-matching", "step", "dsa", "evaluate", "stage"):
        every = implementations.implementations(parse(name), device_type)
        assert len({c.name for c in every}) == len(every) > 1
        assert every[0].ours
        for precision in {c.precision for c in every}:
            assert any(c.ours for c in every if c.precision == precision), (name, precision)


def test_errors_are_of_both_gradients() -> None:
    truth = (torch.tensor([[3.0, 4.0]]).double(), torch.tensor(2.0).double())
    found = unroll_benchmark.errors((torch.tensor([[3.0, -4.0]]), torch.tensor(2.5)), truth)
    assert found == {
        "images": pytest.approx(8 / 5),
        "cosine": pytest.approx(-7 / 25),
        "rate": pytest.approx(0.25),
    }
    lost = unroll_benchmark.errors((torch.tensor([[float("nan"), 4.0]]), torch.tensor(2.0)), truth)
    assert lost == {"images": None, "cosine": None, "rate": 0}


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self/status")
def test_memory_is_what_came_after_the_start() -> None:
    torch.ones(60_000_000)  # freed: it is no part of what comes
    memory = measure.Memory(torch.device("cpu"))
    held = torch.ones(25_000_000)
    found = memory.found()
    assert 95e6 < found["above_start_bytes"] < 200e6
    assert found["peak_bytes"] > found["above_start_bytes"] + held.numel()


def test_all_operations_are_among_what_dsa_times() -> None:
    draw = dsa.drawing(True, parse("dsa-single-b2-s8"), torch.device("cpu"))
    images = torch.randn(2, 3, 8, 8)
    assert draw()(images).shape == images.shape
    operations = {
        dsa.drawing(False, parse("dsa-flip-b2-s8"), torch.device("cpu"))().operations
        for _ in range(5)
    }  # type: ignore[attr-defined]
    assert operations == {("flip",)}


# ---- the roofline ----


def test_the_floor_counts_operations_and_bytes() -> None:
    case = parse("unroll-b10-n5-w128-s32")
    layers = roofline_counts.layers(case)
    multiplications = [32 * 32 * 3 * 128, 16 * 16 * 128 * 128, 8 * 8 * 128 * 128]
    assert [layer.operations() for layer in layers] == [10 * 2 * 9 * m for m in multiplications]
    assert [layer.results() for layer in layers] == [10 * 128 * p for p in (1024, 256, 64)]

    # By hand, in multiplications of one image: forward, input gradients and weight gradients at
    # rates of their own.
    first, rest = multiplications[0], sum(multiplications[1:])
    kept = (
        (2 * first + 3 * rest) / 1e9 + (2 * first + 3 * rest) / 2e9 + (2 * first + 3 * rest) / 4e9
    )
    again = kept + (first + rest) / 1e9 + rest / 2e9
    rates = {"forward": 1e9, "input gradient": 2e9, "weight gradient": 4e9}
    found = roofline_counts.rooflines(
        case, {"convolution": {"bfloat16": [rates] * 3}, "copy": 1e8}, "bfloat16"
    )["iteration"]
    bytes_of_one = 10.5 * 10 * 128 * (1024 + 256 + 64) * 2
    for label, seconds in (("9 F", kept), ("11 F", again)):
        assert found[label] == pytest.approx(5 * (10 * 18 * seconds + bytes_of_one / 1e8))
    assert roofline_counts.rooflines(case, {"convolution": {}, "copy": 1e8}, "float32") == {}


def test_counts_of_convolutions_have_the_names_they_should() -> None:
    for label, (_, others) in roofline_counts.COUNTS.items():
        assert f"{sum(others) if label != '11 F' else 11} F" == label
    step = roofline_counts.rooflines(
        parse("step-b10-w128-s32"),
        {"convolution": {"float32": [dict.fromkeys(roofline_counts.KINDS, 1e9)] * 3}, "copy": 1e30},
        "float32",
    )
    first, rest = 32 * 32 * 3 * 128, (16 * 16 + 8 * 8) * 128 * 128
    assert step["step"]["3 F"] == pytest.approx(10 * 18 * (2 * first + 3 * rest) / 1e9)


def test_the_floor_of_gradient_matching_counts_real_and_synthetic_images() -> None:
    case = parse("gradient-matching-b10-r4-k3-w128-s32")
    first, rest = 32 * 32 * 3 * 128, (16 * 16 + 8 * 8) * 128 * 128  # multiplications of one image
    rates = {"forward": 1e9, "input gradient": 2e9, "weight gradient": 4e9}
    synthetic = (2 * first + 3 * rest) / 1e9 + (2 * first + 3 * rest) / 2e9 + (first + rest) / 4e9
    real = (first + rest) / 1e9 + rest / 2e9 + (first + rest) / 4e9
    numbers = 128 * (1024 + 256 + 64) * 4 / 1e8  # seconds of one pass over one image
    found = roofline_counts.rooflines(
        case, {"convolution": {"float32": [rates] * 3}, "copy": 1e8}, "float32"
    )["gradient"]
    expected = 3 * (10 * (18 * synthetic + 10.5 * numbers) + 4 * (18 * real + 3.5 * numbers))
    assert found == {"7 F + 3 F": pytest.approx(expected)}
    assert roofline_counts.passes_in_words("7 F + 3 F") == "10.5 + 3.5 passes"


def test_the_floor_of_dsa_is_bytes() -> None:
    found = roofline_counts.rooflines(parse("dsa-color-b20"), {"copy": 1e9}, "float32")
    assert found["forward"]["copy"] == pytest.approx(2 * 4 * 20 * 3 * 32 * 32 / 1e9)
    assert found["forward and backward"]["copy"] == pytest.approx(2 * found["forward"]["copy"])


@pytest.mark.usefixtures("_in_haste")
def test_rates_are_measured_of_every_layer_and_kind(device: torch.device, tmp_path: Path) -> None:
    case = parse("step-b2-w4-s8")
    found = worker.work(case, implementations.FLOOR, Job(device, tmp_path))
    assert found["copy"] > 1e6
    for layers in found["convolution"].values():
        assert len(layers) == case.depth
        assert all(
            set(rates) == set(roofline_counts.KINDS) and min(rates.values()) > 1e3
            for rates in layers
        )


def test_of_several_measurements_of_the_rates_the_best_count() -> None:
    first = {"copy": 1.0, "convolution": {"float32": [{"forward": 5.0, "input gradient": 1.0}]}}
    second = {"copy": 2.0, "convolution": {"float32": [{"forward": 4.0, "input gradient": 3.0}]}}
    found = roofline_counts.best([first, second])
    assert found == {
        "copy": 2.0,
        "convolution": {"float32": [{"forward": 5.0, "input gradient": 3.0}]},
    }
    assert roofline_counts.best([{"copy": 1.0}]) == {"copy": 1.0}


# ---- one process a measurement ----

LIMITED = """
import json
import torch
from pdd_fast.benchmarks import worker, measure
measure.host.free = lambda: 200_000_000
measure.refuse_too_much()
print(json.dumps(worker.answered(lambda: {"there": torch.ones(300_000_000).sum()})))
"""
PROGRAMS = {
    "limit": LIMITED,
    "kill": "import os; os.kill(os.getpid(), 9)",
    "hang": (
        "import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', 'import "
        "time; time.sleep(60)']); "
        "time.sleep(60)"
    ),
    "wrong": "raise ValueError('what went wrong')",
    "abort": (
        "import os, sys; print('terminate called after throwing std::bad_alloc', "
        "file=sys.stderr); os.abort()"
    ),
    "silent": "print('a remark')",
}


@pytest.mark.parametrize(
    ("name", "failed", "why"),
    [
        ("limit", "out of memory", r"asked for 1.20 GB more with \d+ MB taken"),
        ("kill", "out of memory", "was killed"),
        ("abort", "out of memory", "did not say"),
        ("hang", "too slow", "took more than 1 s"),
        ("wrong", "failed", "ValueError: what went wrong"),
        ("silent", "failed", "gave no numbers"),
    ],
)
def test_what_keeps_a_implementation_from_a_result_is_said(
    name: str, failed: str, why: str
) -> None:
    if name == "limit" and not sys.platform.startswith("linux"):
        pytest.skip("only Linux says what there is")
    calls = []

    def run(implementation: str) -> dict[str, Any]:
        calls.append(implementation)
        return processes.run(
            [sys.executable, "-P", "-c", PROGRAMS[implementation]], 1 if name == "hang" else 60
        )

    outcomes = {name: Outcome()}
    assert list(processes.in_turn([name], run, 2, outcomes)) == [name, name]
    assert calls == [name]  # not tried again
    result = outcomes[name].failed
    assert result is not None
    assert result["failed"] == failed
    assert re.search(why, result["why"])
    assert outcomes[name].is_wrong == (failed == "failed")


def test_an_answer_is_the_last_line() -> None:
    program = "print('a remark'); print('{\"seconds\": 2.0}')"
    assert processes.run([sys.executable, "-c", program], 60) == {"seconds": 2.0}


def test_a_process_that_is_asked_says_what_it_cannot_do() -> None:
    def slower() -> dict[str, Any]:
        warnings.warn("there are no kernels", MissingKernelsWarning, stacklevel=1)
        return {}

    assert worker.answered(slower) == {"failed": "not available", "why": "there are no kernels"}
    found = worker.answered(lambda: {"x": torch.empty(2**62, dtype=torch.uint8)})
    assert found["failed"] == "out of memory"
    assert re.match(r"asked for 46116860\d+.\d+ GB more with ", found["why"])
    with pytest.raises(ValueError, match="what went wrong"):
        worker.answered(lambda: exec("raise ValueError('what went wrong')"))  # type: ignore[func-returns-value]


def test_a_signal_has_a_name() -> None:
    found = processes.run([sys.executable, "-c", "import os; os.kill(os.getpid(), 11)"], 60)
    assert (found["failed"], found["why"]) == ("failed", "was ended by SIGSEGV")


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has"),
            "asked for 2.00 GiB",
        ),
        (
            RuntimeError(
                "DefaultCPUAllocator: can't allocate memory: you tried to allocate 12000000 bytes."
            ),
            "12 MB",
        ),
        (RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), "did not say"),
        (RuntimeError("std::bad_alloc"), "did not say"),
        (MemoryError(), "did not say"),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), None),
    ],
)
def test_running_out_of_memory_is_told_from_other_errors(
    error: Exception, said: str | None
) -> None:
    found = measure.out_of_memory(error)
    assert found is None if said is None else said in found


# ---- results ----


def timed(*rounds: list[float], memory: int = 100, **more: Any) -> Outcome:
    return Outcome(
        [
            {"seconds": {"step": each}, "peak_bytes": memory, "above_start_bytes": memory, **more}
            for each in rounds
        ]
    )


def test_ratios_are_medians_over_rounds_and_all_iterations_make_the_spread() -> None:
    case = parse("step-b4-w4-s8")
    own, direct, eager, *_ = implementations.implementations(case, "cpu")
    outcomes = {
        own.name: timed([1.0], [2.0], [4.0], memory=20),
        direct.name: Outcome(
            failed={"failed": "failed", "why": "it did"}, samples=timed([1.0]).samples
        ),
        eager.name: timed([3.0, 4.0, 3.0], [4.0, 5.0, 4.0], [4.0, 5.0, 4.0], memory=50),
    }
    found = results.summary(case, [own, direct, eager], outcomes)["results"]
    seconds = found[eager.name]["seconds"]["step"]
    assert (seconds["median"], seconds["smallest"], seconds["largest"]) == (4.0, 3.0, 5.0)
    assert seconds["times_ours"] == 2.0
    assert seconds["over_floor"] == {}
    assert found[own.name]["seconds"]["step"]["times_ours"] == 1.0
    assert found[eager.name]["peak_bytes"] == 50
    assert found[direct.name]["failed"] == "failed"
    assert found[direct.name]["samples"]
    assert "seconds" not in found[direct.name]


def test_the_best_alternative_is_the_fastest_exact_baseline() -> None:
    case = parse("unroll-b4-n2-w4-s8")
    every = {c.name: c for c in implementations.implementations(case, "cpu")}
    names = [
        "ours, recompute, auto",
        "ours, cache, auto",
        "plain autograd",
        "checkpointed autograd",
        "frozen weights",
    ]
    chosen = [every[name] for name in names]
    seconds = dict(zip(names, (2.0, 1.0, 5.0, 4.0, 0.5), strict=True))
    outcomes = {
        name: Outcome(
            [{"seconds": {"iteration": [s]}, "peak_bytes": 9, "above_start_bytes": int(10 * s)}]
        )
        for name, s in seconds.items()
    }
    outcomes["plain autograd"] = Outcome(failed={"failed": "out of memory", "why": "asked"})
    (found,) = results.summary(case, chosen, outcomes)["alternatives"]
    assert (found["baseline"], found["seconds"]) == ("checkpointed autograd", 4.0)
    assert found["without"] == ["plain autograd"]
    assert found["ours"] == {
        "name": "ours, recompute, auto",
        "seconds": 2.0,
        "times_as_fast": 2.0,
        "share_of_memory": 0.5,
    }
    assert found["fastest of ours"]["name"] == "ours, cache, auto"
    assert found["fastest of ours"]["times_as_fast"] == 4.0


def test_ours_of_the_same_precision_is_compared_with() -> None:
    case = parse("step-b4-w4-s8")
    every = implementations.implementations(case, "cuda")
    outcomes = {c.name: timed([1.0 if c.precision == "float32" else 0.5]) for c in every}
    found = results.summary(case, every, outcomes)
    assert {r["seconds"]["step"]["times_ours"] for r in found["results"].values()} == {1.0}
    assert [a["precision"] for a in found["alternatives"]] == ["float32", "tf32"]


def test_over_the_floor_is_over_the_sum() -> None:
    case = parse("step-b10-w8-s8")
    own = implementations.implementations(case, "cpu")[0]
    rates = {
        "copy": 1e9,
        "convolution": {"float32": [dict.fromkeys(roofline_counts.KINDS, 1e9)] * case.depth},
    }
    bound = roofline_counts.rooflines(case, rates, "float32")["step"]["3 F"]
    outcomes = {implementations.FLOOR: Outcome([rates]), own.name: timed([3 * bound])}
    found = results.summary(case, [own], outcomes)
    assert found["results"][own.name]["seconds"]["step"]["over_floor"] == {"3 F": pytest.approx(3)}
    assert found["roofline"]["rates"] == rates


def test_rounds_go_through_all_implementations_in_turn() -> None:
    calls: list[str] = []

    def run(name: str) -> dict[str, Any]:
        calls.append(name)
        return {"n": len(calls)}

    outcomes = {"a": Outcome(), "b": Outcome()}
    list(processes.in_turn(["a", "b"], run, 2, outcomes))
    assert calls == ["a", "b", "a", "b"]
    assert [sample["n"] for sample in outcomes["b"].samples] == [2, 4]


# ---- the machine ----


def test_the_commit_is_given_found_or_unknown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PDD_FAST_COMMIT", "abc123")
    assert machine.commit() == "abc123"
    monkeypatch.delenv("PDD_FAST_COMMIT")
    inside = tmp_path / "copy"
    inside.mkdir()
    monkeypatch.setattr(machine, "ROOT", inside)
    monkeypatch.setattr(machine, "installed_from", dict)
    assert machine.commit() == "unknown"
    if machine.said("git", "init", str(tmp_path)):  # of another repository
        assert machine.commit() == "unknown"
        who = ["-c", "user.name=a", "-c", "user.email=a@b"]
        machine.said("git", "-C", str(tmp_path), *who, "commit", "--allow-empty", "-m", "first")
        origin = {"url": tmp_path.as_uri()}
        monkeypatch.setattr(machine, "installed_from", lambda: origin)
        assert re.fullmatch(
            r"[0-9a-f]{7,} \(the folder that was installed from, now\)", machine.commit()
        )
    monkeypatch.setattr(
        machine, "installed_from", lambda: {"url": "x", "vcs_info": {"commit_id": "def456"}}
    )
    assert machine.commit() == "def456"


def test_a_machine_is_described_without_being_asked_for_more() -> None:
    found = machine.ask(with_gpu=False, threads=3)
    assert {"cpu", "cores", "memory", "torch", "python", "pdd_fast", "commit"} <= found.keys()
    assert found["threads"] == 3
    assert found["memory"] > 1e8
    assert os.cpu_count() == found["cores"]


def test_a_case_can_be_changed_and_named_again() -> None:
    case = parse("unroll-b4-n2-w4-s8")
    assert replace(case, steps=7).name == "unroll-b4-n7-w4-s8"
