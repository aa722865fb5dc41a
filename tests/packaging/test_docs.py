"""The documentation holds.

Its commands are those of continuous integration, its examples run, its guides work from the first
line to the last, its links lead somewhere, and the options and settings that it names exist.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import click
import pytest
import tiny
from forks import Forks

import pdd_fast
from pdd_fast.cli.main import group
from pdd_fast.cli.options import configuration
from pdd_fast.progressive.stages import distill
from pdd_fast.settings import method_settings, resolve
from pdd_fast.storage.run import Run

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
PAGES = [*sorted(ROOT.glob("*.md")), *sorted(DOCS.rglob("*.md"))]
GUIDES = [page for page in sorted((DOCS / "guides").glob("*.md")) if page.name != "index.md"]
# By tools/site_pages.py, when the site is built.
GENERATED = [DOCS / "reference" / "settings.md"]


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


EVERY_PAGE = pytest.mark.parametrize("page", PAGES, ids=name_of)
EVERY_GUIDE = pytest.mark.parametrize("guide", GUIDES, ids=lambda guide: guide.stem)


def blocks(page: Path, language: str) -> list[str]:
    return [code for found, _, code in every_block(page) if found == language]


def every_block(page: Path) -> list[tuple[str, str, str]]:
    """Language, title and content of the blocks of a page."""
    return re.findall(
        r'^```(\w*)(?: title="([^"\n]+)")?\n(.*?)^```',
        page.read_text(encoding="utf-8"),
        re.MULTILINE | re.DOTALL,
    )


def test_continuous_integration_runs_the_commands_of_the_readme() -> None:
    commands = [line for block in blocks(ROOT / "README.md", "sh") for line in block.splitlines()]
    main, tests = (line for line in commands if line.startswith("python3 -m venv"))
    assert main.endswith("distill --stages 5")
    assert tests.endswith("pytest")
    script = (ROOT / ".ci" / "run").read_text().splitlines()
    assert main in script
    assert tests in script


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small run where the examples look for theirs."""
    folder = tmp_path_factory.mktemp("examples")
    run = Run.create(
        folder / "runs" / "digits-ipc10-stages5-seed0",
        resolve(**(tiny.SETTINGS | {"iterations": 1})),
    )
    distill(run)
    return folder


EXAMPLES = [
    pytest.param(code, id=f"{name_of(page)}-{number}")
    for page in PAGES
    if page not in GUIDES  # they run as a whole, below
    for number, code in enumerate(blocks(page, "python"))
]


def run_example(forks: Forks, code: str, folder: Path) -> None:
    result = forks.python(code, folder=folder)
    assert result.returncode == 0, result.stderr
    # An example that shows what it prints shows it in comments.
    for shown in re.findall(r"print\(.*\)\s+# (.*)", code):
        assert shown in result.stdout


@pytest.mark.parametrize("code", EXAMPLES)
def test_examples_run(forks: Forks, code: str, folder: Path) -> None:
    run_example(forks, code, folder)


def test_blocks_are_found_whatever_their_place_in_the_docs() -> None:
    names = set(map(name_of, PAGES))
    assert {
        "README.md",
        "docs/method.md",
        "docs/guides/large-sets.md",
        "docs/reference/api/unroll.md",
    } <= names
    assert len(EXAMPLES) > 12
    assert len(GUIDES) == 6


@EVERY_GUIDE
@pytest.mark.slow  # continuous integration runs them once: together they distill seven small sets
def test_a_guide_runs_from_its_first_line_to_its_last(
    forks: Forks, guide: Path, tmp_path: Path
) -> None:
    """Run its commands and code in order; a setting that it does not name is the tests'."""
    paths = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    for language, title, code in every_block(guide):
        if title:  # a file, which a command runs later
            (tmp_path / title).write_text(code, encoding="utf-8")
            continue
        if language == "python":
            run_example(forks, code, tmp_path)
        if language != "sh":
            continue
        script = "set -e\n" + "\n".join(map(smaller, code.replace("\\\n", " ").splitlines()))
        result = subprocess.run(
            ["bash", "-c", script],
            cwd=tmp_path,
            env=os.environ | {"PATH": paths},
            capture_output=True,
            text=True,
        )
        assert result.returncode == 0, result.stderr


def smaller(line: str) -> str:
    """Return a command that distills with the tests' settings, but for those that it names."""
    if not re.match(r"(pdd-fast|python \w+\.py) distill", line):
        return line
    given = {"dataset", "stages", "ipc", *re.findall(r"--set (\w+)=", line)}
    if "--method" in line:  # the tests' settings of trajectory matching are not its own
        given |= {*method_settings("mtt").model_fields}
    flags = [
        f"--set {key}={shlex.quote(str(value))}"
        for key, value in tiny.SETTINGS.items()
        if key not in given
    ]
    return " ".join([line, *flags])


@EVERY_GUIDE
def test_a_guide_is_short(guide: Path) -> None:
    lines = [
        line
        for language in ("sh", "python")
        for block in blocks(guide, language)
        for line in block.splitlines()
    ]
    assert len([line for line in lines if line.strip()]) < 40


def test_every_public_name_has_a_page_with_an_example() -> None:
    pages = {
        page: page.read_text(encoding="utf-8") for page in (DOCS / "reference" / "api").glob("*.md")
    }
    overview = pages.pop(DOCS / "reference" / "api" / "index.md")
    for name in pdd_fast.__all__:
        (page,) = (
            page
            for page, text in pages.items()
            if f"::: pdd_fast.{name}\n" in text or f"# `{name}`" in text
        )
        assert any(f"pdd_fast.{name}" in code for code in blocks(page, "python")), name
        assert f"`{name}`]({page.name})" in overview
    assert len(pages) == len(pdd_fast.__all__)


@EVERY_PAGE
def test_links_lead_to_files(page: Path) -> None:
    targets = re.findall(r"\]\((?!https?:|#)([^)#]+)", page.read_text(encoding="utf-8"))
    places = [(page.parent / target).resolve() for target in targets]
    missing = [str(place) for place in places if not place.exists() and place not in GENERATED]
    assert not missing


def commands(page: Path) -> list[str]:
    """The lines of a page's blocks that call pdd-fast."""
    text = "\n".join(blocks(page, "sh")).replace("\\\n", " ")
    return [line for line in text.splitlines() if line.startswith("pdd-fast ")]


@EVERY_PAGE
def test_commands_have_the_options_and_settings_that_they_name(page: Path) -> None:
    for line in commands(page):
        name, *arguments = shlex.split(line, comments=True)[1:]
        command = group.get_command(click.Context(group), name)
        assert command is not None, line
        try:
            options = command.make_context(name, arguments).params
        except click.exceptions.Exit:  # --recipe list, which ends there
            continue
        if name == "ablate":  # whose --stages are several numbers
            options = {key: options[key] for key in options if key != "stages"}
        if "assignments" in options and not options.get("resume"):
            configuration(options)


@EVERY_PAGE
def test_settings_that_are_named_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    own = re.findall(r"^ +(\w+): \w+ = Field\(", text, re.MULTILINE)  # of the page's methods
    known = {"NAME", *own, *resolve().flat(), *resolve(method="idc").flat()}
    named = re.findall(r"--set (\w+)=", text)
    unknown = [name for name in named if name not in known]
    assert not unknown
