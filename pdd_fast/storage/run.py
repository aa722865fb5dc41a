"""A run directory: what was asked, what was made, and what an interrupted run needs to go on."""

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
    """Where a run goes that was not told where."""
    return Path("runs") / default_name(settings)


def default_name(settings: Settings, stages: bool = True) -> str:
    """What a run is about, in a folder's name; of several runs without ``stages`` and seed."""
    name = re.sub(r"[^A-Za-z0-9]+", "-", settings.dataset).strip("-") + f"-ipc{settings.ipc}"
    method = settings.method.name
    name += f"-{method}" if method != configuration.DEFAULT_METHOD else ""
    labels = settings.labels
    name += f"-{labels}-labels" if labels != configuration.default("labels") else ""
    if not stages:
        return name
    split = "-".join(map(str, settings.ipc_by_stage)) if settings.stage_ipc else settings.stages
    return f"{name}-stages{split}-seed{settings.seed}"


def _stored_settings(stored: dict[str, Any]) -> Any:
    """Return the settings in a config.json; before methods had their own, its "config"."""
    return stored.get("settings", stored.get("config"))


class Metrics:
    """metrics.jsonl: one object a line."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def append(self, **values: Any) -> None:
        line = json.dumps(values) + "\n"
        with self._path.open("a+b") as file:
            if file.tell() > 0:
                file.seek(-1, os.SEEK_END)
                if file.read(1) != b"\n":  # torn by a kill: this line must not be lost with it
                    line = "\n" + line
            file.write(line.encode())

    def read(self) -> list[dict[str, Any]]:
        """All whole lines; one that a kill tore is left out."""
        rows = []
        if self._path.exists():
            for line in self._path.read_text(encoding="utf-8").splitlines():
                try:
                    row = json.loads(line)
                except ValueError:
                    continue
                if "held_out_accuracy" in row:  # its name before 0.1
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
        """A new run directory with its config.json, in which paths are absolute: it is opened from
        anywhere.

        Raises:
            UsageError: something is there already.
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
        """An existing run directory.

        Raises:
            UsageError: it is none, or its settings cannot be read.
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
        """The data that the run was begun with (:func:`pdd_fast.data.fingerprint.identity`); of
        runs that did not note them, the name.
        """
        stored = read_json(self.path / "config.json")
        noted = stored.get("data")
        return (
            noted
            if isinstance(noted, dict)
            else {"data": short_dataset(_stored_settings(stored).get("dataset", ""))}
        )

    def note_data(self, identity: dict[str, Any]) -> None:
        """Writes into config.json what data the run is begun with, unless it is there."""
        stored = read_json(self.path / "config.json")
        if "data" not in stored:
            write_json(self.path / "config.json", stored | {"data": identity})

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Keeps other processes out while the block runs (:mod:`pdd_fast.runtime.locks`).

        Raises:
            UsageError: another process works in this directory.
        """
        with locked(self.path):
            yield

    # ---- places ----

    @property
    def experts_dir(self) -> Path:
        return self.path / "experts"

    def stage_dir(self, stage: int) -> Path:
        return self.path / f"stage-{stage}"

    def stage_trajectories_dir(self, stage: int) -> Path:
        return self.stage_dir(stage) / "trajectories"

    def stage_file(self, stage: int) -> Path:
        """The union of stages 1..``stage``, once stage ``stage`` is finished."""
        return self.stage_dir(stage) / "distilled.safetensors"

    def checkpoint_file(self, stage: int) -> Path:
        return self.stage_dir(stage) / "checkpoint.safetensors"

    @property
    def forgetting_file(self) -> Path:
        return self.path / "forgetting.safetensors"

    def learned_file(self, stage: int) -> Path:
        return self.stage_dir(stage) / "learned.safetensors"

    @property
    def distilled_file(self) -> Path:
        return self.path / "distilled.safetensors"

    @property
    def metrics_file(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def evaluation_file(self) -> Path:
        return self.path / "evaluation.json"

    @property
    def images_file(self) -> Path:
        return self.path / "images.png"

    @property
    def accuracy_file(self) -> Path:
        return self.path / "accuracy.png"

    # ---- content ----

    def save_checkpoint(
        self, stage: int, tensors: dict[str, Tensor], state: dict[str, Any]
    ) -> None:
        save_tensors(self.checkpoint_file(stage), tensors, state)

    def load_checkpoint(self, stage: int) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        path = self.checkpoint_file(stage)
        return read_tensors(path) if path.exists() else None

    def truncate_metrics(self, stage: int, iteration: int, judged: int) -> None:
        """Drops what a continued run measures again: all after ``iteration`` of ``stage``, and the
        selection accuracies after its iteration ``judged``.
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
