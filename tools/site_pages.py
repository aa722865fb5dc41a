"""Make pages of the site from other files: settings, the root's Markdown, measurements' records.

mkdocs loads this file as a hook (mkdocs.yml). The sources stay where people and tests read them;
the site gives them an address, and links that fit it.
"""

from __future__ import annotations

import ast
import inspect
import re
from pathlib import Path
from posixpath import relpath
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
# Pages of the repository's root, and of the site by the same names.
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
    """Drop the roles of Sphinx that docstrings name, such as :func:, from the text."""
    return re.sub(r":(?:func|class|meth|mod|data|attr):(?=<code>)", "", html)


def settings_page() -> str:
    """Return the table of every setting: name, default, and the comment beside it in the source."""
    from pdd_fast.settings import Config

    lines = [
        "# Settings",
        "",
        "Give a setting as `--set NAME=VALUE`, in a recipe, or by the option of the same name",
        "where a command has one ([command line](cli.md)). The defaults below hold where no recipe",
        "sets another value ([recipes](../method.md#recipes)).",
        "",
    ]
    source = inspect.getsource(Config)
    rows, end = source.splitlines(), 1
    for field in ast.parse(source).body[0].body:  # type: ignore[attr-defined]
        if isinstance(field, ast.AnnAssign):
            before, own = rows[end : field.lineno - 1], rows[field.lineno - 1 : field.end_lineno]
            comments = [
                comment[1] for row in before + own if (comment := re.search(r"# (.*)", row))
            ]
            if "" in before:  # a group of settings begins with its title
                title = comments.pop(0)
                lines += [
                    "",
                    f"## {title[:1].upper()}{title[1:]}",
                    "",
                    "| name | type | default | meaning |",
                ]
                lines.append("|---|---|---|---|")
            meaning = " ".join(comments).replace("|", "\\|")
            name, kind = ast.unparse(field.target), ast.unparse(field.annotation)
            lines.append(f"| `{name}` | {kind} | `{getattr(Config, name)!r}` | {meaning} |")
        end = field.end_lineno or 0
    return "\n".join(lines) + "\n"
