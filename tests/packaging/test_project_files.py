"""Files that the hosting site and others read: they say what the project says."""

from __future__ import annotations

import re
from pathlib import Path

import pdd_fast

ROOT = Path(__file__).resolve().parents[2]


def read(*parts: str) -> str:
    return ROOT.joinpath(*parts).read_text(encoding="utf-8")


def test_the_citation_is_of_this_version() -> None:
    citation = read("CITATION.cff")
    assert re.findall(r"^version: (.+)$", citation, re.MULTILINE) == [pdd_fast.__version__]
    assert re.findall(r"^license: (.+)$", citation, re.MULTILINE) == ["MIT"]
    assert "arXiv:2310.06982" in citation


def test_the_hosting_site_runs_what_continuous_integration_runs() -> None:
    workflow = read(".github", "workflows", "tests.yml")
    assert re.search(r"^\s+run: \.ci/run$", workflow, re.MULTILINE)
    # Nothing that a pull request brings may write to the repository.
    assert "permissions:\n  contents: read\n" in workflow
    assert "pull_request_target" not in workflow


def test_templates_are_there_and_ask_for_the_environment() -> None:
    folder = ROOT / ".github"
    names = {path.name for path in (folder / "ISSUE_TEMPLATE").iterdir()}
    assert names == {"bug_report.yml", "feature_request.yml", "config.yml"}
    assert "pdd-fast env" in read(".github", "ISSUE_TEMPLATE", "bug_report.yml")
    assert (folder / "pull_request_template.md").is_file()


def test_no_address_is_made_up() -> None:
    for name in ("CITATION.cff", "SECURITY.md", "RELEASE.md", "README.md", "CONTRIBUTING.md"):
        assert not re.findall(r"[\w.+-]+@[\w-]+\.\w+", read(name)), name
