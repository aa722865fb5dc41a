"""The benchmarks' baselines compute what they claim to, and what is measured, counted and concluded
is right. No timing is held to anything here. The command is tested in test_bench_command.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from cases import relative_error
from plain import unroll
from torch import Tensor

import pdd_fast
from pdd_fast import engines
from pdd_fast.augmentation.dsa import augment_adjoint
from pdd_fast.augmentation.parameters import AugmentParameters, PackedAugmentParameters
from pdd_fast.benchmarks import (
    baselines,
    evaluation,
    gradient_matching,
    implementations,
    measure,
    stage,
    training_step,
    worker,
)
from pdd_fast.benchmarks import unroll as unroll_benchmark
from pdd_fast.benchmarks.baselines import Problem
from pdd_fast.benchmarks.cases import parse
from pdd_fast.benchmarks.implementations import Implementation
from pdd_fast.benchmarks.measure import Job
from pdd_fast.benchmarks.plain_dsa import AUG_PARAMS_OF, PlainAugment, PlainSampler
from pdd_fast.benchmarks.plain_network import plain_convnet
from pdd_fast.benchmarks.plain_training import PlainTraining
from pdd_fast.evaluation.evaluate import evaluate_run
from pdd_fast.progressive.union import distilled_set
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
    """Return the gradients of plain autograd, the reference of the package's own tests."""
    theta = p.start.clone().requires_grad_()
    return by_autograd(
        p, lambda images, rate: unroll(p.net, theta, images, p.labels, rate, p.index, p.aug_params)
    )


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
    plain = PlainSampler(strategy, device, torch.float32).sample(4000, size)
    ours = strategy.sample(4000, size)
    assert (plain.operations, plain.cutout_size) == (ours.operations, ours.cutout_size)
    assert set(plain.values) == {name for names in AUG_PARAMS_OF.values() for name in names}
    for name, value in plain.values.items():
        found, expected = value.flatten().double().cpu(), getattr(ours, name).double()
        width = float(expected.max() - expected.min())
        # The ends of a range and its middle, of 4000 draws: two and five hundredths of its width
        # are many deviations.
        for statistic, off in ((Tensor.min, 0.02), (Tensor.max, 0.02), (Tensor.mean, 0.05)):
            assert abs(float(statistic(found) - statistic(expected))) <= off * width, name


def test_one_plain_draw_of_single_is_of_one_operation() -> None:
    sampler = PlainSampler(pdd_fast.DSA(STRATEGY), torch.device("cpu"), torch.float32)
    seen = {sampler.sample(2, (8, 8)).operations for _ in range(100)}
    assert seen == {(name,) for name in STRATEGY.split("_")}


EXACT = {
    "plain": lambda p: baselines.plain(p),
    "captured": lambda p: baselines.captured(p),
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
    iterate = EXACT[name](p)
    if name == "captured":  # on a GPU the third call is a replay
        iterate()
        iterate()
    for found, expected in zip(iterate(), textbook(p), strict=True):
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
    shorter.batches, shorter.aug_params = shorter.batches[:2], (shorter.aug_params or [])[:2]
    shorter.__post_init__()
    assert relative_error(iterate()[0], textbook(shorter)[0]) < 1e-9
    p.steps = 5
    assert relative_error(iterate()[0], textbook(p)[0]) < 1e-9


class PackagesSampler:
    """Draws as the package makes them, from the generator that orders the images too."""

    def __init__(
        self, generator: torch.Generator, device: torch.device, dtype: torch.dtype
    ) -> None:
        self.generator, self.device, self.dtype = generator, device, dtype
        self.made: list[AugmentParameters] = []

    def sample(self, batch: int, size: tuple[int, int]) -> PlainAugment:
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
    sampler = PackagesSampler(generator, device, torch.float64) if augment else None
    eager = Implementation("", "", options={"channels_last": channels_last})
    make, parameters = training_step.plain(eager, net, images, labels, sampler, generator)
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
        """Gradient for the convolutions' weights."""
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
    distilled_set(union, ctx).save(run.distilled_file)
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
    assert len(trajectory) == ctx.settings.transition_real_epochs + 1
    images, rate = plain.learn([trajectory, trajectory])
    before = ctx.train.images[ctx.random_real_rows(ctx.settings.ipc_by_stage, "initial images")[1]]
    assert images.shape == before.shape
    assert 1e-6 < relative_error(images, before) < 10
    assert rate != ctx.settings.inner_lr
    assert 0 <= plain.select(images, rate) <= 100


def test_one_iteration_of_a_plain_stage_is_the_packages(tmp_path: Path) -> None:
    """The gradient that its update takes, with earlier images in the batches."""
    job, case = Job(torch.device("cpu"), tmp_path), parse("stage-n3-i1-w4")
    run, ctx = stage.begin(case, job, tmp_path)
    union = stage.before_the_stage(run, ctx)
    plain = stage.PlainStage(ctx, union, [], channels_last=False)
    sampler = PackagesSampler(torch.Generator().manual_seed(3), job.device, torch.float32)
    plain.sampler = sampler  # type: ignore[assignment]
    experts = list_trajectories(run.experts_dir)
    trajectory = [experts[0].checkpoint(epoch) for epoch in range(experts[0].epochs + 1)]
    images, labels = (
        torch.cat([union.images, union.images + 0.1]),
        torch.cat([union.labels, union.labels]),
    )
    p = plain.problem([trajectory], images, labels)
    assert len(sampler.made) == len(p.batches) == 3

    learned, rate = images[20:].clone().requires_grad_(), torch.tensor(0.02, requires_grad=True)
    together = torch.cat([images[:20], learned])
    theirs = p.matching_loss(baselines.trained(p, together, rate))
    end = pdd_fast.unroll(ctx.engine.net, p.start, together, labels, rate, p.batches, sampler.made)
    ours = pdd_fast.trajectory_matching_loss(end, p.start, p.target)
    pairs = zip(
        *(torch.autograd.grad(loss, [learned, rate]) for loss in (theirs, ours)), strict=True
    )
    assert all(relative_error(found, expected) < 1e-4 for found, expected in pairs)
