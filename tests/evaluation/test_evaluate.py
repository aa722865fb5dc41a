"""Union evaluation: its file, its fairness, and its numbers against a loop written with
torch.optim.
"""

from __future__ import annotations

import copy
import json
import shutil
import statistics
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
from evaluations import evaluated
from torch.nn import functional as F

import pdd_fast
from pdd_fast.augmentation.dsa import DSA
from pdd_fast.engines import AutogradEngine
from pdd_fast.evaluation import comparisons, schedule
from pdd_fast.networks.parameters import initial_parameters
from pdd_fast.progressive.context import RunContext
from pdd_fast.progressive.experts import stored_experts
from pdd_fast.progressive.soft_labels import soft_labels
from pdd_fast.progressive.stages import distill
from pdd_fast.progressive.union import load_union
from pdd_fast.runtime.errors import UsageError
from pdd_fast.settings import resolve
from pdd_fast.storage.evaluation import Evaluation
from pdd_fast.storage.run import Run
from pdd_fast.training.sgd import Sgd, TrainState


def finished(path: Path, **changes: Any) -> Run:
    run = Run.create(path, resolve(**(tiny.SETTINGS | changes)))
    distill(run)
    return run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return finished(tmp_path_factory.mktemp("evaluate") / "run", union_epochs=30, inner_lr=0.05)


@pytest.fixture(scope="module")
def evaluation(run: Run) -> dict[str, Any]:
    return evaluated(run)


def of(evaluation: dict[str, Any], name: str) -> dict[str, Any]:
    (result,) = [r for r in evaluation["results"] if r["name"] == name]
    return result


def test_the_file_holds_what_was_returned(run: Run, evaluation: dict[str, Any]) -> None:
    assert json.loads(run.evaluation_file.read_text()) == evaluation
    assert evaluation["stages"] == 3
    assert evaluation["steps"] == [30, 30, 30]  # 10, 20 and 30 images: one batch an epoch
    assert evaluation["protocol"]["images_per_class"] == [1, 2, 3]
    assert [r["name"] for r in evaluation["results"]] == ["pdd", "random", "last-union"]
    for result in evaluation["results"]:
        assert (result["labels"], result["network"]) == ("hard", "ConvNet")
        assert len(result["seeds"]) == len(result["accuracy"]) == 2
        columns = list(zip(*result["accuracy"], strict=True))
        assert len(columns) == 3
        assert result["mean"] == pytest.approx([statistics.fmean(c) for c in columns])
        assert result["std"] == pytest.approx([statistics.stdev(c) for c in columns])
        assert all(0 <= a <= 100 for row in result["accuracy"] for a in row)


def test_every_result_starts_from_the_same_networks_and_repeats_from_different_ones(
    evaluation: dict[str, Any],
) -> None:
    seeds = {tuple(result["seeds"]) for result in evaluation["results"]}
    assert len(seeds) == 1
    assert len(set(seeds.pop())) == 2
    assert len({tuple(row) for row in of(evaluation, "random")["accuracy"]}) == 2


def test_numbers_equal_those_of_a_loop_with_torch_optim(
    run: Run, evaluation: dict[str, Any]
) -> None:
    """The protocol as a user would write it: one optimizer through all unions, its momentum
    kept."""
    ctx, distilled = RunContext.prepare(run.settings), pdd_fast.load_distilled(run.path)
    net = pdd_fast.ConvNet(1, 10, 8, width=4, depth=1)
    dsa = pdd_fast.DSA(run.settings.augment)
    for repeat, expected in enumerate(of(evaluation, "pdd")["accuracy"]):
        pdd_fast.load_parameters(
            net, initial_parameters(net, of(evaluation, "pdd")["seeds"][repeat])
        )
        optimizer = torch.optim.SGD(net.parameters(), lr=0.0, momentum=0.9, weight_decay=5e-4)
        for stage in (1, 2, 3):
            union, lr = distilled.union(stage), float(distilled.learning_rates[stage - 1])
            draw = ctx.generator("evaluation", repeat, stage - 1)
            for step in range(30):
                order = torch.randperm(len(union.images), generator=draw)
                images = pdd_fast.augment(union.images[order], dsa.sample(len(order), 8, draw))
                optimizer.param_groups[0]["lr"] = lr if step < 15 else lr / 10
                optimizer.zero_grad()
                F.cross_entropy(net(images), union.labels[order]).backward()
                optimizer.step()
            with torch.no_grad():
                right = (net(ctx.data.test.images).argmax(1) == ctx.data.test.labels).float().mean()
            # One image in 360 may lie so near a boundary that rounding decides.
            assert 100 * float(right) == pytest.approx(expected[stage - 1], abs=0.6)


