"""The unroll's value and gradient against plain autograd through all steps, over everything that a
caller can vary."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import plain
import pytest
import torch
from cases import relative_error
from torch import Tensor, nn
from unroll_support import ENGINES, SINGLE, Problem, make

import pdd_fast
from pdd_fast import engines
from pdd_fast.ops import convnet
from pdd_fast.ops._buffers import Buffer
from pdd_fast.runtime import device_memory
from pdd_fast.runtime import host_memory as host


def bytes_of_a_step(problem: Problem, engine: str, batch: int = 5) -> int:
    C, H, W = problem.images.shape[1:]
    shape = engines.PassShape(batch, (C, H, W), problem.theta.dtype, problem.theta.device)
    return engines.choose(problem.net, engine).saved_bytes(shape)


class Watched:
    """The dual passes of all engines: whether each was given activations, and how many steps' were
    alive then.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.kept: list[bool] = []
        self.alive: list[int] = []
        self._seen: list[weakref.ref[Any]] = []
        for engine in (engines.FusedEngine, engines.AutogradEngine):
            monkeypatch.setattr(engine, "gradient", self._gradient(engine.gradient))
            monkeypatch.setattr(engine, "dual", self._dual(engine.dual))

    @staticmethod
    def _tensor(saved: Any) -> Tensor | None:
        """One of the tensors that a step keeps; None where it keeps no activations."""
        if isinstance(saved, Buffer):  # of the kernel
            return saved.tensor
        if hasattr(saved, "blocks"):  # of the composed passes
            return saved.blocks[-1].z
        return getattr(saved, "gradient", None)  # of autograd

    def _gradient(self, method: Callable[..., Any]) -> Callable[..., Any]:
        def gradient(*args: Any, **options: Any) -> Any:
            result = method(*args, **options)
            tensor = self._tensor(result[2])
            if tensor is not None:
                self._seen.append(weakref.ref(tensor))
            return result

        return gradient

    def _dual(self, method: Callable[..., Any]) -> Callable[..., Any]:
        def dual(
            engine: Any,
            theta: Any,
            images: Any,
            labels: Any,
            direction: Any,
            saved: Any,
            **options: Any,
        ) -> Any:
            self.kept.append(self._tensor(saved) is not None)
            self.alive.append(sum(ref() is not None for ref in self._seen))
            return method(engine, theta, images, labels, direction, saved, **options)

        return dual


# ---- memory="auto", and what becomes of kept activations ----


