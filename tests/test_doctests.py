"""The examples in the docstrings of the public names run and print what they show."""

import doctest

import pytest
import torch

import pdd_fast

NAMES = [name for name in pdd_fast.__all__ if name != "__version__"]


def examples(name: str) -> list[doctest.DocTest]:
    found = doctest.DocTestFinder(recurse=False).find(getattr(pdd_fast, name), name, globs={})
    return [test for test in found if test.examples]


@pytest.mark.parametrize("name", NAMES)
def test_example_of_a_public_name(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    tests = examples(name)
    assert tests, f"the docstring of pdd_fast.{name} has no example"
    report: list[str] = []
    for test in tests:
        doctest.DocTestRunner().run(test, out=report.append)
    assert not report, "".join(report)