def test_intervals_are_students(evaluation: dict[str, Any]) -> None:
    for result in evaluation["results"]:
        # t of 0.975 at one degree of freedom.
        assert result["ci95"] == pytest.approx(
            [12.7062 * std / 2**0.5 for std in result["std"]], rel=1e-4
        )
    pdd = of(evaluation, "pdd")["accuracy"]
    assert [(pair["network"], pair["of"], pair["to"]) for pair in evaluation["paired"]] == [
        ("ConvNet", "pdd", "random"),
        ("ConvNet", "pdd", "last-union"),
    ]
    for pair in evaluation["paired"]:
        other = of(evaluation, pair["to"])["accuracy"]
        differences = [one[-1] - two[-1] for one, two in zip(pdd, other, strict=True)]
        assert pair["difference"] == pytest.approx(statistics.fmean(differences))
        assert pair["ci95"] == pytest.approx(
            12.7062 * statistics.stdev(differences) / 2**0.5, rel=1e-4
        )


def test_one_repeat_has_no_interval(run: Run, evaluation: dict[str, Any]) -> None:
    found = evaluated(run, repeats=1)
    assert all(result["ci95"] == [None] * 3 for result in found["results"])
    assert all(pair["ci95"] is None for pair in found["paired"])
    evaluated(run)


def test_other_networks_are_trained_as_a_loop_of_torchs_would(
    run: Run, evaluation: dict[str, Any]
) -> None:
    """ConvNet by the path of any module gives ConvNet's own numbers, up to rounding."""
    ctx = RunContext.prepare(run.settings)
    union = load_union(run.distilled_file, ctx)
    (phases,) = comparisons.InOrder(union, "hard", evaluation["steps"]).schedules(range(2))
    net = ctx.engine.net
    monkey = pytest.MonkeyPatch()
    with monkey.context() as patch:

        def same(ctx: RunContext, network: str, repeat: int) -> torch.nn.Module:
            pdd_fast.load_parameters(
                net, initial_parameters(net, ctx.seed("evaluation", repeat, "parameters"))
            )
            return net

        patch.setattr(schedule, "fresh_module", same)
        found = schedule.follow("plain ConvNet", ctx, phases, range(2))
    for row, expected in zip(found, of(evaluation, "pdd")["accuracy"], strict=True):
        assert row == pytest.approx(expected, abs=0.6)


