"""Define the cases by name, and the suites that list them. Imports no torch.

A name describes its case completely: ``unroll-b50-n20-w128-s32`` is the meta-gradient of 20 steps
on 50 images of 32×32 through a ConvNet of width 128. A part that the name leaves out has a default
value. Every name of the grammar can be measured, also if no suite lists it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from itertools import product
from typing import Any

from pdd_fast.runtime.errors import UsageError, nearest

# As in ops/dsa.py, which imports torch.
OPERATIONS = ("color", "crop", "cutout", "flip", "scale", "rotate")
STRATEGIES = (*OPERATIONS, "single", "multiple")


@dataclass(frozen=True)
class Case:
    """Specification of one measurement; fields that its kind does not use are 0 or ""."""

    kind: str
    operation: str = ""  # DSA operation, one of STRATEGIES
    batch: int = 0  # images per step; synthetic images per class
    real: int = 0  # real images per class
    classes: int = 0
    steps: int = 0  # number of unrolled steps N
    width: int = 0  # channels of every convolution
    size: int = 0  # height and width of an image in pixels
    depth: int = 0  # blocks
    epochs: int = 0  # epochs on each union
    iterations: int = 0  # iterations of the stage
    augment: bool = False  # with DSA in mode "single"

    @property
    def name(self) -> str:
        """Return the name, which :func:`parse` reads."""
        kind = KINDS[self.kind]
        parts = [self.kind, *([self.operation] if self.operation else [])]
        for letter, number in kind.letters.items():
            value = getattr(self, number)
            default = kind.base if number == "size" else kind.defaults(self.size)
            if letter in kind.shown or value != getattr(default, number):
                parts.append(f"{letter}{value}")
        return "-".join([*parts, *(["dsa"] if self.augment else [])])

    @property
    def title(self) -> str:
        """Return a one-line description."""
        return KINDS[self.kind].title.format(case=self, dsa=", with DSA" if self.augment else "")


@dataclass(frozen=True)
class Kind:
    """Names, defaults and timed parts of the cases of one kind."""

    title: str
    letters: dict[str, str]  # letter in the name -> field of Case, in the order of the name
    shown: str  # letters that a name always has
    base: Case = field(repr=False)
    parts: tuple[str, ...] = ()  # timed parts; the last one is the case's main result
    # Errors of the result against float64: keys of a measurement's "error".
    errors: tuple[str, ...] = ()

    def defaults(self, size: int = 0) -> Case:
        """Return the default case for images of ``size`` pixels."""
        size = size or self.base.size
        # The literature's ConvNet has three blocks for 32×32 and four for 64×64; the last feature
        # map must be at least 2×2.
        depth = min(4 if size >= 64 else 3, max(1, size.bit_length() - 2))
        return replace(self.base, size=size, depth=depth)


_NET = {"w": "width", "s": "size", "d": "depth"}
KINDS = {
    "unroll": Kind(
        "one meta-gradient: {case.batch} images, {case.steps} steps, width {case.width}, "
        "{case.size}×{case.size}{dsa}",
        {"b": "batch", "n": "steps", **_NET},
        "bnws",
        Case("unroll", batch=50, steps=20, width=128, size=32),
        ("iteration",),
        ("images", "cosine", "rate"),
    ),
    "gradient-matching": Kind(
        "one gradient of the matching distance: {case.classes} classes of {case.real} real and "
        "{case.batch} synthetic "
        "images, width {case.width}, {case.size}×{case.size}",
        {"b": "batch", "r": "real", "k": "classes", **_NET},
        "brkws",
        Case("gradient-matching", batch=128, real=64, classes=10, width=128, size=32),
        ("gradient",),
        ("images", "cosine"),
    ),
    "step": Kind(
        "one training step: {case.batch} images, width {case.width}, {case.size}×{case.size}{dsa}",
        {"b": "batch", **_NET},
        "bws",
        Case("step", batch=256, width=128, size=32),
        ("step",),
    ),
    "dsa": Kind(
        "DSA, {case.operation}: {case.batch} images of 3×{case.size}×{case.size}",
        {"b": "batch", "s": "size"},
        "b",
        Case("dsa", "single", batch=256, size=32),
        ("draw", "forward", "forward and backward", "draw, forward and backward"),
    ),
    "evaluate": Kind(
        "one union evaluation: three schedules of {case.epochs} epochs on each of two unions, "
        "width {case.width}, {case.size}×{case.size}",
        {**_NET, "e": "epochs"},
        "",
        Case("evaluate", width=32, size=8, epochs=100),
        ("evaluation",),
    ),
    "stage": Kind(
        "one whole stage: transition, {case.iterations} iterations of {case.steps} steps, "
        "selection; width "
        "{case.width}, {case.size}×{case.size}",
        {"n": "steps", "i": "iterations", **_NET},
        "",
        Case("stage", steps=20, iterations=20, width=32, size=8),
        ("stage",),
    ),
}


def parse(name: str) -> Case:
    """Return the case called ``name``.

    Raises:
        UsageError: ``name`` is not the name of a case.
    """
    kind_name = next(
        (kind for kind in KINDS if f"{name}-".startswith(f"{kind}-")), name.partition("-")[0]
    )
    parts = name.split("-")[kind_name.count("-") + 1 :]
    if kind_name not in KINDS:
        raise UsageError(
            f"a case must begin with one of {', '.join(KINDS)}, got "
            f"{name!r}{nearest(kind_name, list(KINDS))}"
        )
    kind, values = KINDS[kind_name], dict[str, Any]()
    key: str
    value: Any
    for part in parts:
        found = re.fullmatch(r"([a-z])([1-9]\d{0,5})", part)
        if part == "dsa" and kind_name in ("unroll", "step"):
            key, value = "augment", True
        elif part in STRATEGIES and kind_name == "dsa":
            key, value = "operation", part
        elif found and found[1] in kind.letters:
            key, value = kind.letters[found[1]], int(found[2])
        else:
            raise UsageError(f"case {name!r}: {part!r} is not a part of it; {_grammar(kind_name)}")
        if key in values:
            raise UsageError(f"case {name!r} gives its {key} twice")
        values[key] = value
    case = replace(kind.defaults(values.get("size", 0)), **values)
    if kind.base.width and case.size < 2**case.depth:
        raise UsageError(
            f"case {name!r}: {case.depth} blocks need images of {2**case.depth} pixels at least, "
            f"got {case.size}"
        )
    return case


def _grammar(kind: str) -> str:
    numbers = ", ".join(
        f"{letter}{getattr(KINDS[kind].defaults(), n)}" for letter, n in KINDS[kind].letters.items()
    )
    more = {
        "dsa": f", and one of {', '.join(STRATEGIES)}",
        "unroll": " and dsa",
        "step": " and dsa",
    }.get(kind, "")
    return f"its parts look like {numbers}{more}"


# ---- suites ----


@dataclass(frozen=True)
class Suite:
    """List of cases with their time limits."""

    what: str
    cases: tuple[Case, ...]
    rounds: int
    limit: float  # seconds of one measurement
    compiles: bool  # whether to include implementations that compile for up to a minute


def _grid(kind: str, **values: Sequence[int | bool | str]) -> tuple[Case, ...]:
    """Return all combinations; the last value changes fastest."""
    found = []
    for combination in product(*values.values()):
        given: dict[str, Any] = dict(zip(values, combination, strict=True))
        found.append(replace(KINDS[kind].defaults(given.get("size", 0)), **given))
    return tuple(found)


def _named(*names: str) -> tuple[Case, ...]:
    return tuple(parse(name) for name in names)


_STEPS = _grid("step", batch=(20, 256), width=(32, 128), size=(8, 32), augment=(False, True))
_DSA = _grid("dsa", operation=STRATEGIES, batch=(20, 256))
_WHOLE = _named("evaluate", "evaluate-w128-s32-e10", "stage", "stage-n20-i5-w128-s32")
SUITES = {
    "quick": Suite(
        "minutes: small networks, where launches and passes over memory count as much as "
        "arithmetic",
        _named(
            "unroll-b20-n5-w32-s32",
            "unroll-b20-n20-w32-s32",
            "unroll-b20-n50-w32-s32",
            "gradient-matching-b20-r20-k10-w32-s32",
            "step-b256-w32-s32",
            "step-b20-w32-s32-dsa",
            "dsa-single-b256",
            "dsa-multiple-b256",
            "evaluate",
            "stage",
        ),
        rounds=2,
        limit=120,
        compiles=False,
    ),
    "standard": Suite(
        "hours: the sizes of the literature, one of them varied at a time",
        (
            *_named(
                "unroll-b50-n5-w128-s32",
                "unroll-b50-n20-w128-s32",
                "unroll-b50-n50-w128-s32",
                "unroll-b20-n20-w128-s32",
                "unroll-b100-n20-w128-s32",
                "unroll-b256-n20-w128-s32",
                "unroll-b50-n20-w32-s32",
                "unroll-b50-n20-w64-s32",
                "unroll-b50-n20-w128-s8",
                "unroll-b50-n20-w128-s64",
                "unroll-b50-n20-w128-s32-dsa",
                "gradient-matching",
            ),
            *_STEPS,
            *_DSA,
            *_WHOLE,
        ),
        rounds=3,
        limit=600,
        compiles=True,
    ),
    "full": Suite(
        "days: every combination of batch, steps, width and size",
        (
            *_grid(
                "unroll",
                batch=(20, 50, 100, 256),
                steps=(5, 20, 50),
                width=(32, 64, 128),
                size=(8, 32, 64),
            ),
            *_named("unroll-b50-n20-w128-s32-dsa", "gradient-matching"),
            *_STEPS,
            *_DSA,
            *_WHOLE,
        ),
        rounds=3,
        limit=1800,
        compiles=True,
    ),
}


def select(
    suite: str, only: Sequence[str] = (), skip: Sequence[str] = (), named: Sequence[str] = ()
) -> list[Case]:
    """Return the cases of a suite that match.

    A pattern is a name with *, ? or [...] in it, or a text that the name contains.

    Args:
        suite: name of the suite.
        only: patterns, of which a case must match at least one; empty: all cases.
        skip: patterns, of which a case must match none.
        named: names of cases that replace the suite's.

    Raises:
        UsageError: a pattern matches nothing, or no case is left.
    """
    every = [parse(name) for name in named] if named else list(SUITES[suite].cases)
    names = [case.name for case in every]
    where = "named by --case" if named else f"in the {suite} suite"
    for pattern in [*only, *skip]:
        if not any(matches(pattern, name) for name in names):
            raise UsageError(
                f"no case {where} matches {pattern!r}; pdd-fast bench --list shows the cases"
            )
    chosen = [
        case
        for case, name in zip(every, names, strict=True)
        if (not only or any(matches(pattern, name) for pattern in only))
        and not any(matches(pattern, name) for pattern in skip)
    ]
    if not chosen:
        raise UsageError("--only and --skip leave no case to measure")
    return list(dict.fromkeys(chosen))


def matches(pattern: str, name: str) -> bool:
    """Return whether ``pattern`` matches ``name``."""
    return fnmatchcase(name, pattern) if re.search(r"[*?[]", pattern) else pattern in name
