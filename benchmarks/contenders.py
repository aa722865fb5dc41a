"""Who takes part in a case on a kind of device: ours in its settings, and the other ways to write
the same. Imports no torch.

The first contender of a case is the package as it comes, with its default settings: "times ours"
compares with it. What a contender's ``options`` mean is up to the module that measures its kind of
case.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from pdd_fast.benchmarks.cases import Case
from pdd_fast.runtime.errors import UsageError

FLOOR, TRUTH = (
    "floor",
    "float64",
)  # measured like contenders: the machine's rates, and the gradient in float64


@dataclass(frozen=True)
class Contender:
    name: str
    note: str
    ours: bool = False
    exact: bool = True  # computes the gradient itself, not an approximation
    compiles: bool = False  # takes up to a minute before its first step
    precision: str = "float32"
    options: dict[str, Any] = field(default_factory=dict)


def contenders(case: Case, device: str) -> list[Contender]:
    """All of a case's contenders on a device of type "cpu" or "cuda"."""
    return _MAKERS[case.kind](device == "cuda")


def has_floor(case: Case) -> bool:
    return case.kind in ("unroll", "gradient-matching", "step", "dsa")


def select(
    every: Sequence[Contender], only: Sequence[str], without: Sequence[str], compiles: bool = True
) -> list[Contender]:
    """The contenders that a text of ``only`` means, if there is any, and that none of ``without``
    means.

    A text means the contender of that name, or where there is none all whose names contain it. With
    ``compiles`` false those that compile take part only where ``only`` asks for them.
    """
    names = [contender.name for contender in every]

    def meant(texts: Sequence[str]) -> set[str]:
        return {
            name
            for text in texts
            for name in ([text] if text in names else [n for n in names if text in n])
        }

    wanted = meant(only) if only else {c.name for c in every if compiles or not c.compiles}
    return [contender for contender in every if contender.name in wanted - meant(without)]


def check(
    every: Sequence[Sequence[Contender]], only: Sequence[str], without: Sequence[str]
) -> None:
    """Raises UsageError where a text means no contender of any of the cases, whose contenders these
    are.
    """
    names = list(dict.fromkeys(contender.name for some in every for contender in some))
    for text in [*only, *without]:
        if not any(text in name for name in names):
            raise UsageError(f"no contender's name contains {text!r}; they are: {'; '.join(names)}")


# ---- by kind of case ----


def _precise(made: Sequence[tuple[Contender, Sequence[str]]]) -> list[Contender]:
    """Each in every one of its precisions, which then are part of its name."""
    return [
        Contender(f"{c.name}, {p}", c.note, c.ours, c.exact, c.compiles, p, c.options)
        for c, precisions in made
        for p in precisions
    ]


_BOTH, _ALL = ("float32", "tf32"), ("float32", "tf32", "bfloat16")


def _autograd(
    label: str, note: str, function: str, channels_last: bool = False, **more: Any
) -> Contender:
    return Contender(
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


def _unroll(on_gpu: bool) -> list[Contender]:
    if on_gpu:
        # Whole iterations, as a run makes them: what a graph holds is the update too.
        made: list[tuple[Contender, Sequence[str]]] = [
            (_matching(graph, memory), _ALL)
            for graph, memory in ((True, "recompute"), (True, "cache"), (False, "recompute"))
        ]
        made += [
            (_PLAIN, _BOTH),
            (_PLAIN_LAST, _ALL),
            (_FROZEN, _BOTH),
            (_CHECKPOINTED, ("float32",)),
        ]
        return _precise([*made, (_FUNCTIONAL, ("float32",)), (_COMPILED, _BOTH)])
    own = [
        Contender(
            f"ours, {memory}, {convolution}",
            f"exact; memory={memory!r}, convolution={convolution!r}",
            ours=True,
            options={"engine": "auto", "memory": memory, "convolution": convolution},
        )
        for memory in ("recompute", "cache")
        for convolution in ("auto", "direct")
    ]
    own.append(
        Contender(
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


def _matching(graph: bool, memory: str) -> Contender:
    label = f"ours, {'graph' if graph else 'eager'}, {memory}"
    note = f"exact; memory={memory!r}{', one CUDA graph' if graph else ''}"
    return Contender(label, note, ours=True, options={"graph": graph, "memory": memory})


def _own(label: str, note: str, **options: Any) -> Contender:
    return Contender(
        label, note, ours=True, options={"engine": "auto", "convolution": "auto", **options}
    )


_AUTO = _own("ours, auto", "convolution='auto'")
_DIRECT = _own("ours, direct", "convolution='direct'", convolution="direct")
_EAGER = Contender("eager PyTorch", "planar memory (NCHW)", options={"channels_last": False})
_EAGER_LAST = Contender(
    "eager PyTorch, channels-last", "channels-last memory", options={"channels_last": True}
)


_PLAIN_CLASS = _autograd(
    "plain autograd", "exact; create_graph=True, a class at a time, as IDC's script has it", "plain"
)
_PLAIN_CLASS_LAST = _autograd(
    "plain autograd, channels-last", "the same in channels-last memory", "plain", True
)
_FUNCTIONAL_CLASS = _autograd("torch.func", "exact; jvp of grad, a class at a time", "functional")


def _gradient_matching(on_gpu: bool) -> list[Contender]:
    module = _own("ours, any module", "exact; engine='autograd'", engine="autograd")
    others = (_PLAIN_CLASS, _PLAIN_CLASS_LAST, _FUNCTIONAL_CLASS)
    if not on_gpu:
        return [_AUTO, _DIRECT, module, *others]
    own = _own("ours", "exact; pdd_fast.gradient_matching")
    precisions = (_ALL, ("float32",), _BOTH, _ALL, ("float32",))
    return _precise(list(zip((own, module, *others), precisions, strict=True)))


def _step(on_gpu: bool) -> list[Contender]:
    compiled = Contender(
        "PyTorch, compiled",
        "network and loss under torch.compile",
        compiles=True,
        options={"channels_last": False, "compiled": True},
    )
    if not on_gpu:
        module = Contender(
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


def _dsa(on_gpu: bool) -> list[Contender]:
    note = "a handful of torch calls per operation"
    return [
        Contender("ours", "pdd_fast.DSA and pdd_fast.augment", ours=True),
        Contender("eager PyTorch", note),
    ]


def _evaluate(on_gpu: bool) -> list[Contender]:
    if not on_gpu:
        return [_AUTO, _DIRECT, _EAGER, _EAGER_LAST]
    return _precise(
        [
            (_own("ours", "pdd_fast.evaluation.evaluate"), _ALL),
            (_EAGER, _BOTH),
            (_EAGER_LAST, _BOTH),
        ]
    )


def _stage(on_gpu: bool) -> list[Contender]:
    module = _own("ours, any module", "engine='autograd'", engine="autograd")
    loop = Contender(
        "MTT's loop", "create_graph=True and torch.optim.SGD", options={"channels_last": False}
    )
    loop_last = Contender(
        "MTT's loop, channels-last", "the same in channels-last", options={"channels_last": True}
    )
    if not on_gpu:
        return [_AUTO, _DIRECT, module, loop, loop_last]
    own = _own("ours", "pdd_fast.progressive.stages")
    return _precise([(own, _ALL), (module, ("float32",)), (loop, _BOTH), (loop_last, _BOTH)])


_MAKERS: dict[str, Callable[[bool], list[Contender]]] = {
    "unroll": _unroll,
    "gradient-matching": _gradient_matching,
    "step": _step,
    "dsa": _dsa,
    "evaluate": _evaluate,
    "stage": _stage,
}