def test_a_module_with_batch_norm_is_trained_as_on_the_flat_vector(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The same parameters; running statistics, which the flat vector's engine leaves alone, are
    those of training.
    """
    net = torch.nn.Sequential(
        torch.nn.Conv2d(1, 4, 3, padding=1),
        torch.nn.BatchNorm2d(4),
        torch.nn.ReLU(),
        torch.nn.Flatten(),
        torch.nn.Linear(4 * 64, 3),
    ).double()
    images, labels = torch.randn(12, 1, 8, 8).double(), torch.arange(12) % 3
    flat = copy.deepcopy(net)
    sgd = Sgd(AutogradEngine(flat), DSA("color_flip"), batch=5, momentum=0.9, weight_decay=5e-4)
    train_state = TrainState.start(pdd_fast.flatten_parameters(net)[None])
    sgd.run(train_state, images, labels, 0.05, 8, [torch.Generator().manual_seed(3)])
    ctx: Any = SimpleNamespace(
        synthetic_sgd=sgd,
        device=torch.device("cpu"),
        generator=lambda *_: torch.Generator().manual_seed(3),
        data=SimpleNamespace(image_size=(8, 8), test=SimpleNamespace(images=images, labels=labels)),
    )
    monkeypatch.setattr(schedule, "fresh_module", lambda *_: net)
    phase = schedule.Phase(images, labels, 0.05, 8, [8])
    (scores,) = schedule.follow("any", ctx, [phase], range(1))
    assert len(scores) == 1
    assert torch.allclose(
        pdd_fast.flatten_parameters(net), train_state.theta[0], rtol=1e-9, atol=1e-12
    )
    of_training, untouched = (dict(module.named_buffers()) for module in (net, flat))
    assert of_training["1.num_batches_tracked"] == 8
    assert untouched["1.num_batches_tracked"] == 0
    assert not untouched["1.running_mean"].any()


def test_results_are_there_for_every_network(run: Run, evaluation: dict[str, Any]) -> None:
    found = evaluated(run, networks=("mlp", "convnet"), subsets=True)
    assert [(r["network"], r["name"]) for r in found["results"]] == [
        (network, name)
        for network in ("MLP", "ConvNet")
        for name in ("pdd", "random", "last-union", "subsets")
    ]
    own = [r for r in found["results"] if r["network"] == "ConvNet"]
    assert own[:3] == evaluation["results"]
    mlp = [r for r in found["results"] if r["network"] == "MLP"]
    assert all(len(row) == 3 for r in mlp for row in r["accuracy"])
    assert mlp[0]["mean"][-1] > 30  # of ten classes
    assert len({tuple(row) for row in mlp[0]["accuracy"]}) == 2
    assert evaluated(run, networks=("mlp",), subsets=True)["results"] == mlp
    # A stage's images alone, for as many steps as the union had until then: of the first they are
    # the union.
    subsets = own[3]["accuracy"]
    assert [row[0] for row in subsets] == [row[0] for row in of(evaluation, "pdd")["accuracy"]]
    assert [row[2] for row in subsets] != [
        row[2] for row in of(evaluation, "last-union")["accuracy"]
    ]
    evaluated(run)


def test_networks_are_checked_before_any_work(run: Run) -> None:
    for networks, message in (
        (("mlp", "nope"), "got 'nope'"),
        (("mlp", "vgg11"), "at least 32 pixels per side"),
    ):
        with pytest.raises(UsageError, match=message):
            evaluated(run, networks=networks)


def test_last_union_is_trained_from_the_start_for_as_many_steps(
    run: Run, evaluation: dict[str, Any]
) -> None:
    scores = of(evaluation, "last-union")["accuracy"]
    assert all(len(row) == 3 for row in scores)
    assert scores != of(evaluation, "pdd")["accuracy"]


def test_same_numbers_again(run: Run, evaluation: dict[str, Any]) -> None:
    assert evaluated(run) == evaluation


def test_more_repeats_begin_with_the_same_ones(run: Run, evaluation: dict[str, Any]) -> None:
    more = evaluated(run, repeats=3)
    for result in more["results"]:
        assert result["accuracy"][:2] == of(evaluation, result["name"])["accuracy"]
        assert len(result["accuracy"]) == 3
    evaluated(run)  # the file is the other tests' too


def test_networks_side_by_side_reach_the_same(run: Run, evaluation: dict[str, Any]) -> None:
    """Each repeat has its own network, draws and random images, in whichever group it is; rounding
    may move an image of the 359 across a boundary.
    """
    together = Run(run.path, run.settings.changed(side_by_side=2, repeats=3))
    found, alone = (evaluated(together), evaluated(Run(run.path, run.settings.changed(repeats=3))))
    for result in found["results"]:
        assert result["seeds"] == of(alone, result["name"])["seeds"]
        for row, expected in zip(
            result["accuracy"], of(alone, result["name"])["accuracy"], strict=True
        ):
            assert row == pytest.approx(expected, abs=0.6)
    evaluated(run)


def test_random_images_are_other_ones_for_every_repeat(run: Run) -> None:
    ctx = RunContext.prepare(run.settings)
    random = comparisons.RandomReal("random", "hard", ctx, ctx.train.labels, [7, 8, 9])
    (phases,) = random.schedules(range(1, 3))
    assert [(phase.lr, phase.steps, phase.stops) for phase in phases] == [
        (0.05, 7, [7]),
        (0.05, 8, [8]),
        (0.05, 9, [9]),
    ]
    for position, repeat in enumerate((1, 2)):
        rows = ctx.random_real_rows((1, 1, 1), "random images", repeat)
        for stage, phase in enumerate(phases, start=1):
            assert phase.rows is not None
            assert torch.equal(phase.rows[position], torch.cat(rows[:stage]))
    assert not torch.equal(*phases[0].rows)


def test_one_repeat_has_no_deviation(run: Run) -> None:
    assert of(evaluated(run, repeats=1), "pdd")["std"] == [0.0, 0.0, 0.0]
    evaluated(run)


def test_against_a_set_of_one_stage(run: Run, evaluation: dict[str, Any], tmp_path: Path) -> None:
    other = finished(tmp_path / "one", stages=1)
    found = evaluated(run, against=other.path)
    assert [r["name"] for r in found["results"]] == ["pdd", "random", "last-union", "one-stage"]
    assert of(found, "pdd") == of(evaluation, "pdd")
    assert found["protocol"]["against"] == str(other.path)
    as_file = evaluated(run, against=other.distilled_file)
    assert of(as_file, "one-stage") == of(found, "one-stage")
    evaluated(run)


def test_soft_labels_are_reported_apart_from_hard_ones(run: Run, tmp_path: Path) -> None:
    soft = finished(tmp_path / "soft", labels="learned", union_epochs=30, inner_lr=0.05)
    found = evaluated(soft, against=run.path, subsets=True)
    kinds = {result["name"]: result["labels"] for result in found["results"]}
    assert kinds == {
        "pdd": "learned",
        "random": "hard",
        "random-soft": "soft",
        "last-union": "learned",
        "against": "hard",
        "subsets": "learned",
    }
    assert [pair["to"] for pair in found["paired"]] == ["random-soft", "last-union", "subsets"]
    groups = Evaluation.model_validate(found).comparable()
    assert [(title, [result.name for result in group]) for title, group in groups] == [
        ("soft labels", ["pdd", "random-soft", "last-union", "subsets"]),
        ("hard labels", ["random", "against"]),
    ]
    assert of(found, "random") == of(evaluated(run), "random")
    assert of(found, "random-soft")["accuracy"] != of(found, "random")["accuracy"]
    assert of(evaluated(run, against=soft.path), "against")["labels"] == "learned"
    shutil.rmtree(soft.experts_dir)  # a run may be given away without them
    without = evaluated(soft)
    assert [result["name"] for result in without["results"]] == ["pdd", "random", "last-union"]
    assert of(without, "pdd") == of(found, "pdd")
    evaluated(run)


def test_random_images_with_soft_labels_have_the_experts_word(tmp_path: Path) -> None:
    soft = finished(tmp_path / "soft", labels="soft", iterations=0)
    ctx, experts = RunContext.prepare(soft.settings), stored_experts(soft)
    labels = comparisons._soft(ctx, experts)
    drawn = torch.zeros(len(labels), dtype=torch.bool)
    for repeat in range(2):
        for rows in ctx.random_real_rows((1, 1, 1), "random images", repeat):
            drawn[rows] = True
            torch.testing.assert_close(
                labels[rows], soft_labels(ctx.engine, experts, ctx.train.images[rows])
            )
    assert not labels[~drawn].any()
    torch.testing.assert_close(labels[drawn].sum(1), torch.ones(int(drawn.sum())))


def test_what_cannot_be_evaluated_is_refused(run: Run, tmp_path: Path) -> None:
    unfinished = Run.create(tmp_path / "unfinished", run.settings)
    with pytest.raises(UsageError, match="holds no finished distilled set; continue it"):
        evaluated(unfinished)
    with pytest.raises(UsageError, match="repeats must be at least 1, got 0"):
        evaluated(run, repeats=0)
    with pytest.raises(UsageError, match="does not exist"):
        evaluated(run, against=tmp_path / "nowhere")
    foreign = pdd_fast.load_distilled(run.path)
    foreign.metadata["data"] = "mnist"
    foreign.save(tmp_path / "foreign.safetensors")
    with pytest.raises(
        UsageError, match=r"--against must name a run on digits .*, got .* on mnist"
    ):
        evaluated(run, against=tmp_path / "foreign.safetensors")
