"""Run directory: settings, results, and the state that an interrupted run continues from."""

from __future__ import annotations

import json
import os
import platform
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pdd_fast import settings as configuration
from pdd_fast._version import __version__, commit
from pdd_fast.runtime.errors import UsageError
from pdd_fast.runtime.files import read_json, read_tensors, save_tensors, write_json, write_text
from pdd_fast.runtime.locks import locked
from pdd_fast.runtime.paths import expanded, short_dataset
from pdd_fast.settings import Settings
from pdd_fast.storage.evaluation import Evaluation


def default_run_dir(settings: Settings) -> Path:
    """Return the directory of a run for which none was given."""
    return Path("runs") / default_name(settings)


def default_name(settings: Settings, stages: bool = True) -> str:
    """Return the default name of a run's folder.

    Without ``stages``, the name omits the stages and the seed, so that several runs share it.
    """
    name = re.sub(r"[^A-Za-z0-9]+", "-", settings.dataset).strip("-") + f"-ipc{settings.ipc}"
    method = settings.method.name
    name += f"-{method}" if method != configuration.default("method") else ""
    labels = settings.labels
    name += f"-{labels}-labels" if labels != configuration.default("labels") else ""
    if not stages:
        return name
    split = "-".join(map(str, settings.ipc_by_stage)) if settings.stage_ipc else settings.stages
    return f"{name}-stages{split}-seed{settings.seed}"


def _stored_settings(stored: dict[str, Any]) -> Any:
    """Return the settings in a config.json.

    They are under "config" in files from before methods had their own settings.
    """
    return stored.get("settings", stored.get("config"))


