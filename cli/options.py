"""Flags that several commands share, and their conversion to settings."""

from __future__ import annotations

from collections.abc import Callable, Container, Sequence
from pathlib import Path
from typing import Any

import click

from pdd_fast import recipes
from pdd_fast.runtime.errors import UsageError
from pdd_fast.runtime.method_settings import RENAMED
from pdd_fast.runtime.paths import FOLDER, expanded
from pdd_fast.settings import Settings, absolute, choices, default, resolve


class PathOption(click.Path):
    """Path whose leading ~ stands for the home directory.

    Shells expand it only at the start of a word, not in --run-dir=~/runs.

    Args:
        file_okay: Whether the path may be a file.
    """

    def __init__(self, file_okay: bool = True) -> None:
        super().__init__(file_okay=file_okay, path_type=Path)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return the value as an expanded Path."""
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
_OPTIONS = [f"--{setting.replace('_', '-')}" for setting in _FLAGS]
# Options before 0.1 that set no setting, and their names now; RENAMED has those that do.
_RENAMED_OPTIONS = {"contender": "implementation"}
# Settings that a continued run may change. Results do not depend on them, or differ by rounding
# only (device, memory, memory_limit): a run that ran out of memory must be able to continue.
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
    """Return whether a continued run may set ``key`` to ``value``.

    Besides the free settings this may be another folder of the dataset. The data are compared when
    they are read.
    """
    return key in _FREE or (key == "dataset" and str(value).startswith(FOLDER))


def run_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the flags that describe a run."""
    run_dir = click.option(
        "--run-dir", type=PATH, default=None, help="Run directory. [default: runs/DATA-ipc...]"
    )
    return _described(_json(run_dir(command)), _FLAGS)


def config_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the flags that describe a run, except its folder."""
    return _described(command, _FLAGS)


def ablation_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the flags that all runs of an ablation share."""
    own = [flag for flag in _FLAGS if flag not in ("stages", "stage_ipc", "seed")]
    return _described(_json(command), own)


def _json(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the flag --json."""
    text = "Print one JSON object on stdout instead of text."
    return click.option("--json", "as_json", is_flag=True, help=text)(command)


def _described(command: Callable[..., Any], settings: Sequence[str]) -> Callable[..., Any]:
    """Add a flag for each of ``settings``, and --recipe and --set."""
    decorators = [
        click.option(
            option,
            setting,
            type=_kind(setting),
            metavar=f"[{'|'.join(choices(setting))}]" if setting == "method" else None,
            default=None,
            help=_help(setting),
        )
        for setting, option in zip(_FLAGS, _OPTIONS, strict=True)
        if setting in settings
    ]
    decorators += [
        click.option(
            "--recipe",
            default=None,
            callback=_list_recipes,
            is_eager=True,
            help="Recipe with settings: a name (list prints them) or FILE.toml. "
            "[default: the dataset's]",
        ),
        click.option(
            "--set",
            "assignments",
            multiple=True,
            metavar="KEY=VALUE",
            help="Set any setting, overriding the recipe; may be repeated.",
        ),
    ]
    for decorator in reversed(decorators):
        command = decorator(command)
    return command


def _kind(setting: str) -> Any:
    """Return the Click type of a setting's flag."""
    if setting == "method":
        return str  # click.Choice would refuse a method that is registered after this import
    names = choices(setting)
    return click.Choice(names) if names else Settings.model_fields[setting].annotation


def _help(setting: str) -> str:
    """Return the help text of a setting's flag, with its default."""
    value, text = default(setting), Settings.model_fields[setting].description or ""
    if setting == "method":
        text = "Method that learns the images of a stage."
    return text if value == "" else f"{text} [default: {value}]"


def _list_recipes(context: click.Context, _: click.Parameter, name: str | None) -> str | None:
    """Print the recipes and exit if ``name`` is "list"; otherwise return ``name``."""
    if name == "list":
        names = recipes.names()
        width = max(map(len, names))
        for each in names:
            click.echo(f"{each:{width}}  {recipes.title(each)}")
        context.exit()
    return name


def renamed(name: str, options: Container[str]) -> str:
    """Return what an option or setting from before 0.1 is called now, or "".

    Args:
        name: The option or setting.
        options: The options of the command, e.g. "--method".
    """
    now = (RENAMED | _RENAMED_OPTIONS).get(name.lstrip("-").replace("-", "_"), "")
    option = f"--{now.replace('_', '-')}"
    if now and option in options:
        return option
    return f"--set {now}=VALUE" if now and "--set" in options else ""


def given_settings(options: dict[str, Any]) -> dict[str, Any]:
    """Return the settings given on the command line, including those of --set.

    Args:
        options: Values of the flags.

    Raises:
        UsageError: --set is malformed, or a setting is given twice.
    """
    settings = {setting: options[setting] for setting in _FLAGS if options.get(setting) is not None}
    for assignment in options.get("assignments", ()):
        key, equals, value = (part.strip() for part in assignment.partition("="))
        if not equals or not key:
            raise UsageError(f"--set must have the form KEY=VALUE, got {assignment!r}")
        if now := renamed(key, _OPTIONS):
            raise UsageError(f"unknown setting {key!r}; it is called {RENAMED[key]!r}: use {now}")
        if str(settings.setdefault(key, value)) != value:
            raise UsageError(f"{key} is given twice: {settings[key]} and {value}")
    return settings


def configuration(options: dict[str, Any]) -> Settings:
    """Return the settings from defaults, recipe and flags; later ones override earlier ones."""
    return resolve(options.get("recipe"), **given_settings(options))


def continued(stored: Settings, options: dict[str, Any]) -> Settings:
    """Return the settings of a continued run: its own, with changes of free settings.

    Args:
        stored: The run's settings.
        options: Values of the flags.

    Raises:
        UsageError: A flag would change the run's results.
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
