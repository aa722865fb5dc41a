"""Recipes: settings as TOML, those of the package by name and a person's own by their file."""

from __future__ import annotations

import tomllib
from importlib import resources
from typing import Any

from pdd_fast.runtime.errors import UsageError, first_line, nearest
from pdd_fast.runtime.paths import expanded


def names() -> list[str]:
    """Return the names of the package's recipes."""
    folder = resources.files("pdd_fast.recipes")
    return sorted(
        entry.name.removesuffix(".toml")
        for entry in folder.iterdir()
        if entry.name.endswith(".toml")
    )


def load(recipe: str) -> dict[str, Any]:
    """Return the settings of a recipe, unchecked: the run's, and the method's as ``method``.

    Args:
        recipe: a name of :func:`names`, or a TOML file: a path that ends in .toml or holds a slash.

    Raises:
        UsageError: there is no such recipe, or the file is not TOML.
    """
    try:
        return tomllib.loads(_text(recipe))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"recipe must be a TOML file, got {recipe}: {first_line(error)}") from None


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
