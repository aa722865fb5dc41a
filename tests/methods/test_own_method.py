"""A method of one's own, with a setting of its own, touches no file of the package."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Iterator
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
import tiny
import torch
from command import call
from evaluations import evaluated
from pydantic import Field
from stopping import Stopper, bytes_of, stopped_and_continued
from torch import Tensor

from pdd_fast.methods import METHODS, BaseMethod, MethodSettings, StageProblem, register
from pdd_fast.progressive.context import RunContext
from pdd_fast.progressive.stages import distill
from pdd_fast.runtime.errors import UsageError
from pdd_fast.settings import Settings, from_dict, resolve
from pdd_fast.storage.run import Run


class ShrinkingSettings(MethodSettings):
    run_defaults = MappingProxyType({"eval_every": 0, "conditioning": "off"})

    shrinkage: float = Field(0.1, ge=0, lt=1, description="Fraction lost in every iteration.")


class Shrinking(BaseMethod):
    """Images lose a fraction of themselves in every iteration."""

    Settings = ShrinkingSettings
    settings: ShrinkingSettings

    def __init__(self, problem: StageProblem) -> None:
        super().__init__(problem)
        self._done = (0, problem.images)

    @property
    def iteration(self) -> int:
        return self._done[0]

    @property
    def images(self) -> Tensor:
        return self._done[1]

    def step(self) -> dict[str, float]:
        self._done = (self.iteration + 1, (1 - self.settings.shrinkage) * self.images)
        return {"loss": float(self.images.square().mean())}

    def state(self) -> dict[str, Tensor]:
        return {"iteration": torch.tensor(self.iteration), "images": self.images}

    def load_state(self, state: dict[str, Tensor]) -> None:
        self._done = (int(state["iteration"]), state["images"])


@pytest.fixture(autouse=True)
def shrinking() -> Iterator[None]:
    register("shrinking", Shrinking)
    yield
    METHODS.unregister("shrinking")


def settings(**changes: Any) -> Settings:
    return resolve(**(tiny.of("shrinking") | {"conditioning": "on"} | changes))


# ---- stages ----


@pytest.mark.parametrize("own", [{}, {"shrinkage": 0.25}], ids=["default", "explicit"])
def test_a_method_of_ones_own_runs_through_stages_resume_and_evaluation(
    tmp_path: Path, own: dict[str, float]
) -> None:
    config = settings(eval_every=0, checkpoint_seconds=0, **own)
    whole, counter = Run.create(tmp_path / "whole", config), Stopper()
    found = distill(whole, counter)
    ctx = RunContext.prepare(config)
    left = 1 - own.get("shrinkage", 0.1)
    for stage, rows in enumerate(ctx.random_real_rows((1, 1, 1), "initial images"), start=1):
        torch.testing.assert_close(found.subset(stage).images, ctx.train.images[rows] * left**4)
    assert found.metadata["method"] == "shrinking"
    assert found.learning_rates.tolist() == pytest.approx([0.02] * 3)
    assert not whole.experts_dir.exists()
    stopped = stopped_and_continued(tmp_path / "stopped", config, counter.count // 2)
    assert bytes_of(stopped) == bytes_of(whole)
    names = [result["name"] for result in evaluated(whole)["results"]]
    assert names == ["pdd", "random", "last-union"]


def test_a_name_means_one_method() -> None:
    register("shrinking", Shrinking)
    with pytest.raises(ValueError, match="name must be new, got 'idc', which is GradientMatching"):
        register("idc", Shrinking)
    with pytest.raises(
        UsageError, match="method must be dm or idc or mtt or shrinking, got 'nope'"
    ):
        resolve(method="nope")


def test_looking_at_a_run_needs_no_method_and_going_on_says_so(tmp_path: Path) -> None:
    run = Run.create(tmp_path / "run", settings(stages=1))
    distill(run)
    METHODS.unregister("shrinking")
    try:
        again = Run.open(run.path)
        assert evaluated(again)["stages"] == 1
        with pytest.raises(
            UsageError, match="method must be dm or idc or mtt, got 'shrinking'; register it first"
        ):
            distill(again)
    finally:
        register("shrinking", Shrinking)


@pytest.mark.parametrize("labels", ["soft", "hard"])
def test_what_needs_experts_gets_them_and_what_needs_transitions_is_refused(
    tmp_path: Path, labels: str
) -> None:
    run = Run.create(tmp_path / "run", settings(stages=1, labels=labels))
    distill(run)
    assert run.experts_dir.exists() == (labels == "soft")
    refused = Run.create(tmp_path / "refused", settings(filter="learned"))
    with pytest.raises(
        UsageError, match="filter must be none or forgetting where method is shrinking, got learned"
    ):
        distill(refused)
    with pytest.raises(UsageError, match="factor must be 1 where labels are soft, got 2"):
        settings(factor=2, labels="soft")


# ---- its settings ----


def test_its_settings_are_resolved_like_the_packages() -> None:
    found = resolve(dataset="mnist-like", method="shrinking", shrinkage="0.5")
    assert isinstance(found.method, ShrinkingSettings)
    assert found.method.shrinkage == 0.5
    assert (found.eval_every, found.conditioning) == (0, "off")  # run_defaults
    assert found.flat()["shrinkage"] == 0.5
    assert from_dict(json.loads(json.dumps(found.to_dict()))) == found
    assert found.changed(shrinkage=0.75).flat()["shrinkage"] == 0.75
    assert resolve(dataset="mnist-like", method="shrinking", eval_every=3).eval_every == 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"shrinkage": 1}, r"^shrinkage must be below 1, got 1(\.0)?$"),
        ({"shrinkage": -0.5}, r"^shrinkage must be at least 0, got -0\.5$"),
        ({"shrinkage": "much"}, r"^shrinkage must be a number, got 'much'$"),
        ({"shrinkage": "nan"}, r"^shrinkage must be a finite number, got nan$"),
        ({"shrinkag": 0.5}, r"^unknown setting 'shrinkag'; did you mean 'shrinkage'\?$"),
        ({"lr_lr": 1}, r"^lr_lr must be left out where method is shrinking, got 1; .* of mtt$"),
        (
            {"method": "dm", "shrinkage": 0.5},
            r"^shrinkage must be left out where method is dm, got 0\.5; it is a setting of "
            "shrinking$",
        ),
    ],
)
def test_a_wrong_value_gives_the_usual_sentence(changes: dict[str, Any], message: str) -> None:
    given = {"dataset": "mnist-like", "method": "shrinking"} | changes
    with pytest.raises(UsageError, match=message):
        resolve(**given)


def test_a_setting_of_its_own_must_not_have_the_name_of_a_runs() -> None:
    class Both(MethodSettings):
        width: int = 3
        shrinkage: float = 0.1

    class Confused(Shrinking):
        Settings = Both  # type: ignore[assignment]

    register("confused", Confused)
    try:
        with pytest.raises(
            ValueError, match="Both must have settings of its own, got width, which the run has"
        ):
            resolve(dataset="mnist-like", method="confused")
    finally:
        METHODS.unregister("confused")


# ---- the command line ----


def test_config_prints_its_setting_and_takes_it_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    first = call("config", "--method", "shrinking", "--set", "shrinkage=0.25")
    assert (first.status, first.err) == (0, "")
    assert "shrinkage = 0.25  # Fraction lost in every iteration.\n" in first.out
    assert tomllib.loads(first.out)["method"] == {"name": "shrinking", "shrinkage": 0.25}
    Path("mine.toml").write_text(first.out)
    assert call("config", "--recipe", "mine.toml").out == first.out
    changed = call("config", "--recipe", "mine.toml", "--set", "shrinkage=0.5").out
    assert changed == first.out.replace("shrinkage = 0.25", "shrinkage = 0.5")
    Path("wrong.toml").write_text('shrinkage = 0.5\n[method]\nname = "shrinking"\n')
    sentence = call("config", "--recipe", "wrong.toml").sentence()
    assert sentence == "recipe wrong.toml: shrinkage must be in the table [method]"


def test_the_schema_has_its_setting() -> None:
    found = json.loads(call("config", "--schema").out)
    own = found["$defs"]["ShrinkingSettings"]
    assert own["properties"]["name"]["const"] == "shrinking"
    shrinkage = own["properties"]["shrinkage"]
    assert (shrinkage["default"], shrinkage["minimum"], shrinkage["exclusiveMaximum"]) == (
        0.1,
        0,
        1,
    )
    assert {"$ref": "#/$defs/ShrinkingSettings"} in found["properties"]["method"]["oneOf"]


def test_distill_takes_its_setting_and_names_a_wrong_value(tmp_path: Path) -> None:
    flags = [
        part
        for key, value in (tiny.of("shrinking") | {"stages": 1, "ipc": 1}).items()
        for part in ("--set", f"{key}={value}")
    ]
    wrong = call("distill", *flags, "--set", "shrinkage=2", "--run-dir", tmp_path / "run")
    assert (wrong.status, wrong.sentence()) == (2, "shrinkage must be below 1, got 2.0")
    assert not (tmp_path / "run").exists()
    done = call("distill", *flags, "--set", "shrinkage=0.25", "--run-dir", tmp_path / "run")
    assert done.status == 0, done.err
    stored = json.loads((tmp_path / "run" / "config.json").read_text())
    assert stored["settings"]["method"] == {"name": "shrinking", "shrinkage": 0.25}
    other = call(
        "distill", "--resume", "--run-dir", tmp_path / "run", "--set", "shrinkage=0.5"
    ).sentence()
    assert other == "shrinkage must be 0.25 as in the run that is continued, got 0.5"
