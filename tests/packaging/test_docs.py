"""What the documentation promises: its commands are those of continuous integration, its examples
run, its links lead somewhere, and the settings it names exist.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import tiny

from pdd_fast.progressive.stages import distill
from pdd_fast.settings import Config, resolve
from pdd_fast.storage.run import Run

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
EVERY_PAGE = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(
        rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL
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
    pytest.param(code, id=f"{page.name}-{number}")
    for page in PAGES
    for number, code in enumerate(blocks(page, "python"))
]


@pytest.mark.parametrize("code", EXAMPLES)
def test_examples_run(code: str, folder: Path) -> None:
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    # An example that shows what it prints shows it in comments.
    for shown in re.findall(r"print\(.*\)\s+# (.*)", code):
        assert shown in result.stdout


@EVERY_PAGE
def test_links_lead_to_files(page: Path) -> None:
    targets = re.findall(r"\]\((?!https?:|#)([^)#]+)", page.read_text(encoding="utf-8"))
    missing = [target for target in targets if not (page.parent / target).exists()]
    assert not missing


@EVERY_PAGE
def test_settings_that_are_named_exist(page: Path) -> None:
    named = re.findall(r"--set (\w+)=", page.read_text(encoding="utf-8"))
    unknown = [name for name in named if name not in Config.__dataclass_fields__ and name != "NAME"]
    assert not unknown
