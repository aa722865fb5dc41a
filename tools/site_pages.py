"""Create pages of the site from settings, the root's Markdown files and benchmark records.

mkdocs loads this file as a hook (mkdocs.yml). The sources stay where people and tests read them.
The site gives them addresses, and this module rewrites links accordingly.
"""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from posixpath import relpath
from typing import Any, get_args

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
# Pages of the repository's root, which have the same names on the site.
COPIES = {
    f"{name.upper()}.md": f"{name}.md"
    for name in ("contributing", "changelog", "release", "security")
}
RECORDS = "benchmarks/results"
SETTINGS = "reference/settings.md"


def on_files(files: Files, config: Any) -> Files:
    """Add the pages and records that are not in docs/."""
    for source, target in COPIES.items():
        files.append(
            File.generated(config, target, content=(ROOT / source).read_text(encoding="utf-8"))
        )
    files.append(File.generated(config, SETTINGS, content=settings_page()))
    for record in sorted((ROOT / RECORDS).iterdir()):
        files.append(File.generated(config, f"records/{record.name}", abs_src_path=str(record)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Rewrite links out of docs/, or from the repository's root, to addresses of the site."""
    source = page.file.src_uri
    folder = Path(source).parent.as_posix()
    from_root = source in COPIES.values()

    def link(match: re.Match[str]) -> str:
        target, anchor = match[1], match[2] or ""
        place = relpath(target if from_root else f"docs/{folder}/{target}", ".")
        if place.startswith(RECORDS):
            place = place.replace(RECORDS, "docs/records")
        place = f"docs/{COPIES[place]}" if place in COPIES else place
        return f"]({relpath(place, f'docs/{folder}')}{anchor})"

    return re.sub(r"\]\((?!\w+:|#)([^)#\s]+)(#[^)\s]*)?\)", link, markdown)


def on_page_content(html: str, **_: Any) -> str:
    """Remove Sphinx roles of docstrings, such as :func:, from the text."""
    return re.sub(r":(?:func|class|meth|mod|data|attr):(?=<code>)", "", html)


def settings_page() -> str:
    """Return the tables of all settings: the run's in groups, then each method's own."""
    from pdd_fast.runtime.registry import METHODS
    from pdd_fast.settings import GROUPS, Settings, method_settings

    lines = [
        "# Settings",
        "",
        "Give a setting as `--set NAME=VALUE`, in a recipe, or by the option of the same name",
        "where a command has one ([command line](cli.md)). The defaults below hold where no recipe",
        "sets another value ([recipes](../method.md#recipes)).",
    ]
    for name, field in Settings.model_fields.items():
        if name in GROUPS:
            lines += ["", f"## {GROUPS[name]}", "", *_HEADER]
        if name != "method":
            lines.append(_row(name, field))
    for method in METHODS:
        model = method_settings(method)
        lines += ["", f"## Method {method}", "", inspect.getdoc(model) or ""]
        if model.run_defaults:
            changed = ", ".join(f"`{name}={value}`" for name, value in model.run_defaults.items())
            lines += ["", f"Defaults of the run with this method: {changed}."]
        own = [_row(name, field) for name, field in model.model_fields.items() if name != "name"]
        lines += ["", *_HEADER, *own]
    return "\n".join(lines) + "\n"


_HEADER = ["| name | values | default | meaning |", "|---|---|---|---|"]
_LIMITS = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}
_KINDS = {int: "whole number", float: "number", str: "text"}


def _row(name: str, field: Any) -> str:
    """Return a setting's row of the table."""
    if names := get_args(field.annotation):
        values = ", ".join(f"`{each}`" for each in names)
    else:
        limits = [
            f"{words} {getattr(limit, key):g}"
            for limit in field.metadata
            for key, words in _LIMITS.items()
            if hasattr(limit, key)
        ]
        values = ", ".join([_KINDS.get(field.annotation, str(field.annotation)), *limits])
    meaning = field.description.replace("|", "\\|")
    return f"| `{name}` | {values} | `{field.default!r}` | {meaning} |"
