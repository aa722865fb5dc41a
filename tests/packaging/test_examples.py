"""The scripts and the notebook in examples/ run, with the settings that they come with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from forks import Forks

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
SCRIPTS = ["meta_gradient", "own_dataset", "own_method", "train_on_distilled"]
PRINTS = {  # in the last line of each
    "meta_gradient": "relative difference, lr: ",
    "own_dataset": "learning rate of each stage: ",
    "own_method": "accuracy.png",
    "train_on_distilled": "of 359 test images are right",
}


def run(forks: Forks, folder: Path, program: str | Path) -> list[str]:
    """Run a file, or code, in ``folder``; return the lines on stdout."""
    result = forks.python(program, folder=folder, environment={"MPLBACKEND": "Agg"})
    assert result.returncode == 0, result.stderr
    return result.stdout.splitlines()


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_runs_and_leaves_nothing_behind(forks: Forks, name: str, tmp_path: Path) -> None:
    lines = run(forks, tmp_path, EXAMPLES / f"{name}.py")
    assert PRINTS[name] in lines[-1]
    assert not list(tmp_path.iterdir())


def test_every_script_is_run_and_short() -> None:
    assert sorted(path.stem for path in EXAMPLES.glob("*.py")) == SCRIPTS
    for path in EXAMPLES.glob("*.py"):
        assert len(path.read_text(encoding="utf-8").splitlines()) < 70


@pytest.fixture(scope="module")
def cells() -> list[dict[str, Any]]:
    """The code cells of the notebook."""
    notebook = json.loads((EXAMPLES / "quickstart.ipynb").read_text(encoding="utf-8"))
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def test_the_code_of_the_notebook_runs(
    forks: Forks, cells: list[dict[str, Any]], tmp_path: Path
) -> None:
    code = "\n".join("".join(cell["source"]) for cell in cells)
    lines = run(forks, tmp_path, code)
    assert "DistilledSet(digits: 40 images of 1×8×8 in 2 stages)" in lines
    assert lines[-1].startswith("(40, 1, 8, 8) ")


def test_the_notebook_is_stored_as_executed_and_small(cells: list[dict[str, Any]]) -> None:
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    for cell in cells:
        assert cell["outputs"]
        assert all(output["output_type"] != "error" for output in cell["outputs"])
    assert (EXAMPLES / "quickstart.ipynb").stat().st_size < 100_000
