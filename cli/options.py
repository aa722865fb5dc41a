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


def _choice(setting: str) -> click.Choice[str]:
    return click.Choice(choices(setting))


_FLAGS = (  # flag, setting, type, what --help says
    (
        "--dataset",
        "dataset",
        str,
        "digits, cifar10, cifar100, mnist, fashionmnist, svhn or imagefolder:DIR.",
    ),
    ("--stages", "stages", int, "Stages."),
    ("--ipc", "ipc", int, "Images per class, all stages together."),
    (
        "--stage-ipc",
        "stage_ipc",
        str,
        "Of these, what each stage adds, as in 4,2,2,1,1; even if not given.",
    ),
    ("--method", "method", _choice("method"), "The method that a stage uses."),
    (
        "--labels",
        "labels",
        _choice("labels"),
        "Classes; or probabilities, from the experts, or learned from there on.",
    ),
    ("--seed", "seed", int, "Where all randomness comes from."),
    ("--device", "device", str, "auto, cpu, cuda or cuda:N."),
    (
        "--precision",
        "precision",
        _choice("precision"),
        "Of convolutions; auto: tf32 on a GPU, float32 on the CPU.",
    ),
    ("--data-dir", "data_dir", str, "Where torchvision's datasets lie."),
    (
        "--selection-split",
        "selection_split",
        _choice("selection_split"),
        "What the best images are chosen by.",
    ),
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
    return _described(run_dir(command), [setting for _, setting, _, _ in _FLAGS])


def ablation_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Adds the flags that describe what all runs of an ablation have in common."""
    return _described(
        command,
        [
            "dataset",
            "ipc",
            "method",
            "labels",
            "device",
            "precision",
            "data_dir",
            "selection_split",
        ],
    )


def _described(command: Callable[..., Any], settings: Sequence[str]) -> Callable[..., Any]:
    decorators = [
        click.option(flag, setting, type=kind, default=None, help=_help(setting, text))
        for flag, setting, kind, text in _FLAGS
        if setting in settings
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
        click.option(
            "--json", "as_json", is_flag=True, help="One JSON object on stdout, for machines."
        ),
    ]
    for decorator in reversed(decorators):
        command = decorator(command)
    return command


def _help(setting: str, text: str) -> str:
    value = default(setting)
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
    settings = {
        setting: options[setting] for _, setting, _, _ in _FLAGS if options.get(setting) is not None
    }
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
