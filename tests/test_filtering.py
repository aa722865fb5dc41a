"""Which examples a stage is made from: scores as the paper defines them, bands, and a run that keeps to them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor

from pdd_fast import filtering
from pdd_fast.config import resolve
from pdd_fast.data import Split
from pdd_fast.errors import UsageError
from pdd_fast.files import read_tensors
from pdd_fast.filtering import band, forgetting_scores, initial_rows, stage_bands, times_forgotten
from pdd_fast.progressive import distill
from pdd_fast.reporting import SILENT
from pdd_fast.runs import Run
from pdd_fast.training import Loop, Students
from pdd_fast.trajectories import Trajectory, list_trajectories, write_trajectory
from pdd_fast.workbench import Workbench

CPU = torch.device("cpu")


class Told:
    """An engine whose logits are right or wrong as the parameters say: one number of them for each image."""

    def logits(self, theta: Tensor, images: Tensor) -> Tensor:
        right = theta[images.flatten().long()] > 0
        return torch.where(right[:, None], torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]]))


def told(path: Path, *rows: str) -> Trajectory:
    """A trajectory after whose epochs images are right (1) or wrong (0): a text for each epoch, a letter each image."""
    write_trajectory(path, [torch.tensor([float(letter) for letter in row]) for row in rows], {})
    return Trajectory(path)


def test_forgotten_is_what_was_right_and_is_wrong_after_the_next_epoch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(filtering, "_BATCH", 3)
    trajectory = told(tmp_path / "t", "10010", "01010", "10110", "00100")
    split = Split(torch.arange(5.0).view(5, 1, 1, 1), torch.zeros(5, dtype=torch.int64))
    # Forgotten twice, once, learned late, forgotten in the end, never learned in three epochs.
    found = times_forgotten(Told(), trajectory, split, CPU)  # type: ignore[arg-type]
    assert found.tolist() == [2, 1, 0, 1, 3]


def test_a_band_is_closed_below_and_open_above_and_the_last_has_no_end() -> None:
    scores, labels = torch.tensor([0.0, 9.99, 10.0, 19.9, 20.0, 50.0]), torch.zeros(6, dtype=torch.int64)
    found = [band(scores, labels, stage, 3, 10.0, least=1).int().tolist() for stage in (1, 2, 3)]
    assert found == [[1, 1, 0, 0, 0, 0], [0, 0, 1, 1, 0, 0], [0, 0, 0, 0, 1, 1]]
    assert band(scores, labels, 1, 1, 10.0, least=1).all()


def test_a_class_with_too_few_takes_the_nearest() -> None:
    scores = torch.tensor([0.0, 9.0, 12.0, 31.0, 25.0, 0.0, 40.0])
    labels = torch.tensor([0, 0, 0, 0, 0, 1, 1])
    assert band(scores, labels, 2, 3, 10.0, least=3).nonzero().flatten().tolist() == [1, 2, 4, 5, 6]


def configured(**changes: Any) -> Any:
    return resolve(**(tiny.SETTINGS | {"filter": "forgetting", "filter_band": 0.4, "experts": 3} | changes))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    run = Run.create(tmp_path_factory.mktemp("filtering") / "run", configured())
    distill(run)
    return run


@pytest.fixture(scope="module")
def bench(run: Run) -> Workbench:
    return Workbench.prepare(run.config)


@pytest.fixture(scope="module")
def scores(run: Run, bench: Workbench) -> Tensor:
    return forgetting_scores(bench, list_trajectories(run.experts_dir), run.forgetting_file, SILENT)


def test_scores_are_the_mean_over_all_experts_and_are_kept(run: Run, bench: Workbench, scores: Tensor) -> None:
    experts = list_trajectories(run.experts_dir)
    each = [times_forgotten(bench.engine, expert, bench.train, CPU) for expert in experts]
    torch.testing.assert_close(scores, torch.stack(each).mean(0))
    tensors, metadata = read_tensors(run.forgetting_file)
    assert (metadata["done"], tensors["total"].shape) == (3, (len(bench.train),))
    assert len(scores.unique()) > 3


def test_scores_go_on_where_they_were_interrupted(run: Run, bench: Workbench, scores: Tensor, tmp_path: Path) -> None:
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
        forgetting_scores(bench, Stopping(), tmp_path / "f", SILENT)  # type: ignore[arg-type]
    assert torch.equal(forgetting_scores(bench, Stopping(), tmp_path / "f", SILENT), scores)  # type: ignore[arg-type]
    assert seen == [0, 1, 1, 2]
    with pytest.raises(UsageError, match=r"must be for \d+ examples and .*'experts': 2"):
        forgetting_scores(bench, experts[:2], tmp_path / "f", SILENT)


def test_stages_start_from_their_bands_and_from_no_image_twice(bench: Workbench, scores: Tensor) -> None:
    bands = stage_bands(bench, scores)
    assert len({tuple(inside.tolist()) for inside in bands}) == 3
    assert all(int(torch.bincount(bench.train.labels[inside]).min()) >= 10 for inside in bands)
    rows = initial_rows(bench, bands)
    for inside, own in zip(bands, rows, strict=True):
        assert inside[own].all()
        assert bench.train.labels[own].tolist() == list(range(10))
    assert len(torch.cat(rows).unique()) == 30


def test_every_stage_matches_trajectories_on_its_own_examples(run: Run, bench: Workbench, scores: Tensor) -> None:
    """Real epochs are trained on the band alone: made again from it, the first trajectory of stage 1 has the same bits,
    and on all examples it has not."""
    kept = stage_bands(bench, scores)[0].nonzero().flatten()
    stored = list_trajectories(run.stage_trajectories_dir(1))
    assert len(stored) == 3
    assert torch.equal(stored[0].checkpoint(0), list_trajectories(run.experts_dir)[0].checkpoint(0))
    found = []
    for rows in (kept, torch.arange(len(bench.train))):
        students = Students.start(stored[0].checkpoint(0)[None])
        loop = Loop(bench.real_sgd, students, bench.train.images[rows], bench.train.labels[rows])
        loop.epoch(run.config.expert_lr, [bench.generator("stage-1", 0, 0)])
        found.append(torch.equal(students.theta[0], stored[0].checkpoint(1)))
    assert found == [True, False]
    assert stored[0].epochs == run.config.transition_real_epochs
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
