"""The stages: what they make, that a run can be stopped anywhere, and that stopping leaves no trace
in the result."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from stages_support import configuration, measured
from stopping import Stopper, bytes_of, stopped_and_continued

from pdd_fast import load_distilled
from pdd_fast.networks.parameters import load_parameters
from pdd_fast.progressive import stages as progressive
from pdd_fast.progressive.context import RunContext
from pdd_fast.progressive.stages import distill
from pdd_fast.progressive.union import load_union
from pdd_fast.storage.run import Run
from pdd_fast.storage.trajectories import list_trajectories
from pdd_fast.training.sgd import TrainState, accuracies


def test_the_run_directory(finished: tuple[Run, int]) -> None:
    run, _ = finished
    assert sorted(bytes_of(run)) == [
        "distilled.safetensors",
        *(f"experts/trajectory-00{k}.safetensors" for k in (0, 1)),
        "stage-1/distilled.safetensors",
        *(
            f"stage-{s}/{name}.safetensors"
            for s in (2, 3)
            for name in ("distilled", "trajectories/trajectory-000", "trajectories/trajectory-001")
        ),
    ]
    assert not list(run.path.rglob("*.tmp"))
    assert not list(run.path.rglob("*.partial"))


def test_the_distilled_set(finished: tuple[Run, int]) -> None:
    run, _ = finished
    found = load_distilled(run.path)
    assert found.stage.tolist() == [1] * 10 + [2] * 10 + [3] * 10
    assert found.labels.tolist() == list(range(10)) * 3
    assert found.images.shape == (30, 1, 8, 8)
    assert found.images.dtype == torch.float32
    assert len(found.learning_rates) == 3
    assert found.metadata["network"]["width"] == 4
    assert found.metadata["augmentation"] == {"strategy": run.settings.augment, "mode": "single"}


def test_earlier_subsets_stay_as_they_were(finished: tuple[Run, int]) -> None:
    run, _ = finished
    last = load_distilled(run.path)
    for stage in (1, 2):
        before = load_distilled(run.stage_file(stage))
        assert torch.equal(last.images[last.stage <= stage], before.images)
        assert torch.equal(last.learning_rates[:stage], before.learning_rates)


def test_images_start_from_real_ones_and_none_is_used_twice(tmp_path: Path) -> None:
    run = Run.create(tmp_path / "run", configuration(iterations=0))
    found = distill(run)
    train = RunContext.prepare(run.settings).train
    rows = []
    for image, label in zip(found.images, found.labels, strict=True):
        same = (train.images == image).flatten(1).all(1).nonzero().flatten().tolist()
        assert len(same) == 1
        assert train.labels[same[0]] == label
        rows += same
    assert len(set(rows)) == 30


def test_the_best_images_and_rate_of_a_stage_are_kept(finished: tuple[Run, int]) -> None:
    run, _ = finished
    start = RunContext.prepare(run.settings)
    rows = start.random_real_rows(run.settings.ipc_by_stage, "initial images")
    found = load_distilled(run.path)
    for stage, group in enumerate(rows, start=1):
        measured_here = [row for row in run.metrics.read() if row["stage"] == stage]
        judged = [row for row in measured_here if "selection_accuracy" in row]
        best = max(judged, key=lambda row: (row["selection_accuracy"], row["iteration"]))[
            "iteration"
        ]
        assert torch.equal(found.subset(stage).images, start.train.images[group]) == (best == 0)
        learned = [
            row["inner_lr"] for row in measured_here if "loss" in row and row["iteration"] == best
        ]
        assert float(found.learning_rates[stage - 1]) == pytest.approx(
            learned[0] if learned else 0.02, rel=1e-6
        )


def test_judged_only_at_the_end_the_last_images_are_kept(tmp_path: Path) -> None:
    run = Run.create(tmp_path / "run", configuration(eval_every=0))
    found = distill(run)
    assert [r["iteration"] for r in run.metrics.read() if "selection_accuracy" in r] == [4, 4, 4]
    start = RunContext.prepare(run.settings)
    for stage, rows in enumerate(
        start.random_real_rows(run.settings.ipc_by_stage, "initial images"), start=1
    ):
        assert not torch.equal(found.subset(stage).images, start.train.images[rows])
    lrs = found.learning_rates.tolist()
    assert len(set(lrs)) == 3  # learned apart, each from inner_lr
    assert all(abs(lr - 0.02) < 0.005 for lr in lrs)


def test_metrics_hold_every_iteration_and_every_judgment(finished: tuple[Run, int]) -> None:
    run, _ = finished
    rows = run.metrics.read()
    losses = [(row["stage"], row["iteration"]) for row in rows if "loss" in row]
    assert losses == [(s, i) for s in (1, 2, 3) for i in (1, 2, 3, 4)]
    judged = [(row["stage"], row["iteration"]) for row in rows if "selection_accuracy" in row]
    assert judged == [(s, i) for s in (1, 2, 3) for i in (0, 2, 4)]
    for row in rows:
        if "loss" in row:
            assert row["seconds"] > 0
            assert row["memory"] > 1e6
            assert row["loss"] > 0


def test_transitions_are_chained_and_trained_on_the_union(finished: tuple[Run, int]) -> None:
    run, _ = finished
    ctx = RunContext.prepare(run.settings)
    for stage, before in ((2, run.experts_dir), (3, run.stage_trajectories_dir(2))):
        union = load_union(run.stage_file(stage - 1), ctx)
        for k, trajectory in enumerate(list_trajectories(run.stage_trajectories_dir(stage))):
            assert trajectory.epochs == run.settings.transition_real_epochs == 4
            train_state = TrainState.start(list_trajectories(before)[k].checkpoint(0)[None])
            draw = ctx.generator("transition", stage, k)
            ctx.train_on_union(
                train_state,
                union.images,
                union.labels,
                union.lrs[-1],
                run.settings.transition_epochs,
                [draw],
            )
            assert torch.equal(trajectory.checkpoint(0), train_state.theta[0])
            assert not torch.equal(trajectory.checkpoint(1), train_state.theta[0])


@pytest.mark.parametrize("together", [1, 2])
def test_selection_judges_networks_that_went_through_the_earlier_unions(
    finished: tuple[Run, int], together: int
) -> None:
    """Each of the three by itself, with its own draws, and none changed by having judged."""
    run, _ = finished
    ctx = RunContext.prepare(run.settings.changed(eval_networks=3, side_by_side=together))
    unions = [load_union(run.stage_file(stage), ctx) for stage in (1, 2, 3)]
    selection = progressive._Selection(ctx, unions[1])
    expected = []
    for j in range(3):
        train_state = ctx.initial_state("selection", [j])
        for stage, union in enumerate(unions, start=1):
            draws = [ctx.generator("selection", j, stage)]
            lr, epochs = union.lrs[-1], run.settings.eval_epochs
            ctx.train_on_union(train_state, union.images, union.labels, lr, epochs, draws)
        expected += accuracies(
            ctx.engine, train_state.theta, ctx.selection_split.images, ctx.selection_split.labels
        )
    assert len(set(expected)) > 1
    score = selection.score(unions[2])
    assert score == pytest.approx(sum(expected) / 3, abs=1e-9)
    assert selection.score(unions[2]) == score


def test_twice_gives_the_same_bytes_and_another_seed_others(
    finished: tuple[Run, int], tmp_path: Path
) -> None:
    run, _ = finished
    again = Run.create(tmp_path / "again", configuration())
    distill(again)
    assert bytes_of(again) == bytes_of(run)
    assert measured(again) == measured(run)
    other = Run.create(tmp_path / "other", configuration(seed=1))
    distill(other)
    assert bytes_of(other)["distilled.safetensors"] != bytes_of(run)["distilled.safetensors"]


@pytest.mark.parametrize("kept_every_time", [True, False], ids=["saved often", "saved at the stop"])
def test_stopped_anywhere_and_continued_gives_the_same_bytes(
    finished: tuple[Run, int], tmp_path: Path, kept_every_time: bool
) -> None:
    """Every report of progress is a place to stop: epochs, iterations, judgments, transitions."""
    run, reports = finished
    expected, expected_metrics = bytes_of(run), measured(run)
    assert reports > 30
    for limit in range(1, reports + 1, 1 if kept_every_time else 5):
        config = configuration(checkpoint_seconds=0 if kept_every_time else 1000)
        stopped = stopped_and_continued(tmp_path / f"stopped-{limit}", config, limit)
        assert bytes_of(stopped) == expected, limit
        assert measured(stopped) == expected_metrics, limit


def test_learned_labels_stopped_anywhere_and_continued_give_the_same_bytes(tmp_path: Path) -> None:
    changes = {
        "labels": "learned",
        "lr_label": 5.0,
        "stages": 2,
        "ipc": 2,
        "expert_train_epochs": 3,
        "checkpoint_seconds": 0,
    }
    whole, counter = Run.create(tmp_path / "whole", configuration(**changes)), Stopper()
    distill(whole, counter)
    for limit in range(3, counter.count + 1, 2):
        stopped = stopped_and_continued(tmp_path / f"stopped-{limit}", whole.settings, limit)
        assert bytes_of(stopped) == bytes_of(whole), limit


def test_labels_are_what_the_experts_say_and_learned_from_there_on(tmp_path: Path) -> None:
    """iterations=0 gives what learning starts from."""
    sets = {}
    for kind, iterations in (("soft", 0), ("soft", 4), ("learned", 0), ("learned", 4)):
        changes = {"labels": kind, "iterations": iterations, "lr_label": 5.0, "eval_every": 0}
        run = Run.create(tmp_path / f"{kind}-{iterations}", configuration(**changes))
        sets[kind, iterations] = distill(run)
        assert load_distilled(run.path).metadata["labels"] == kind
    ctx = RunContext.prepare(run.settings)
    rows = torch.cat(ctx.random_real_rows(run.settings.ipc_by_stage, "initial images"))
    net, said = ctx.engine.net, []
    for expert in list_trajectories(run.experts_dir):
        load_parameters(net, expert.checkpoint(expert.epochs))
        with torch.no_grad():
            said.append(net(ctx.train.images[rows]).softmax(1))
    expected = (said[0] + said[1]) / 2
    for start in (sets["soft", 0], sets["soft", 4], sets["learned", 0]):
        torch.testing.assert_close(start.labels, expected, rtol=1e-4, atol=2e-5)
    learned = sets["learned", 4]
    for stage in (1, 2, 3):
        own = learned.stage == stage
        assert float((learned.labels - expected)[own].abs().max()) > 1e-4
    torch.testing.assert_close(learned.labels.sum(1), torch.ones(30))
    # They are what networks are trained on: the images of stage 2 know the labels of stage 1.
    assert not torch.equal(learned.subset(2).images, sets["soft", 4].subset(2).images)


def test_networks_side_by_side_stopped_anywhere_and_continued_give_the_same_bytes(
    tmp_path: Path,
) -> None:
    """Four networks in groups of three and one; experts, transitions and selection alike."""
    changes = {
        "num_experts": 4,
        "eval_networks": 4,
        "side_by_side": 3,
        "stages": 2,
        "ipc": 2,
        "expert_train_epochs": 3,
        "iterations": 1,
        "eval_every": 0,
        "eval_epochs": 1,
        "transition_epochs": 1,
        "checkpoint_seconds": 0,
    }
    whole, counter = Run.create(tmp_path / "whole", configuration(**changes)), Stopper()
    distill(whole, counter)
    expected, expected_metrics = bytes_of(whole), measured(whole)
    assert len(list_trajectories(whole.stage_trajectories_dir(2))) == 4
    assert counter.count > 20
    for limit in range(1, counter.count + 1):
        stopped = stopped_and_continued(
            tmp_path / f"stopped-{limit}", configuration(**changes), limit
        )
        assert bytes_of(stopped) == expected, limit
        assert measured(stopped) == expected_metrics, limit


def test_a_run_that_drops_what_is_learned_stopped_anywhere_and_continued_gives_the_same_bytes(
    tmp_path: Path,
) -> None:
    """Three networks in groups of two and one: stopped between starts, while they are asked, and in
    real epochs.
    """
    changes = {
        "filter": "learned",
        "num_experts": 3,
        "side_by_side": 2,
        "transition_epochs": 20,
        "inner_lr": 0.05,
        "iterations": 1,
        "eval_every": 0,
        "eval_epochs": 1,
        "expert_train_epochs": 2,
        "max_start_epoch": 0,
    }
    whole, counter = Run.create(tmp_path / "whole", configuration(**changes)), Stopper()
    distill(whole, counter)
    expected, expected_metrics = bytes_of(whole), measured(whole)
    assert {"stage-2/learned.safetensors", "stage-3/learned.safetensors"} < set(expected)
    assert counter.tasks == [
        "experts",
        "stage 1/3",
        *(
            name
            for s in (2, 3)
            for name in (
                f"start networks of stage {s}/3",
                "learned examples",
                f"transition to stage {s}/3",
                f"stage {s}/3",
            )
        ),
    ]
    for kept_every_time in (True, False):
        for limit in range(1, counter.count + 1, 1 if kept_every_time else 7):
            config = configuration(**changes, checkpoint_seconds=0 if kept_every_time else 1000)
            stopped = stopped_and_continued(
                tmp_path / f"stopped-{limit}-{kept_every_time}", config, limit
            )
            assert bytes_of(stopped) == expected, limit
            assert measured(stopped) == expected_metrics, limit
            assert not list(stopped.path.rglob("*.partial"))
