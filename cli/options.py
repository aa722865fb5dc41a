"""Flags that several commands share, and how they become settings."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click

from pdd_fast import recipes
from pdd_fast.runtime.errors import UsageError
from pdd_fast.runtime.paths import FOLDER, expanded
from pdd_fast.settings import Settings, absolute, choices, default, resolve


class PathOption(click.Path):
    """A path in which a leading ~ stands for the home directory: shells expand it in a word of its
    own alone, not in --run-dir=~/runs.
    """

    def __init__(self, file_okay: bool = True) -> None:
        super().__init__(file_okay=file_okay, path_type=Path)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        return super().convert(expanded(value), param, ctx)


PATH = PathOption()


# Settings that have a flag of their own: --selection-split for selection_split.
_FLAGS = (
    "dataset",
    "stages",
    "ipc",
    "stage_ipc",
    "method",
    "labels",
    "seed",
    "device",
    "precision",
    "data_dir",
    "selection_split",
)
# What a continued run may be given anew, because its results do not depend on it, or (device,
# side_by_side, memory) in rounding alone: a run that stopped for want of memory must be able to go
# on.
_FREE = (
    "device",
    "data_dir",
    "checkpoint_seconds",
    "graph",
    "side_by_side",
    "memory",
    "memory_limit",
)


def is_free(key: str, value: Any) -> bool:
    """Whether a continued run may be given this: also another folder of its data, which are
    compared when they are read.
    """
    return key in _FREE or (key == "dataset" and str(value).startswith(FOLDER))


def run_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Adds the flags that describe a run."""
    run_dir = click.option("--run-dir", type=PATH, default=None, help="[default: runs/DATA-ipc...]")
    return _described(_json(run_dir(command)), _FLAGS)


def config_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Adds the flags that describe a run, but for its folder."""
    return _described(command, _FLAGS)


def ablation_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Adds the flags that describe what all runs of an ablation have in common."""
    own = [flag for flag in _FLAGS if flag not in ("stages", "stage_ipc", "seed")]
    return _described(_json(command), own)


def _json(command: Callable[..., Any]) -> Callable[..., Any]:
    text = "One JSON object on stdout, for machines."
    return click.option("--json", "as_json", is_flag=True, help=text)(command)


def _described(command: Callable[..., Any], settings: Sequence[str]) -> Callable[..., Any]:
    decorators = [
        click.option(
            f"--{setting.replace('_', '-')}",
            setting,
            type=_kind(setting),
            default=None,
            help=_help(setting),
        )
        for setting in settings
    ]
    decorators += [
        click.option(
            "--recipe",
            default=None,
            callback=_list_recipes,
            is_eager=True,
            help="Settings by the name of a recipe (list shows them) or from FILE.toml. "
            "[default: the dataset's]",
        ),
        click.option(
            "--set",
            "assignments",
            multiple=True,
            metavar="KEY=VALUE",
            help="Any setting; may be repeated.",
        ),
    ]
    for decorator in reversed(decorators):
        command = decorator(command)
    return command


def _kind(setting: str) -> Any:
    """Return the type of a flag, as click has it."""
    names = choices(setting)
    return click.Choice(names) if names else Settings.model_fields[setting].annotation


def _help(setting: str) -> str:
    value, text = default(setting), Settings.model_fields[setting].description or ""
    if setting == "method":
        text = "Method that learns the images of a stage."
    return text if value == "" else f"{text} [default: {value}]"


def _list_recipes(context: click.Context, _: click.Parameter, name: str | None) -> str | None:
    """Names the recipes and ends, where that was asked for."""
    if name == "list":
        names = recipes.names()
        width = max(map(len, names))
        for each in names:
            click.echo(f"{each:{width}}  {recipes.title(each)}")
        context.exit()
    return name


def given_settings(options: dict[str, Any]) -> dict[str, Any]:
    """The settings that were asked for on the command line, --set among them."""
    settings = {setting: options[setting] for setting in _FLAGS if options.get(setting) is not None}
    for assignment in options.get("assignments", ()):
        key, equals, value = (part.strip() for part in assignment.partition("="))
        if not equals or not key:
            raise UsageError(f"--set must have the form KEY=VALUE, got {assignment!r}")
        if str(settings.setdefault(key, value)) != value:
            raise UsageError(f"{key} is given twice: {settings[key]} and {value}")
    return settings


def configuration(options: dict[str, Any]) -> Settings:
    """Defaults, recipe and flags."""
    return resolve(options.get("recipe"), **given_settings(options))


def continued(stored: Settings, options: dict[str, Any]) -> Settings:
    """The settings of a run that is continued: its own, but for where to compute and where the
    data lie.

    Raises:
        UsageError: a flag asks for another result than the run's.
    """
    if options.get("recipe") is not None:
        raise UsageError("--recipe must not be given with --resume: the run keeps its own settings")
    given = given_settings(options)
    free = {key: value for key, value in given.items() if is_free(key, value)}
    settings = absolute(absolute(stored).changed(**free))
    kept = settings.flat()
    for key, value in given.items():
        own = kept.get(key)
        wanted = value
        if key != "method":
            wanted = absolute(settings.changed(**{key: value})).flat()[key]
        if wanted != own:
            raise UsageError(f"{key} must be {own} as in the run that is continued, got {wanted}")
    return settings
