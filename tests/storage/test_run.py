"""Run directories: made once, opened again, kept from two processes at a time, and left whole by a
kill.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from evaluations import complete
from hypothesis import given
from hypothesis import strategies as st

from pdd_fast import __version__
from pdd_fast._version import commit
from pdd_fast.runtime import locks
from pdd_fast.runtime.errors import UsageError
from pdd_fast.settings import resolve
from pdd_fast.storage.run import Metrics, Run, default_run_dir

CONFIG = resolve(stages=2, ipc=4, seed=11)


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run.create(tmp_path / "run", CONFIG)


# ---- create and open ----


def test_a_run_is_made_with_its_configuration_and_opened_again(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "run"
    made = Run.create(str(path), CONFIG)
    assert made.settings == CONFIG
    assert Run.open(str(path)).settings == CONFIG
    stored = json.loads((path / "config.json").read_text())
    assert stored["settings"] == CONFIG.to_dict()
    assert stored["versions"]["pdd_fast"] == __version__
    assert stored["versions"]["torch"] == torch.__version__
    assert stored["versions"]["commit"] == commit()


def test_an_empty_folder_becomes_a_run(tmp_path: Path) -> None:
    assert Run.create(tmp_path, CONFIG).path == tmp_path
    assert Run.open(tmp_path).settings == CONFIG


def test_a_run_is_not_overwritten(run: Run) -> None:
    before = (run.path / "config.json").read_bytes()
    with pytest.raises(
        UsageError, match="/run exists; continue it with --resume or choose another --run-dir"
    ):
        Run.create(run.path, resolve(seed=12))
    assert (run.path / "config.json").read_bytes() == before


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_what_is_there_and_is_no_run_is_left_alone(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "thesis"
    if kind == "file":
        path.write_text("mine")
    else:
        path.mkdir()
        (path / "chapter").write_text("mine")
    with pytest.raises(
        UsageError, match="/thesis exists and is not a run directory; choose another --run-dir"
    ):
        Run.create(path, CONFIG)
    assert (path if kind == "file" else path / "chapter").read_text() == "mine"


@pytest.mark.parametrize("make", [True, False], ids=["empty", "missing"])
def test_a_folder_without_a_configuration_is_no_run(tmp_path: Path, make: bool) -> None:
    if make:
        (tmp_path / "x").mkdir()
    with pytest.raises(UsageError, match=r"/x is not a run directory: it holds no config\.json"):
        Run.open(tmp_path / "x")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "cannot be read as JSON"),
        ('{"config": {', "cannot be read as JSON"),
        ("[]", "does not hold a run's settings"),
        ('{"config": 3}', "does not hold a run's settings"),
        ('{"settings": 3}', "does not hold a run's settings"),
        ('{"settings": {"stages": 0}}', ": stages must be at least 1, got 0"),
        ('{"settings": {"stage": 2}}', ": unknown setting 'stage'; did you mean 'stages'?"),
        (
            '{"settings": {"method": {"name": "idc", "lr_lr": 2}}}',
            ": lr_lr must be left out where method is idc, got 2; it is a setting of mtt",
        ),
        ('{"config": {"stages": 0}}', ": stages must be at least 1, got 0"),
        ('{"config": {"stage": 2}}', ": unknown setting 'stage'; did you mean 'stages'?"),
    ],
)
def test_a_configuration_that_cannot_be_used_is_named(run: Run, text: str, message: str) -> None:
    (run.path / "config.json").write_text(text)
    with pytest.raises(UsageError, match=rf"/run/config\.json ?{message}"):
        Run.open(run.path)


@pytest.mark.parametrize(
    ("dataset", "name"),
    [
        ("digits", "digits-ipc4-stages2-seed11"),
        ("imagefolder:/data/my birds/", "imagefolder-data-my-birds-ipc4-stages2-seed11"),
        ("imagefolder:../x", "imagefolder-x-ipc4-stages2-seed11"),
    ],
)
def test_the_default_directory_says_what_the_run_is(dataset: str, name: str) -> None:
    settings = resolve(dataset=dataset, stages=2, ipc=4, seed=11)
    assert default_run_dir(settings) == Path("runs") / name
    uneven = settings.changed(stage_ipc="3,1")
    assert default_run_dir(uneven) == Path("runs") / name.replace("stages2", "stages3-1")
    soft = settings.changed(labels="soft")
    assert default_run_dir(soft) == Path("runs") / name.replace("ipc4", "ipc4-soft-labels")
    other = resolve(dataset=dataset, stages=2, ipc=4, seed=11, method="idc")
    assert default_run_dir(other) == Path("runs") / name.replace("ipc4", "ipc4-idc")


def test_the_places_are_those_that_are_documented(run: Run) -> None:
    places = [
        run.experts_dir,
        run.stage_dir(1),
        run.stage_trajectories_dir(2),
        run.stage_file(2),
        run.distilled_file,
        run.metrics_file,
        run.evaluation_file,
        run.images_file,
        run.accuracy_file,
    ]
    assert [str(place.relative_to(run.path)) for place in places] == [
        "experts",
        "stage-1",
        "stage-2/trajectories",
        "stage-2/distilled.safetensors",
        "distilled.safetensors",
        "metrics.jsonl",
        "evaluation.json",
        "images.png",
        "accuracy.png",
    ]


# ---- one process at a time ----

HOLD = """
import sys
from pdd_fast.storage.run import Run
with Run.open(sys.argv[1]).lock():
    print("locked", flush=True)
    sys.stdin.read()