@ENGINES
@pytest.mark.parametrize("steps", [0, 1, 3, 4])
@pytest.mark.parametrize("spare", [0, 1])
def test_as_many_steps_are_kept_as_fit_and_the_last_ones(
    engine: str, steps: int, spare: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    problem = make(steps=4, dsa=SINGLE, soft=True)
    expected = problem.gradients(pdd_fast.unroll, engine=engine)
    size, watched = bytes_of_a_step(problem, engine), Watched(monkeypatch)
    limit = steps * size + spare * (size - 1)
    found = problem.gradients(pdd_fast.unroll, engine=engine, memory="auto", memory_limit=limit)
    assert watched.kept == [True] * steps + [False] * (
        4 - steps
    )  # the way back begins with the last step
    for name, truth in expected.items():
        assert relative_error(found[name], truth) <= 1e-12, name


@ENGINES
@pytest.mark.parametrize("limit", [0, 10**15])
def test_no_limit_and_no_memory_are_the_other_two_modes(engine: str, limit: int) -> None:
    problem = make(steps=3, dsa=SINGLE).to(torch.float32, "cpu")
    mode = problem.gradients(
        pdd_fast.unroll, engine=engine, memory="cache" if limit else "recompute"
    )
    found = problem.gradients(pdd_fast.unroll, engine=engine, memory="auto", memory_limit=limit)
    for name, value in mode.items():
        assert torch.equal(found[name], value), name


@pytest.mark.parametrize("engine", ["fused", "composed"], indirect=True)
def test_the_path_has_the_same_bits_whatever_is_kept(engine: str) -> None:
    """The gradient has not: what was kept and what is made again is added in another order."""
    problem = make(steps=5, batch=30, width=16, dsa=SINGLE).to(torch.float32, "cpu")
    size = bytes_of_a_step(problem, engine, 30)
    expected = problem.gradients(pdd_fast.unroll, engine=engine)
    for limit in (0, 2 * size, 5 * size):
        found, again = (
            problem.gradients(pdd_fast.unroll, engine=engine, memory="auto", memory_limit=limit)
            for _ in range(2)
        )
        assert torch.equal(found["theta_N"], expected["theta_N"])
        for name, value in expected.items():
            assert relative_error(found[name], value) <= 1e-3, name
            assert torch.equal(found[name], again[name]), name


def test_memory_that_waits_for_the_next_call_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else every call would keep fewer steps than the one before, and round differently."""
    problem = make(steps=4)
    size, watched = bytes_of_a_step(problem, "fused"), Watched(monkeypatch)
    pdd_fast.free_buffers()
    monkeypatch.setattr(host, "free", lambda: 6 * size - convnet.idle_bytes())
    for _ in range(3):
        problem.gradients(pdd_fast.unroll, memory="auto")
        assert convnet.idle_bytes() == 3 * size
    assert watched.kept == 3 * [True, True, True, False]


def test_batches_of_other_sizes_take_what_they_take(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = make(steps=4)
    problem.batches = [torch.arange(count) % 7 for count in (1, 40, 5, 20)]
    sizes = {count: bytes_of_a_step(problem, "fused", count) for count in (1, 5, 20, 40)}
    watched, limit = Watched(monkeypatch), sizes[20] + sizes[5] + sizes[1]
    problem.gradients(pdd_fast.unroll, memory="auto", memory_limit=limit)
    # The first step would fit, but not the one after it: activations lie in one row at the end.
    assert watched.kept == [True, True, False, False]


def test_half_of_what_is_free_is_the_limit_of_whom_names_none(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    problem = make(steps=4)
    size, watched = bytes_of_a_step(problem, "fused"), Watched(monkeypatch)
    monkeypatch.setattr(device_memory, "free", lambda device, reclaimable: 5 * size)
    problem.gradients(pdd_fast.unroll, memory="auto")
    assert watched.kept == [True, True, False, False]


@ENGINES
def test_activations_go_as_soon_as_they_were_used(
    engine: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    problem, watched = make(steps=4), Watched(monkeypatch)
    gc.disable()  # nothing waits for the collector
    try:
        problem.gradients(pdd_fast.unroll, engine=engine, memory="cache")
    finally:
        gc.enable()
    assert watched.alive == [4, 3, 2, 1]


@ENGINES
def test_without_gradients_no_activations_are_kept(
    engine: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    problem, modes = make(), list[bool]()
    for each in (engines.FusedEngine, engines.AutogradEngine):
        original = each.gradient

        def gradient(*args: Any, original: Any = original, keep: bool = False) -> Any:
            modes.append(keep)
            return original(*args, keep=keep)

        monkeypatch.setattr(each, "gradient", gradient)
    images = problem.images.clone().requires_grad_()
    arguments = (problem.labels, problem.lrs, problem.batches)
    pdd_fast.unroll(
        problem.net, problem.theta, problem.images, *arguments, engine=engine, memory="cache"
    )
    with torch.no_grad():
        pdd_fast.unroll(
            problem.net, problem.theta, images, *arguments, engine=engine, memory="cache"
        )
    assert modes == [False] * 6
    pdd_fast.unroll(problem.net, problem.theta, images, *arguments, engine=engine, memory="cache")
    assert modes == [False] * 6 + [True] * 3


@ENGINES
@pytest.mark.parametrize("memory", ["recompute", "cache", "auto"])
def test_the_way_back_can_be_gone_twice_where_the_graph_is_retained(
    engine: str, memory: str
) -> None:
    problem = make(steps=4, dsa=SINGLE)
    images = problem.images.clone().requires_grad_()
    limit = 2 * bytes_of_a_step(problem, engine) if memory == "auto" else None
    result = pdd_fast.unroll(
        problem.net,
        problem.theta,
        images,
        problem.labels,
        problem.lrs,
        problem.batches,
        problem.augmentations,
        engine=engine,
        memory=memory,
        memory_limit=limit,
    )
    first, second = (
        torch.autograd.grad(result @ problem.direction, images, retain_graph=True)[0]
        for _ in range(2)
    )
    assert relative_error(second, first) <= 1e-12
    (last,) = torch.autograd.grad(result @ problem.direction, images)
    assert relative_error(last, first) <= 1e-12
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(result @ problem.direction, images)


@pytest.mark.parametrize("memory", ["recompute", "cache", "auto"])
def test_steps_that_draw_numbers_are_made_again_with_the_same_ones(
    memory: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    net = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.Softplus(), nn.Dropout(0.4), nn.Flatten(), nn.Linear(4 * 36, 3)
    ).double()
    problem = replace(make(steps=4), net=net, theta=pdd_fast.flatten_parameters(net))
    problem.direction = torch.randn_like(problem.theta)
    size = bytes_of_a_step(problem, "autograd")
    images, watched = problem.images.clone().requires_grad_(), Watched(monkeypatch)
    torch.manual_seed(7)
    expected = replace(problem, net=copy.deepcopy(net)).gradients(plain.unroll)["images"]
    torch.manual_seed(7)
    result = pdd_fast.unroll(
        net,
        problem.theta,
        images,
        problem.labels,
        problem.lrs,
        problem.batches,
        memory=memory,
        memory_limit=2 * size if memory == "auto" else None,
    )
    for _ in range(2):
        (found,) = torch.autograd.grad(result @ problem.direction, images, retain_graph=True)
        assert relative_error(found, expected) <= 1e-12
    kept = {"recompute": 0, "cache": 4, "auto": 2}[memory]
    assert watched.kept == [True] * kept + [False] * (8 - kept)


def test_what_a_step_of_any_module_keeps_is_found_by_making_one() -> None:
    problem = make()
    C, H, W = problem.images.shape[1:]

    class Unknown(pdd_fast.ConvNet):
        """May have another forward, for all that an engine knows."""

    unknown = Unknown(3, 3, (H, W), 6, 2).double()
    before = torch.get_rng_state()
    for batch in (64, 1000):
        shape = engines.PassShape(batch, (C, H, W), torch.float64, torch.device("cpu"))
        found, formula = (
            engines.AutogradEngine(net).saved_bytes(shape) for net in (unknown, problem.net)
        )
        assert 0.75 * formula <= found <= 1.35 * formula
    assert torch.equal(torch.get_rng_state(), before)
    assert engines.AutogradEngine(unknown).working_bytes(shape) == 0
