"""pdd-fast config: settings as TOML that --recipe takes back, and their JSON Schema."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import Any

import pytest
from command import call

from pdd_fast import recipes
from pdd_fast.cli.config import schema
from pdd_fast.runtime.registry import METHODS
from pdd_fast.settings import from_dict, resolve


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["--method", "idc"],
        ["--recipe", "digits-dm", "--set", "lr_img=1e-20", "--seed", str(2**80)],
        ["--dataset", 'imagefolder:a "quoted" é\x7f\\name', "--stage-ipc", "3,1"],
    ],
    ids=["default", "method", "recipe", "text"],
)
def test_what_config_prints_is_a_recipe_that_gives_the_same_bytes(
    arguments: list[str], here: Path
) -> None:
    first = call("config", *arguments)
    assert (first.status, first.err) == (0, "")
    (here / "mine.toml").write_text(first.out, encoding="utf-8")
    again = call("config", "--recipe", "mine.toml")
    assert (again.status, again.out) == (0, first.out)
    assert call("config", "--recipe", "./mine.toml").out == first.out
    assert resolve("mine.toml").to_dict() == tomllib.loads(first.out)


@pytest.mark.parametrize("recipe", recipes.names())
def test_every_recipe_comes_back(recipe: str, here: Path) -> None:
    (here / "mine.toml").write_text(call("config", "--recipe", recipe).out)
    assert resolve("mine.toml") == resolve(recipe)


def test_every_setting_has_a_comment() -> None:
    for line in call("config").out.splitlines():
        if " = " in line:
            assert line.partition("  # ")[2].endswith("."), line


def test_flags_go_before_the_file(here: Path) -> None:
    (here / "mine.toml").write_text('width = 7\n[method]\nname = "idc"\ncutmix = 0.25\n')
    found = tomllib.loads(call("config", "--recipe", "mine.toml", "--set", "width=9").out)
    assert (found["width"], found["method"]["cutmix"]) == (9, 0.25)
    assert found["iterations"] == 2000  # the method's default of a setting of the run
    outcome = call("config", "--recipe", "mine.toml", "--method", "dm")
    assert "method must be idc as in the recipe mine.toml, got dm" in outcome.sentence()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("width = ", "recipe must be a TOML file, got mine.toml: "),
        ("lr_img = 2.0", "recipe mine.toml: lr_img must be in the table [method]"),
        ("[method]\nwidth = 3", "recipe mine.toml: width must be above the table [method]"),
        ('method = "idc"', "recipe mine.toml: method must be a table with a name"),
        ("wdith = 3", "unknown setting 'wdith'; did you mean 'width'?"),
        ("width = 0", "width must be at least 1, got 0"),
        ('[method]\nname = "nope"', "method must be dm or idc or mtt, got 'nope'"),
        ("[method]\ncutmix = 1", "cutmix must be left out where method is mtt, got 1"),
        (None, "recipe must be a TOML file, got mine.toml, which does not exist"),
    ],
)
def test_a_file_that_cannot_be_used_is_named(text: str | None, message: str, here: Path) -> None:
    if text is not None:
        (here / "mine.toml").write_text(text)
    outcome = call("config", "--recipe", "mine.toml")
    assert (outcome.status, outcome.out) == (2, "")
    assert message in outcome.sentence()


def test_the_schema_has_every_setting_and_every_method() -> None:
    outcome = call("config", "--schema")
    found: dict[str, Any] = json.loads(outcome.out)
    assert found == schema()
    whole = resolve().to_dict()
    assert set(found["properties"]) == set(whole)
    assert not found.get("required")
    assert found["properties"]["labels"]["enum"] == ["hard", "soft", "learned"]
    assert found["properties"]["ipc"]["minimum"] == 1
    own = {}
    for reference in found["properties"]["method"]["oneOf"]:
        model = found["$defs"][reference["$ref"].rpartition("/")[2]]
        own[model["properties"]["name"]["const"]] = model
    assert set(own) == set(METHODS)
    assert own["mtt"]["properties"]["ema_decay"]["exclusiveMaximum"] == 1
    for name in METHODS:
        settings = from_dict({"method": {"name": name}}).to_dict()
        assert set(own[name]["properties"]) == set(settings["method"])
        assert not own[name]["additionalProperties"]