"""


@pytest.mark.skipif(locks.fcntl is None, reason="runs are locked on POSIX systems only")
def test_a_run_is_kept_from_two_processes_until_the_first_is_gone_however_it_went(run: Run) -> None:
    other = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(run.path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert other.stdout is not None
        assert other.stdout.readline() == "locked\n"
        with pytest.raises(UsageError, match="/run is in use by another process"), run.lock():
            pass
    finally:
        other.kill()
        other.communicate()
    with run.lock():
        assert run.path.exists()


@pytest.mark.skipif(locks.fcntl is None, reason="runs are locked on POSIX systems only")
def test_a_lock_ends_with_its_block(run: Run) -> None:
    with pytest.raises(KeyError), run.lock():
        raise KeyError
    with run.lock(), pytest.raises(UsageError, match="in use"), Run.open(run.path).lock():
        pass
    with run.lock():
        pass
    assert Run.open(run.path).settings == CONFIG  # the lock's file is no obstacle


def test_runs_work_unlocked_where_the_system_has_no_locks(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(locks, "fcntl", None)
    with run.lock(), run.lock():
        run.metrics.append(stage=1)
    assert run.metrics.read() == [{"stage": 1}]


# ---- metrics ----

ROW = st.dictionaries(
    st.text(max_size=5),
    st.none() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
)


def test_metrics_are_lines_of_json_in_the_order_of_appending(run: Run) -> None:
    assert run.metrics.read() == []
    run.metrics.append(stage=1, iteration=1, loss=0.5)
    run.metrics.append(stage=1, iteration=2, loss=0.25)
    lines = run.metrics_file.read_text().splitlines()
    assert [json.loads(line)["loss"] for line in lines] == [0.5, 0.25]
    assert Run.open(run.path).metrics.read()[1] == {"stage": 1, "iteration": 2, "loss": 0.25}


@given(
    st.lists(
        ROW.map(lambda row: {f"_{key}": value for key, value in row.items()}),
        min_size=1,
        max_size=4,
    ),
    st.data(),
)
def test_a_kill_in_the_middle_of_a_line_costs_that_line_alone(
    rows: list[dict[str, object]], data: st.DataObject
) -> None:
    with TemporaryDirectory() as folder:
        path = Path(folder) / "metrics.jsonl"
        metrics = Metrics(path)
        for row in rows:
            metrics.append(**row)
        whole = path.read_bytes()
        torn = whole[: data.draw(st.integers(0, len(whole)))]
        path.write_bytes(torn)
        found = metrics.read()
        assert found == rows[: len(found)]
        assert len(found) - torn.count(b"\n") in (
            0,
            1,
        )  # 1: the last line lacks nothing but its end
        metrics.append(after="the kill")
        assert metrics.read() == [*found, {"after": "the kill"}]


def fill(run: Run) -> list[dict[str, float]]:
    rows: list[dict[str, float]] = []
    for stage in (1, 2):
        for iteration in (1, 2, 3):
            rows.append({"stage": stage, "iteration": iteration, "loss": 10 * stage + iteration})
            rows.append({"stage": stage, "iteration": iteration, "selection_accuracy": 50})
    for row in rows:
        run.metrics.append(**row)
    return rows


@pytest.mark.parametrize(
    ("stage", "iteration", "judged", "kept"),
    [(1, 0, -1, 0), (1, 2, 2, 4), (1, 2, 1, 3), (2, 1, 1, 8), (2, 1, 0, 7), (2, 9, 9, 12)],
)
def test_what_a_continued_run_measures_again_is_dropped(
    run: Run, stage: int, iteration: int, judged: int, kept: int
) -> None:
    rows = fill(run)
    run.truncate_metrics(stage, iteration, judged)
    assert run.metrics.read() == rows[:kept]


def test_dropping_mends_a_torn_end_and_needs_no_file(run: Run) -> None:
    run.truncate_metrics(1, 5, 5)
    assert not run.metrics_file.exists()
    rows = fill(run)
    with run.metrics_file.open("a") as file:
        file.write('{"stage": 2, "iter')
    run.truncate_metrics(2, 3, 3)
    assert run.metrics_file.read_text() == "".join(json.dumps(row) + "\n" for row in rows)


# ---- checkpoints and the evaluation ----


def test_a_checkpoint_comes_back(run: Run) -> None:
    assert run.load_checkpoint(2) is None
    tensors = {"images": torch.randn(2, 3), "iteration": torch.tensor(7)}
    run.save_checkpoint(2, tensors, {"rate": 0.1, "judged": 5})
    assert run.load_checkpoint(1) is None
    loaded = Run.open(run.path).load_checkpoint(2)
    assert loaded is not None
    assert loaded[0].keys() == tensors.keys()
    assert all(torch.equal(loaded[0][name], tensors[name]) for name in tensors)
    assert loaded[1] == {"rate": 0.1, "judged": 5}


def test_a_damaged_checkpoint_is_named(run: Run) -> None:
    run.save_checkpoint(1, {"images": torch.randn(9)}, {})
    path = run.checkpoint_file(1)
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(UsageError, match=r"/run/stage-1/checkpoint\.safetensors is damaged"):
        run.load_checkpoint(1)


def test_an_evaluation_comes_back_and_a_missing_one_is_named(run: Run) -> None:
    with pytest.raises(UsageError, match=r"/run/evaluation\.json does not exist"):
        run.read_evaluation()
    result = {"name": "pdd", "seeds": [7], "mean": [1.5, 2.5], "std": [0.0, 0.0]}
    evaluation = complete({"protocol": {}, "stages": 2, "steps": [3, 4], "results": [result]})
    evaluation.write(run.evaluation_file)
    assert run.read_evaluation() == evaluation


def test_an_evaluation_of_before_is_read_by_its_old_names(run: Run) -> None:
    result = {"name": "pdd", "seeds": [7], "mean": [1.5], "std": [0.0]}
    content = complete(
        {"protocol": {}, "stages": 1, "steps": [3], "results": [result]}
    ).model_dump()
    protocol = content["protocol"]
    protocol["selected_on"], protocol["normalisation"] = "test", protocol.pop("normalization")
    del protocol["selection_split"], content["paired"]
    run.evaluation_file.write_text(json.dumps(content))
    found = run.read_evaluation()
    assert (found.protocol.selection_split, found.paired) == ("test", [])


@pytest.mark.parametrize("content", ["[]", "{}", '{"stages": 2, "steps": [], "protocol": {}}'])
def test_json_that_is_no_evaluation_is_refused(run: Run, content: str) -> None:
    run.evaluation_file.write_text(content)
    with pytest.raises(
        UsageError, match=r"/run/evaluation\.json is not an evaluation: it lacks .*results"
    ):
        run.read_evaluation()
