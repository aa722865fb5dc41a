"""Which examples a stage is made from: scores as the paper defines them, bands, and a run that
keeps to them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from pdd_fast.data import Split
from pdd_fast.progressive.context import RunContext
from pdd_fast.progressive.filters import (
    FILTERS,
    band,
    forgetting_scores,
    initial_rows,
    stage_bands,
    times_forgotten,
    times_learned,
    unlearned,
)
from pdd_fast.progressive.stages import distill
from pdd_fast.runtime.errors import UsageError
from pdd_fast.runtime.files import read_tensors
from pdd_fast.runtime.progress import SILENT, Reporter
from pdd_fast.settings import Settings, resolve
from pdd_fast.storage.distilled import load_distilled
from pdd_fast.storage.run import Run
from pdd_fast.storage.trajectories import Trajectory, list_trajectories, write_trajectory
from pdd_fast.training import sgd as training
from pdd_fast.training.sgd import Loop, TrainState

CPU = torch.device("cpu")


class Told:
    """An engine whose logits are right or wrong as the parameters say: one number of them for each
    image.
    """

    def logits(self, theta: Tensor, images: Tensor) -> Tensor:
        right = theta[images.flatten().long()] > 0
        return torch.where(right[:, None], torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]]))


def told(path: Path, *rows: str) -> Trajectory:
    """A trajectory after whose epochs images are right (1) or wrong (0): a text for each epoch, a
    letter each image.
    """
    write_trajectory(path, [torch.tensor([float(letter) for letter in row]) for row in rows], {})
    return Trajectory(path)


def test_forgotten_is_what_was_right_and_is_wrong_after_the_next_epoch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "_BATCH", 3)
    trajectory = told(tmp_path / "t", "10010", "01010", "10110", "00100")
    split = Split(torch.arange(5.0).view(5, 1, 1, 1), torch.zeros(5, dtype=torch.int64))
    # Forgotten twice, once, learned late, forgotten in the end, never learned in three epochs.
    found = times_forgotten(Told(), trajectory, split, CPU)  # type: ignore[arg-type]
    assert found.tolist() == [2, 1, 0, 1, 3]


def test_a_band_is_closed_below_and_open_above_and_the_last_has_no_end() -> None:
    scores, labels = (
        torch.tensor([0.0, 9.99, 10.0, 19.9, 20.0, 50.0]),
        torch.zeros(6, dtype=torch.int64),
    )
    found = [band(scores, labels, stage, 3, 10.0, least=1).int().tolist() for stage in (1, 2, 3)]
    assert found == [[1, 1, 0, 0, 0, 0], [0, 0, 1, 1, 0, 0], [0, 0, 0, 0, 1, 1]]
    assert band(scores, labels, 1, 1, 10.0, least=1).all()


def test_a_class_with_too_few_takes_the_nearest() -> None:
    scores = torch.tensor([0.0, 9.0, 12.0, 31.0, 25.0, 0.0, 40.0])
    labels = torch.tensor([0, 0, 0, 0, 0, 1, 1])
    assert band(scores, labels, 2, 3, 10.0, least=3).nonzero().flatten().tolist() == [1, 2, 4, 5, 6]


def configured(**changes: Any) -> Any:
    return resolve(
        **(tiny.SETTINGS | {"filter": "forgetting", "filter_band": 0.4, "num_experts": 3} | changes)
    )


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    run = Run.create(tmp_path_factory.mktemp("filtering") / "run", configured())
    distill(run)
    return run


@pytest.fixture(scope="module")
def ctx(run: Run) -> RunContext:
    return RunContext.prepare(run.settings)


@pytest.fixture(scope="module")
def scores(run: Run, ctx: RunContext) -> Tensor:
    return forgetting_scores(ctx, list_trajectories(run.experts_dir), run.forgetting_file, SILENT)


def test_scores_are_the_mean_over_all_experts_and_are_kept(
    run: Run, ctx: RunContext, scores: Tensor
) -> None:
    experts = list_trajectories(run.experts_dir)
    each = [times_forgotten(ctx.engine, expert, ctx.train, CPU) for expert in experts]
    torch.testing.assert_close(scores, torch.stack(each).mean(0))
    tensors, metadata = read_tensors(run.forgetting_file)
    assert (metadata["done"], tensors["total"].shape) == (3, (len(ctx.train),))
    assert len(scores.unique()) > 3


def test_scores_go_on_where_they_were_interrupted(
    run: Run, ctx: RunContext, scores: Tensor, tmp_path: Path
) -> None:
    experts, seen = list_trajectories(run.experts_dir), list[int]()

    class Stopping:
        def __getitem__(self, number: int) -> Trajectory:
            seen.append(number)
            if len(seen) == 2:
                raise KeyboardInterrupt
            return experts[number]

        def __len__(self) -> int:
            return len(experts)

    with pytest.raises(KeyboardInterrupt):
        forgetting_scores(ctx, Stopping(), tmp_path / "f", SILENT)  # type: ignore[arg-type]
    assert torch.equal(forgetting_scores(ctx, Stopping(), tmp_path / "f", SILENT), scores)  # type: ignore[arg-type]
    assert seen == [0, 1, 1, 2]
    with pytest.raises(UsageError, match=r"must be for \d+ examples and .*'experts': 2"):
        forgetting_scores(ctx, experts[:2], tmp_path / "f", SILENT)


def test_stages_start_from_their_bands_and_from_no_image_twice(
    ctx: RunContext, scores: Tensor
) -> None:
    bands = stage_bands(ctx, scores)
    assert len({tuple(inside.tolist()) for inside in bands}) == 3
    assert all(int(torch.bincount(ctx.train.labels[inside]).min()) >= 10 for inside in bands)
    rows = initial_rows(ctx, bands)
    for inside, own in zip(bands, rows, strict=True):
        assert inside[own].all()
        assert ctx.train.labels[own].tolist() == list(range(10))
    assert len(torch.cat(rows).unique()) == 30


def test_every_stage_matches_trajectories_on_its_own_examples(
    run: Run, ctx: RunContext, scores: Tensor
) -> None:
    """Real epochs are trained on the band alone: made again from it, the first trajectory of stage
    1 has the same bits, and on all examples it has not.
    """
    kept = stage_bands(ctx, scores)[0].nonzero().flatten()
    stored = list_trajectories(run.stage_trajectories_dir(1))
    assert len(stored) == 3
    assert torch.equal(stored[0].checkpoint(0), list_trajectories(run.experts_dir)[0].checkpoint(0))
    found = []
    for rows in (kept, torch.arange(len(ctx.train))):
        train_state = TrainState.start(stored[0].checkpoint(0)[None])
        loop = Loop(ctx.real_sgd, train_state, ctx.train.images[rows], ctx.train.labels[rows])
        loop.epoch(run.settings.expert_lr, [ctx.generator("stage-1", 0, 0)])
        found.append(torch.equal(train_state.theta[0], stored[0].checkpoint(1)))
    assert found == [True, False]
    assert stored[0].epochs == run.settings.transition_real_epochs
    for stage in (2, 3):
        assert len(list_trajectories(run.stage_trajectories_dir(stage))) == 3


def test_a_filtered_run_goes_on_with_the_same_bits(run: Run, tmp_path: Path) -> None:
    again = Run.create(tmp_path / "again", configured())
    distill(again)
    assert again.distilled_file.read_bytes() == run.distilled_file.read_bytes()
    for path in (again.stage_file(2), again.stage_file(3), again.distilled_file):
        path.unlink()
    distill(again)
    assert again.distilled_file.read_bytes() == run.distilled_file.read_bytes()


def test_without_a_filter_a_run_is_another(run: Run, tmp_path: Path) -> None:
    plain = Run.create(tmp_path / "plain", configured(filter="none"))
    distill(plain)
    assert not plain.forgetting_file.exists()
    assert not plain.stage_trajectories_dir(1).exists()
    assert plain.distilled_file.read_bytes() != run.distilled_file.read_bytes()


# ---- what the earlier stages have taught ----


COUNTS = st.integers(1, 4).flatmap(
    lambda networks: st.tuples(
        st.just(networks),
        st.lists(st.tuples(st.integers(0, networks), st.integers(0, 2)), min_size=1, max_size=40),
        st.integers(0, 12),
    )
)


@given(COUNTS)
def test_what_not_all_have_learned_stays_and_of_the_rest_no_more_than_a_class_lacks(
    drawn: tuple[int, list[tuple[int, int]], int],
) -> None:
    networks, examples, least = drawn
    right, labels = (torch.tensor(column) for column in zip(*examples, strict=True))
    before = right.clone()
    inside = unlearned(right, networks, labels, least)
    assert torch.equal(right, before)
    assert inside.dtype == torch.bool
    for label in range(3):
        hard = [n for n, (count, of) in enumerate(examples) if of == label and count < networks]
        easy = [n for n, (count, of) in enumerate(examples) if of == label and count == networks]
        found = [n for n in inside.nonzero().flatten().tolist() if examples[n][1] == label]
        assert found == sorted(hard + easy[: max(0, least - len(hard))])


def test_an_example_is_learned_where_all_networks_get_it_right() -> None:
    right, labels = torch.tensor([0.0, 3.0, 2.0, 3.0, 3.0, 1.0]), torch.tensor([0, 0, 0, 1, 1, 1])
    assert unlearned(right, 3, labels, least=1).int().tolist() == [1, 0, 1, 0, 0, 1]
    assert unlearned(right, 3, labels, least=2).int().tolist() == [1, 0, 1, 1, 0, 1]
    assert unlearned(right, 4, labels, least=1).all()


# Networks that learn enough from ten images for a third of the examples to be dropped after one
# stage, and two thirds after two.
LEARNED: dict[str, Any] = {
    "filter": "learned",
    "num_experts": 3,
    "transition_epochs": 20,
    "inner_lr": 0.05,
}


def learning(**changes: Any) -> Settings:
    return resolve(**(tiny.SETTINGS | LEARNED | changes))


@pytest.fixture(scope="module")
def learned(tmp_path_factory: pytest.TempPathFactory) -> Run:
    run = Run.create(tmp_path_factory.mktemp("learned") / "run", learning())
    distill(run)
    return run


def left(run: Run, ctx: RunContext, stage: int) -> list[int]:
    """The examples of a stage, plainly: those that one of the starts gets wrong, and where a class
    has fewer than ten of them the first of its others.
    """
    if stage == 1:
        return list(range(len(ctx.train)))
    starts = [
        trajectory.checkpoint(0)
        for trajectory in list_trajectories(run.stage_trajectories_dir(stage))
    ]
    assert len(starts) == run.settings.num_experts
    right = [
        ctx.engine.logits(theta, ctx.train.images).argmax(1) == ctx.train.labels for theta in starts
    ]
    wrong = [not all(column) for column in zip(*(row.tolist() for row in right), strict=True)]
    found = [row for row, is_wrong in enumerate(wrong) if is_wrong]
    for label in range(ctx.data.num_classes):
        of_class = ctx.train.rows_of(label).tolist()
        have = sum(wrong[row] for row in of_class)
        found += [row for row in of_class if not wrong[row]][: max(0, 10 - have)]
    return sorted(found)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_stage_keeps_what_a_start_of_its_trajectories_gets_wrong(
    learned: Run, ctx: RunContext, stage: int
) -> None:
    rows = left(learned, ctx, stage)
    found = FILTERS["learned"](learned, ctx, SILENT).rows(stage)
    assert found is not None
    assert found.tolist() == rows
    assert int(torch.bincount(ctx.train.labels[found]).min()) >= 10
    assert len(rows) / len(ctx.train) == pytest.approx([1, 0.57, 0.36][stage - 1], abs=0.1)
    assert learned.learned_file(stage).exists() == (stage > 1)


@pytest.mark.parametrize("stage", [2, 3])
def test_what_is_learned_is_not_in_the_real_epochs_of_a_stage(
    learned: Run, ctx: RunContext, stage: int
) -> None:
    """Made again from what is left alone, every recorded epoch has the same bits; from all examples
    the first has not.
    """
    stored = list_trajectories(learned.stage_trajectories_dir(stage))
    for k, trajectory in enumerate(stored):
        assert trajectory.epochs == learned.settings.transition_real_epochs
        for rows, same in ((left(learned, ctx, stage), True), (list(range(len(ctx.train))), False)):
            train_state = TrainState.start(trajectory.checkpoint(0)[None])
            loop = Loop(ctx.real_sgd, train_state, ctx.train.images[rows], ctx.train.labels[rows])
            for epoch in range(trajectory.epochs if same else 1):
                loop.epoch(learned.settings.expert_lr, [ctx.generator(f"stage-{stage}", k, epoch)])
                assert torch.equal(train_state.theta[0], trajectory.checkpoint(epoch + 1)) == same


def test_the_first_stage_matches_the_experts(learned: Run) -> None:
    assert not learned.stage_trajectories_dir(1).exists()


def test_no_stage_starts_from_an_image_that_is_learned_and_none_from_one_twice(
    tmp_path: Path,
) -> None:
    """With two images a class and stage, of which a stage without the filter would take a third or
    more elsewhere.
    """
    run = Run.create(tmp_path / "run", learning(ipc=6, iterations=0))
    distill(run)
    ctx, found, used = RunContext.prepare(run.settings), load_distilled(run.path), list[int]()
    for stage in (1, 2, 3):
        rows, subset = left(run, ctx, stage), found.subset(stage)
        assert torch.bincount(subset.labels).tolist() == [2] * 10
        for image in subset.images:
            (row,) = (ctx.train.images == image).flatten(1).all(1).nonzero().flatten().tolist()
            assert row in rows
            used.append(row)
    assert len(set(used)) == len(used) == 60


def test_what_is_learned_is_counted_on_from_where_it_was_interrupted(
    learned: Run, ctx: RunContext, tmp_path: Path
) -> None:
    starts, seen = list_trajectories(learned.stage_trajectories_dir(2)), list[int]()

    def start(number: int) -> Tensor:
        seen.append(number)
        if len(seen) == 2:
            raise KeyboardInterrupt
        return starts[number].checkpoint(0)

    file = tmp_path / "f"
    with pytest.raises(KeyboardInterrupt):
        times_learned(ctx, start, 3, file, SILENT)
    total = read_tensors(learned.learned_file(2))[0]["total"]
    assert torch.equal(times_learned(ctx, start, 3, file, SILENT), total)
    assert seen == [0, 1, 1, 2]

    class NoTask(Reporter):
        def task(self, name: str, total: int, unit: str, done: int = 0) -> Any:
            raise AssertionError(name)

    assert torch.equal(
        times_learned(ctx, start, 3, file, NoTask()), total
    )  # nothing is left to do or to be said
    with pytest.raises(UsageError, match=r"must be for \d+ examples and .*'experts': 2"):
        times_learned(ctx, start, 2, file, SILENT)


def test_experts_from_elsewhere_teach_the_same(learned: Run, tmp_path: Path) -> None:
    run = Run.create(tmp_path / "run", learning(experts_from=str(learned.path)))
    distill(run)
    assert not run.experts_dir.exists()
    for stage in (2, 3):
        assert run.learned_file(stage).read_bytes() == learned.learned_file(stage).read_bytes()
    assert run.distilled_file.read_bytes() == learned.distilled_file.read_bytes()


def test_what_later_stages_need_of_earlier_ones_is_in_the_run(learned: Run, tmp_path: Path) -> None:
    """The last stage made again, by a process that has not seen the others: it starts from no image
    of theirs.
    """
    again = Run.create(tmp_path / "again", learning())
    distill(again)
    for path in (
        again.learned_file(2),
        again.stage_file(3),
        again.distilled_file,
    ):  # the first from the trajectories
        path.unlink()
    distill(Run.open(again.path))
    assert again.distilled_file.read_bytes() == learned.distilled_file.read_bytes()
    assert again.learned_file(2).read_bytes() == learned.learned_file(2).read_bytes()


def test_with_one_stage_there_is_nothing_learned_yet(tmp_path: Path) -> None:
    run = Run.create(tmp_path / "run", learning(stages=1))
    distill(run)
    assert not list(run.path.rglob("learned.safetensors"))
    assert not run.stage_trajectories_dir(1).exists()
