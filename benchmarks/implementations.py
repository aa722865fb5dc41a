"""List the implementations of a case on a kind of device. Imports no torch.

They are the package in its settings, and the other ways to write the same. The first implementation
of a case is the package with its default settings: "times ours" compares with it. The module that
measures a kind of case defines the meaning of ``options``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from pdd_fast.benchmarks.cases import Case
from pdd_fast.runtime.errors import UsageError

# Measured like implementations: the machine's rates, and the gradient in float64.
ROOFLINE, TRUTH = ("roofline", "float64")


@dataclass(frozen=True)
class Implementation:
    """One way to compute a case."""

    name: str
    note: str
    ours: bool = False
    exact: bool = True  # whether it computes the gradient itself, not an approximation
    compiles: bool = False  # whether it takes up to a minute before its first step
    precision: str = "float32"
    options: dict[str, Any] = field(default_factory=dict)


def implementations(case: Case, device: str) -> list[Implementation]:
    """Return all implementations of a case on a device of type "cpu" or "cuda"."""
    return _MAKERS[case.kind](device == "cuda")


def has_roofline(case: Case) -> bool:
    """Return whether a case has a roofline."""
    return case.kind in ("unroll", "gradient-matching", "step", "dsa")


def select(
    every: Sequence[Implementation],
    only: Sequence[str],
    without: Sequence[str],
    compiles: bool = True,
) -> list[Implementation]:
    """Return the implementations that ``only`` names, less those that ``without`` names.

    A text names the implementation of that name, or else all whose names contain it. With
    ``compiles`` false, those that compile take part only where ``only`` names them.
    """
    names = [implementation.name for implementation in every]

    def meant(texts: Sequence[str]) -> set[str]:
        return {
            name
            for text in texts
            for name in ([text] if text in names else [n for n in names if text in n])
        }

    wanted = meant(only) if only else {c.name for c in every if compiles or not c.compiles}
    return [
        implementation for implementation in every if implementation.name in wanted - meant(without)
    ]


def check(
    every: Sequence[Sequence[Implementation]], only: Sequence[str], without: Sequence[str]
) -> None:
    """Check that every text names an implementation of some case.

    Raises:
        UsageError: A text names none.
    """
    names = list(dict.fromkeys(implementation.name for some in every for implementation in some))
    for text in [*only, *without]:
        if not any(text in name for name in names):
            raise UsageError(
                f"no implementation's name contains {text!r}; they are: {'; '.join(names)}"
            )


# ---- by kind of case ----


def _precise(made: Sequence[tuple[Implementation, Sequence[str]]]) -> list[Implementation]:
    """Return each implementation once per precision, which becomes part of its name."""
    return [
        Implementation(f"{c.name}, {p}", c.note, c.ours, c.exact, c.compiles, p, c.options)
        for c, precisions in made
        for p in precisions
    ]


_BOTH, _ALL = ("float32", "tf32"), ("float32", "tf32", "bfloat16")


def _autograd(
    label: str, note: str, function: str, channels_last: bool = False, **more: Any
) -> Implementation:
    return Implementation(
        label, note, options={"function": function, "channels_last": channels_last}, **more
    )


_PLAIN = _autograd(
    "plain autograd",
    "exact; create_graph=True through all steps, as MTT's scripts have it",
    "plain",
)
_PLAIN_LAST = _autograd(
    "plain autograd, channels-last", "the same in channels-last memory", "plain", True
)
_CAPTURED = _autograd(
    "plain autograd, one graph",
    "the same in channels-last memory, replayed as one CUDA graph",
    "captured",
    True,
)
_CHECKPOINTED = _autograd(
    "checkpointed autograd", "exact; one step's graph at a time", "checkpointed"
)
_CHECKPOINTED_LAST = _autograd(
    "checkpointed autograd, channels-last", "the same in channels-last memory", "checkpointed", True
)
_FROZEN = _autograd(
    "frozen weights", "TESLA's approximation, NOT exact; a step at a time", "frozen", exact=False
)
_FUNCTIONAL = _autograd("torch.func", "exact; jvp of grad, a step at a time", "functional")
_COMPILED = _autograd(
    "torch.func, compiled",
    "the same under torch.compile, whose own memory is counted",
    "compiled",
    compiles=True,
)


def _unroll(on_gpu: bool) -> list[Implementation]:
    if on_gpu:
        # The measurement covers whole iterations, as in a run: a graph includes the update.
        made: list[tuple[Implementation, Sequence[str]]] = [
            (_matching(graph, memory), _ALL)
            for graph, memory in ((True, "recompute"), (True, "cache"), (False, "recompute"))
        ]
        made += [
            (_PLAIN, _BOTH),
            (_PLAIN_LAST, _ALL),
            (_CAPTURED, _ALL),
            (_FROZEN, _BOTH),
            (_CHECKPOINTED, ("float32",)),
        ]
        return _precise([*made, (_FUNCTIONAL, ("float32",)), (_COMPILED, _BOTH)])
    own = [
        Implementation(
            f"ours, {memory}, {convolution}",
            f"exact; memory={memory!r}, convolution={convolution!r}",
            ours=True,
            options={"engine": "auto", "memory": memory, "convolution": convolution},
        )
        for memory in ("recompute", "cache")
        for convolution in ("auto", "direct")
    ]
    own.append(
        Implementation(
            "ours, any module",
            "exact; engine='autograd', memory='recompute'",
            ours=True,
            options={"engine": "autograd", "memory": "recompute", "convolution": "auto"},
        )
    )
    return [
        *own,
        _PLAIN,
        _PLAIN_LAST,
        _CHECKPOINTED,
        _CHECKPOINTED_LAST,
        _FROZEN,
        _FUNCTIONAL,
        _COMPILED,
    ]


def _matching(graph: bool, memory: str) -> Implementation:
    label = f"ours, {'graph' if graph else 'eager'}, {memory}"
    note = f"exact; memory={memory!r}{', one CUDA graph' if graph else ''}"
    return Implementation(label, note, ours=True, options={"graph": graph, "memory": memory})


def _own(label: str, note: str, **options: Any) -> Implementation:
    return Implementation(
        label, note, ours=True, options={"engine": "auto", "convolution": "auto", **options}
    )


_AUTO = _own("ours, auto", "convolution='auto'")
_DIRECT = _own("ours, direct", "convolution='direct'", convolution="direct")
_EAGER = Implementation("eager PyTorch", "planar memory (NCHW)", options={"channels_last": False})
_EAGER_LAST = Implementation(
    "eager PyTorch, channels-last", "channels-last memory", options={"channels_last": True}
)


_PLAIN_CLASS = _autograd(
    "plain autograd", "exact; create_graph=True, a class at a time, as IDC's script has it", "plain"
)
_PLAIN_CLASS_LAST = _autograd(
    "plain autograd, channels-last", "the same in channels-last memory", "plain", True
)
_FUNCTIONAL_CLASS = _autograd("torch.func", "exact; jvp of grad, a class at a time", "functional")


def _gradient_matching(on_gpu: bool) -> list[Implementation]:
    module = _own("ours, any module", "exact; engine='autograd'", engine="autograd")
    others = (_PLAIN_CLASS, _PLAIN_CLASS_LAST, _FUNCTIONAL_CLASS)
    if not on_gpu:
        return [_AUTO, _DIRECT, module, *others]
    own = _own("ours", "exact; pdd_fast.gradient_matching")
    precisions = (_ALL, ("float32",), _BOTH, _ALL, ("float32",))
    return _precise(list(zip((own, module, *others), precisions, strict=True)))


def _step(on_gpu: bool) -> list[Implementation]:
    compiled = Implementation(
        "PyTorch, compiled",
        "network and loss under torch.compile",
        compiles=True,
        options={"channels_last": False, "compiled": True},
    )
    if not on_gpu:
        module = Implementation(
            "ours, as a module",
            "pdd_fast.ConvNet in the place of torch's layers, torch.optim.SGD, eager DSA",
            ours=True,
            options={"module": True},
        )
        return [_AUTO, _DIRECT, module, _EAGER, _EAGER_LAST, compiled]
    graph, single = (
        _own("ours, graph", "one CUDA graph a step"),
        _own("ours, eager", "kernel by kernel", graph=False),
    )
    return _precise(
        [(graph, _ALL), (single, _ALL), (_EAGER, _BOTH), (_EAGER_LAST, _BOTH), (compiled, _BOTH)]
    )


def _dsa(on_gpu: bool) -> list[Implementation]:
    note = "a handful of torch calls per operation"
    return [
        Implementation("ours", "pdd_fast.DSA and pdd_fast.augment", ours=True),
        Implementation("eager PyTorch", note),
    ]


def _evaluate(on_gpu: bool) -> list[Implementation]:
    if not on_gpu:
        return [_AUTO, _DIRECT, _EAGER, _EAGER_LAST]
    return _precise(
        [
            (_own("ours", "pdd_fast.evaluation.evaluate"), _ALL),
            (_EAGER, _BOTH),
            (_EAGER_LAST, _BOTH),
        ]
    )


def _stage(on_gpu: bool) -> list[Implementation]:
    module = _own("ours, any module", "engine='autograd'", engine="autograd")
    loop = Implementation(
        "MTT's loop", "create_graph=True and torch.optim.SGD", options={"channels_last": False}
    )
    loop_last = Implementation(
        "MTT's loop, channels-last", "the same in channels-last", options={"channels_last": True}
    )
    if not on_gpu:
        return [_AUTO, _DIRECT, module, loop, loop_last]
    own = _own("ours", "pdd_fast.progressive.stages")
    return _precise([(own, _ALL), (module, ("float32",)), (loop, _BOTH), (loop_last, _BOTH)])


_MAKERS: dict[str, Callable[[bool], list[Implementation]]] = {
    "unroll": _unroll,
    "gradient-matching": _gradient_matching,
    "step": _step,
    "dsa": _dsa,
    "evaluate": _evaluate,
    "stage": _stage,
}
