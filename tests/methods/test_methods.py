"""Methods without trajectories: stages, resume, evaluation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from evaluations import evaluated
from stopping import Stopped, Stopper, bytes_of, stopped_and_continued
from torch import Tensor
from torch.nn import functional as F

import pdd_fast
from pdd_fast.augmentation.multi_formation import combine, decode
from pdd_fast.methods import METHODS, StageProblem
from pdd_fast.methods.class_matching import ClassMatching
from pdd_fast.progressive.context import RunContext
from pdd_fast.progressive.experts import stored_experts
from pdd_fast.progressive.problem import stage_problem
from pdd_fast.progressive.stages import distill
from pdd_fast.progressive.union import empty_union
from pdd_fast.runtime.errors import RunError, UsageError
from pdd_fast.settings import Settings, resolve
from pdd_fast.storage.run import Run

SETTINGS: dict[str, Any] = tiny.SETTINGS | {
    "width": 6,
    "depth": 2,
    "factor": 2,
    "inner_loops": 2,
    "real_batch": 7,
    "synthetic_batch": 3,
    "network_images": 30,
    "union_batch": 16,
    "lr_img": 0.01,
    "cutmix": 0.5,
}


def settings(base: str, **changes: Any) -> Settings:
    return resolve(**(tiny.of(base, SETTINGS) | changes))


def problem(base: str, stage: int = 2, **changes: Any) -> StageProblem:
    """A stage after one of real images."""
    ctx = RunContext.prepare(settings(base, **changes))
    union, groups = empty_union(ctx), ctx.random_real_rows(ctx.settings.real_by_stage, "test")
    each = ctx.settings.factor**2
    for rows in groups[: stage - 1]:
        images = combine(ctx.train.images[rows.view(-1, each).T.flatten()], ctx.settings.factor)
        union = union.extended(images, torch.arange(10, device=ctx.device), 0.1)
    rows = groups[stage - 1].view(-1, each).T
    images = combine(ctx.train.images[rows.flatten()], ctx.settings.factor)
    return stage_problem(ctx, stage, None, union, [], images, ctx.train.labels[rows[0]])


@pytest.fixture(params=["idc", "dm"])
def base(request: pytest.FixtureRequest) -> str:
    return request.param


def test_a_checkpoint_of_another_version_is_named(tmp_path: Path, base: str) -> None:
    run = Run.create(tmp_path / "run", settings(base, stages=1, iterations=3))
    with pytest.raises(Stopped):
        distill(run, Stopper(3))
    tensors, state = run.load_checkpoint(1) or ({}, {})
    del tensors["method.momentum_buffer"]
    run.save_checkpoint(1, tensors, state)
    before = run.checkpoint_file(1).read_bytes()
    with pytest.raises(
        UsageError,
        match=r"checkpoint.safetensors must hold 'momentum_buffer', got a file of another version; "
        "remove it to begin stage 1 again",
    ):
        distill(Run.open(run.path))
    assert run.checkpoint_file(1).read_bytes() == before


# ---- what the methods without trajectories have in common ----


def test_a_run_needs_no_experts_and_what_it_makes_is_decoded(tmp_path: Path, base: str) -> None:
    run = Run.create(tmp_path / "run", settings(base, stages=2, ipc=3))
    found = distill(run)
    assert not run.experts_dir.exists()
    assert not run.stage_trajectories_dir(2).exists()
    assert (len(found.images), found.factor) == (30, 2)
    pixels = found.normalization.invert(found.images)
    assert float(pixels.min()) >= -1e-5
    assert float(pixels.max()) <= 1 + 1e-5
    loaded = pdd_fast.load_distilled(run.path)
    union = loaded.union(1)
    assert union.images.shape == (80, 1, 8, 8)
    assert torch.equal(union.images, decode(loaded.union(1, raw=True).images, 2))
    assert union.labels.tolist() == loaded.union(1, raw=True).labels.tolist() * 4
    evaluation = evaluated(run)
    assert evaluation["protocol"]["images_per_class"] == [2, 3]
    assert evaluation["steps"] == [4 * 5, 4 * 8]  # 80 and 120 images that networks see, 16 a step
    rows = run.metrics.read()
    assert all(row["loss"] > 0 for row in rows if "loss" in row)


def test_stopped_anywhere_and_continued_gives_the_same_bytes(tmp_path: Path, base: str) -> None:
    config = settings(base, stages=2, ipc=2, checkpoint_seconds=0, iterations=3, start_networks=2)
    whole, counter = Run.create(tmp_path / "whole", config), Stopper()
    distill(whole, counter)
    for limit in range(1, counter.count + 1):
        stopped = stopped_and_continued(tmp_path / f"stopped-{limit}", config, limit)
        assert bytes_of(stopped) == bytes_of(whole), limit


def test_images_start_from_as_many_real_ones_as_they_hold(tmp_path: Path, base: str) -> None:
    run = Run.create(tmp_path / "run", settings(base, iterations=0))
    found, ctx = distill(run), RunContext.prepare(run.settings)
    for stage, rows in enumerate(ctx.random_real_rows((4, 4, 4), "initial images"), start=1):
        own = found.subset(stage, raw=True)
        assert own.labels.tolist() == list(range(10))
        for c in range(10):
            real = ctx.train.images[rows[4 * c : 4 * c + 4]]
            assert ctx.train.labels[rows[4 * c]] == c
            torch.testing.assert_close(own.images[c : c + 1], combine(real, 2))
    few = settings(base, ipc=200, stages=1)
    with pytest.raises(
        UsageError,
        match="ipc must be at most 31, got 200: class '8' has 125 training images, and every",
    ):
        distill(Run.create(tmp_path / "few", few))


def test_conditioning_gives_the_next_stage_other_networks_and_images_beside(
    tmp_path: Path, base: str
) -> None:
    on, off = (
        distill(
            Run.create(
                tmp_path / value, settings(base, conditioning=value, eval_every=0, stages=2, ipc=2)
            )
        )
        for value in ("on", "off")
    )
    assert torch.equal(on.subset(1).images, off.subset(1).images)
    assert not torch.equal(on.subset(2).images, off.subset(2).images)


def test_images_that_are_no_longer_finite_end_the_run_and_what_was_there_stays(base: str) -> None:
    method = METHODS[base](problem(base, lr_img=1e45))
    before = method.state()
    message = r"stage 2, iteration 1: the matching loss is .* smaller lr_img \(now 1e\+45\)"
    with pytest.raises(RunError, match=message):
        method.step()
    assert all(torch.equal(tensor, before[name]) for name, tensor in method.state().items())


def test_examples_may_be_filtered_by_forgetting(tmp_path: Path, base: str) -> None:
    run = Run.create(
        tmp_path / "run", settings(base, filter="forgetting", filter_band=1.0, stages=2, ipc=2)
    )
    distill(run)
    assert len(stored_experts(run)) == 2
    assert run.forgetting_file.exists()


def test_an_iteration_is_the_same_on_every_device(base: str, device: torch.device) -> None:
    """Draws are made on the CPU whatever the device; what differs is rounding."""
    expected, found = (METHODS[base](problem(base, device=where)) for where in ("cpu", str(device)))
    losses = [method.step()["loss"] for method in (expected, found)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    assert found.images.device.type == device.type
    torch.testing.assert_close(found.images.cpu(), expected.images, rtol=1e-3, atol=1e-3)
    again = METHODS[base](problem(base, device=str(device)))
    again.step()
    assert all(torch.equal(tensor, again.state()[name]) for name, tensor in found.state().items())


# ---- each method's own ----


def reference_batches(
    method: ClassMatching, pixels: Tensor, draw: torch.Generator
) -> tuple[list[Tensor], list[Tensor]]:
    """Real and synthetic images of every class, drawn as the method draws them, written class by
    class.
    """
    work, config, own = method.problem, method.problem.settings, method.settings
    normalized = work.normalization.apply(pixels)
    seen = torch.cat([decode(work.union.images, config.factor), decode(normalized, config.factor)])
    labels = torch.cat([torch.arange(10).repeat(4)] * work.stage)
    chosen = []
    for of, most in ((work.real.labels, own.real_batch), (labels, own.synthetic_batch)):
        rows = [(of == c).nonzero().flatten() for c in range(10)]
        chosen.append(
            [r[torch.randperm(len(r), generator=draw)[:most]] if len(r) > most else r for r in rows]
        )
    one = work.dsa.sample(10, 8, draw)
    return tuple(  # type: ignore[return-value]
        [
            pdd_fast.augment(images[rows], one[torch.full((len(rows),), c)])
            for c, rows in enumerate(groups)
        ]
        for images, groups in ((work.real.images, chosen[0]), (seen, chosen[1]))
    )


@pytest.mark.parametrize("mode", ["single", "multiple"])
@pytest.mark.parametrize("distance", ["squared", "cosine"])
def test_idc_is_its_published_loop_class_after_class(distance: str, mode: str) -> None:
    """Every class has its turn, momentum moves all images in each, by torch's optimizer and double
    backward.
    """
    work = problem(
        "idc", inner_loops=3, network_images=0, distance=distance, augment_mode=mode, lr_img=1e-3
    )
    method = METHODS["idc"](work)
    assert isinstance(method, ClassMatching)
    pixels = method.done.pixels.clone().requires_grad_()
    optimizer = torch.optim.SGD([pixels], lr=1e-3, momentum=method.settings.momentum)
    draw, net = work.generator("matching", 2, 0), work.engine.net
    pdd_fast.load_parameters(net, method.starts.parameters(0))
    parameters = [p for p in net.parameters() if p.dim() > (2 if distance == "squared" else 1)]
    losses = []
    for _ in range(3):
        state = draw.get_state()
        for c in range(10):
            draw.set_state(state)  # the same draws, from images as they are now
            real, synthetic = reference_batches(method, pixels, draw)
            found = []
            for images, graph in ((real[c], False), (synthetic[c], True)):
                loss = F.cross_entropy(net(images), torch.full((len(images),), c))
                found.append(torch.autograd.grad(loss, parameters, create_graph=graph))
            terms = []
            for target, g in zip(*found, strict=True):
                if distance == "squared":
                    terms.append((g - target).square().sum())
                else:
                    g, target = g.flatten(1), target.flatten(1)
                    terms.append(
                        (
                            1 - (g * target).sum(1) / (g.norm(dim=1) * target.norm(dim=1) + 1e-6)
                        ).sum()
                    )
            optimizer.zero_grad()
            torch.stack(terms).sum().backward()
            optimizer.step()
            losses.append(float(torch.stack(terms).detach().sum()))
    reported = method.step()["loss"]
    assert reported == pytest.approx(sum(losses) / 3, rel=1e-3)
    # Class c has had the turns after its own; those before it in the next round move it on, too.
    m, momentum_buffer = method.settings.momentum, optimizer.state[pixels]["momentum_buffer"]
    more = torch.tensor([sum(m**k for k in range(1, c + 1)) for c in range(10)]).view(-1, 1, 1, 1)
    expected = (pixels.detach() - 1e-3 * more * momentum_buffer).clamp(0, 1)
    start = method.batches.pixels(work.images)
    assert float((method.done.pixels - expected).norm()) < 1e-3 * float((expected - start).norm())
    assert float((expected - start).norm()) > 0.01


def test_the_network_is_trained_on_real_images_between_the_updates(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    method = METHODS["idc"](problem("idc", inner_loops=3, network_images=30))
    seen: list[Tensor] = []
    inner = type(method)._matched  # type: ignore[attr-defined]

    def matched(self: Any, theta: Tensor, *args: Any) -> Any:
        seen.append(theta.clone())
        return inner(self, theta, *args)

    monkeypatch.setattr(type(method), "_matched", matched)
    method.step()
    ctx = method.problem
    losses = [
        float(F.cross_entropy(ctx.engine.logits(t, ctx.train.images), ctx.train.labels))
        for t in seen
    ]
    assert losses[0] > losses[1] > losses[2]


def test_an_iteration_whose_draw_has_no_image_of_the_stage_leaves_it_where_it_is() -> None:
    """One synthetic image a class, out of 4 frozen and 4 learned ones: some classes have none to
    follow.
    """
    work = problem("idc", synthetic_batch=1, inner_loops=1, momentum=0.0)
    method = METHODS["idc"](work)
    assert isinstance(method, ClassMatching)
    start = method.done.pixels
    drawn = method.batches.drawn(start, work.generator("matching", 2, 0))[1]
    method.step()
    moved = (method.done.pixels != start).flatten(1).any(1).tolist()
    assert moved == [len(each.learned) > 0 for each in drawn]
    assert 0 < sum(moved) < 10


def test_images_of_earlier_stages_get_no_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    method, asked = METHODS["idc"](problem("idc", inner_loops=1)), list[int]()
    engine = type(method.problem.engine)
    original = engine.dual

    def dual(*args: Any, rows: Tensor | None = None, **options: Any) -> Any:
        assert rows is not None
        asked.append(len(rows))
        return original(*args, rows=rows, **options)

    monkeypatch.setattr(engine, "dual", dual)
    method.step()
    assert len(asked) == 10
    assert sum(asked) < 10 * method.settings.synthetic_batch


def test_dm_computes_in_the_precision_that_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    losses = {
        name: METHODS["dm"](problem("dm", precision=name)).step()["loss"]
        for name in ("float32", "bfloat16")
    }
    assert losses["bfloat16"] != losses["float32"]
    assert losses["bfloat16"] == pytest.approx(losses["float32"], rel=0.1)


def test_running_out_of_memory_names_what_helps(base: str, monkeypatch: pytest.MonkeyPatch) -> None:
    method = METHODS[base](problem(base))

    def full(*args: Any) -> None:
        raise MemoryError

    monkeypatch.setattr(method, "iterate", full)
    with pytest.raises(
        RunError, match=r"stage 2, iteration 1: cpu is out of memory.*lower real_batch \(now 7\)"
    ):
        method.step()


def test_dm_follows_the_means_of_features() -> None:
    work = problem("dm", lr_img=1e-3)
    method = METHODS["dm"](work)
    assert isinstance(method, ClassMatching)
    pixels, net = method.done.pixels.clone().requires_grad_(), work.engine.net
    pdd_fast.load_parameters(net, method.starts.parameters(0))
    total = pixels.new_zeros(())
    for real, synthetic in zip(
        *reference_batches(method, pixels, work.generator("matching", 2, 0)), strict=True
    ):
        features = [
            torch.flatten(torch.nn.Sequential(*net.blocks)(x), 1).mean(0) for x in (real, synthetic)
        ]
        total = total + (features[0].detach() - features[1]).square().sum()
    total.backward()
    assert method.step()["loss"] == pytest.approx(float(total.detach()), rel=1e-4)
    assert pixels.grad is not None
    expected = (pixels.detach() - 1e-3 * pixels.grad).clamp(0, 1)
    torch.testing.assert_close(method.done.pixels, expected, rtol=1e-4, atol=1e-5)
