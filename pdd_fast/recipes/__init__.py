"""Recipes: settings as TOML, those of the package by name and a person's own by their file."""

from __future__ import annotations

import tomllib
from collections.abc import Container
from importlib import resources
from typing import Any

from pdd_fast.runtime.errors import UsageError, first_line, nearest
from pdd_fast.runtime.method_settings import DEFAULT_METHOD, own_names
from pdd_fast.runtime.paths import expanded
from pdd_fast.runtime.registry import METHODS


def names() -> list[str]:
    """Return the names of the package's recipes."""
    folder = resources.files("pdd_fast.recipes")
    return sorted(
        entry.name.removesuffix(".toml")
        for entry in folder.iterdir()
        if entry.name.endswith(".toml")
    )


def named_after(dataset: str, method: str) -> str | None:
    """Return the name of the recipe for ``dataset`` and ``method``, or None if there is none."""
    name = dataset if method == DEFAULT_METHOD else f"{dataset}-{method}"
    return name if name in names() else None


def load(recipe: str) -> dict[str, Any]:
    """Return the settings of a recipe, unchecked: the run's, and the method's as ``method``.

    Args:
        recipe: Name from :func:`names`, or a TOML file: a path that ends in .toml or contains a
            slash.

    Raises:
        UsageError: There is no such recipe, or the file is not TOML.
    """
    try:
        return tomllib.loads(_text(recipe))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"recipe must be a TOML file, got {recipe}: {first_line(error)}") from None


def flat(recipe: str, run_names: Container[str]) -> dict[str, Any]:
    """Return the settings of a recipe by flat names, unchecked; ``method`` is the method's name.

    Args:
        recipe: Name or file, as in :func:`load`.
        run_names: Names of the run's settings.

    Raises:
        UsageError: There is no such recipe, or a setting is in the wrong table.
    """
    run = load(recipe)
    own = run.pop("method", {})
    if not isinstance(own, dict):
        raise UsageError(
            f"recipe {recipe}: method must be a table with a name, as in [method] and "
            f'name = "{own}", got {own!r}'
        )
    method = str(own.pop("name", DEFAULT_METHOD))
    known = own_names(method) if method in METHODS else []
    for key in run:
        if key in known:
            raise UsageError(f"recipe {recipe}: {key} must be in the table [method]")
    for key in own:
        if key in run_names:
            raise UsageError(f"recipe {recipe}: {key} must be above the table [method]")
    return {**run, **own, "method": method}


def title(recipe: str) -> str:
    """Return what a recipe is for: its first line."""
    return _text(recipe).partition("\n")[0].removeprefix("#").strip()


def _text(recipe: str) -> str:
    if recipe.endswith(".toml") or "/" in recipe:
        path = expanded(recipe)
        if not path.is_file():
            raise UsageError(f"recipe must be a TOML file, got {recipe}, which does not exist")
        return path.read_text(encoding="utf-8")
    known = names()
    if recipe not in known:
        raise UsageError(
            f"recipe must be one of {', '.join(known)}, or a file whose name ends in .toml, got "
            f"{recipe!r}{nearest(recipe, known)}"
        )
    return (resources.files("pdd_fast.recipes") / f"{recipe}.toml").read_text(encoding="utf-8")