class Metrics:
    """The file metrics.jsonl, with one object per line."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def append(self, **values: Any) -> None:
        """Append ``values`` as one line."""
        line = json.dumps(values) + "\n"
        with self._path.open("a+b") as file:
            if file.tell() > 0:
                file.seek(-1, os.SEEK_END)
                if file.read(1) != b"\n":  # A kill cut off the last line.
                    line = "\n" + line
            file.write(line.encode())

    def read(self) -> list[dict[str, Any]]:
        """Return all whole lines.

        A line that was cut off when the process was killed is skipped.
        """
        rows = []
        if self._path.exists():
            for line in self._path.read_text(encoding="utf-8").splitlines():
                try:
                    row = json.loads(line)
                except ValueError:
                    continue
                if "held_out_accuracy" in row:  # the name before 0.1
                    row["selection_accuracy"] = row.pop("held_out_accuracy")
                rows.append(row)
        return rows


class Run:
    """A run directory and the settings in it."""

    def __init__(self, path: Path, settings: Settings) -> None:
        self.path, self.settings = path, settings
        self.metrics = Metrics(self.metrics_file)

    @classmethod
    def create(cls, path: str | Path, settings: Settings) -> Run:
        """Create a run directory with its config.json.

        The paths in config.json are absolute, so that the run can be opened from any working
        directory.

        Raises:
            UsageError: The path exists and is not an empty folder.
        """
        path = expanded(path)
        if (path / "config.json").exists():
            raise UsageError(
                f"{path} exists; continue it with --resume or choose another --run-dir"
            )
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise UsageError(f"{path} exists and is not a run directory; choose another --run-dir")
        path.mkdir(parents=True, exist_ok=True)
        absolute = configuration.absolute(settings)
        versions = {
            "pdd_fast": __version__,
            "commit": commit(),
            "torch": torch.__version__,
            "python": platform.python_version(),
        }
        write_json(path / "config.json", {"settings": absolute.to_dict(), "versions": versions})
        return cls(path, settings)

    @classmethod
    def open(cls, path: str | Path) -> Run:
        """Open an existing run directory.

        Raises:
            UsageError: The path is not a run directory, or its settings cannot be read.
        """
        path = expanded(path)
        if not (path / "config.json").is_file():
            raise UsageError(f"{path} is not a run directory: it holds no config.json")
        stored = read_json(path / "config.json")
        settings = _stored_settings(stored) if isinstance(stored, dict) else None
        if not isinstance(settings, dict):
            raise UsageError(f"{path / 'config.json'} does not hold a run's settings")
        try:
            return cls(path, configuration.from_dict(settings))
        except UsageError as error:
            raise UsageError(f"{path / 'config.json'}: {error}") from error

    @property
    def data(self) -> dict[str, Any]:
        """Return the identity of the data that the run was begun with.

        The keys are those of :func:`pdd_fast.data.fingerprint.identity`. For a run that did not
        record the identity, only the name of the dataset is known.
        """
        stored = read_json(self.path / "config.json")
        noted = stored.get("data")
        return (
            noted
            if isinstance(noted, dict)
            else {"data": short_dataset(_stored_settings(stored).get("dataset", ""))}
        )

    def note_data(self, identity: dict[str, Any]) -> None:
        """Write the identity of the run's data into config.json, unless it is there already."""
        stored = read_json(self.path / "config.json")
        if "data" not in stored:
            write_json(self.path / "config.json", stored | {"data": identity})

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Lock out other processes while the block runs (:mod:`pdd_fast.runtime.locks`).

        Raises:
            UsageError: Another process works in this directory.
        """
        with locked(self.path):
            yield

    # ---- places ----

    @property
    def experts_dir(self) -> Path:
        """Return the folder of the experts' trajectories."""
        return self.path / "experts"

    def stage_dir(self, stage: int) -> Path:
        """Return the folder of a stage."""
        return self.path / f"stage-{stage}"

    def stage_trajectories_dir(self, stage: int) -> Path:
        """Return the folder of the trajectories that a stage matches."""
        return self.stage_dir(stage) / "trajectories"

    def stage_file(self, stage: int) -> Path:
        """Return the file of the union of stages 1..``stage``, which a finished stage writes."""
        return self.stage_dir(stage) / "distilled.safetensors"

    def checkpoint_file(self, stage: int) -> Path:
        """Return the file of an unfinished stage's checkpoint."""
        return self.stage_dir(stage) / "checkpoint.safetensors"

    @property
    def forgetting_file(self) -> Path:
        """Return the file of the forgetting scores."""
        return self.path / "forgetting.safetensors"

    def learned_file(self, stage: int) -> Path:
        """Return the file of the counts by which a stage drops learned examples."""
        return self.stage_dir(stage) / "learned.safetensors"

    @property
    def distilled_file(self) -> Path:
        """Return the file of the distilled set, written when all stages are finished."""
        return self.path / "distilled.safetensors"

    @property
    def metrics_file(self) -> Path:
        """Return the file of the metrics."""
        return self.path / "metrics.jsonl"

    @property
    def evaluation_file(self) -> Path:
        """Return the file of the evaluation."""
        return self.path / "evaluation.json"

    @property
    def images_file(self) -> Path:
        """Return the file of the image grid."""
        return self.path / "images.png"

    @property
    def accuracy_file(self) -> Path:
        """Return the file of the accuracy plot."""
        return self.path / "accuracy.png"

    # ---- content ----

    def save_checkpoint(
        self, stage: int, tensors: dict[str, Tensor], state: dict[str, Any]
    ) -> None:
        """Save the checkpoint of a stage."""
        save_tensors(self.checkpoint_file(stage), tensors, state)

    def load_checkpoint(self, stage: int) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """Return the tensors and the state in a stage's checkpoint, or None if there is none."""
        path = self.checkpoint_file(stage)
        return read_tensors(path) if path.exists() else None

    def truncate_metrics(self, stage: int, iteration: int, judged: int) -> None:
        """Drop the lines that a continued run writes again.

        These are all lines after ``iteration`` of ``stage``, and the selection accuracies after its
        iteration ``judged``.
        """

        def is_kept(row: dict[str, Any]) -> bool:
            last = judged if "selection_accuracy" in row else iteration
            return (row.get("stage", 0), row.get("iteration", 0)) <= (stage, last)

        rows = self.metrics.read()
        kept = [row for row in rows if is_kept(row)]
        if self.metrics_file.exists():
            write_text(self.metrics_file, "".join(json.dumps(row) + "\n" for row in kept))

    def read_evaluation(self) -> Evaluation:
        """Read evaluation.json.

        Raises:
            UsageError: The run was not evaluated, or the file is not an evaluation.
        """
        return Evaluation.read(self.evaluation_file)
