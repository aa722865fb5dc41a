"""torch's private interface still gives the answers that the package asks it for."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules import module as modules
from torch.overrides import TorchFunctionMode
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils._python_dispatch import TorchDispatchMode

from pdd_fast.runtime import torch_internals

PACKAGE = Path(torch_internals.__file__).parents[1]
PLAIN = torch.zeros(1)
QUESTIONS = {
    "transform": torch_internals.in_transform,
    "forward mode": torch_internals.in_forward_mode,
    "dispatch mode": torch_internals.in_dispatch_mode,
    "function mode": torch_internals.in_function_mode,
    "hooks everywhere": torch_internals.has_global_hooks,
}


class Passing(TorchFunctionMode):
    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> object:
        return func(*args, **(kwargs or {}))


@contextmanager
def hooked(register: Callable[..., torch.utils.hooks.RemovableHandle]) -> Iterator[None]:
    handle = register(lambda *_: None)
    try:
        yield
    finally:
        handle.remove()


def answers() -> set[str]:
    found = {name for name, ask in QUESTIONS.items() if ask()}
    special = bool(found & {"transform", "dispatch mode"})
    assert torch_internals.plain_on_cpu(PLAIN) is not special
    return found


@pytest.mark.parametrize(
    ("place", "expected"),
    [
        (lambda: forward_ad.dual_level(), {"forward mode"}),
        (TorchDispatchMode, {"dispatch mode"}),
        (Passing, {"function mode"}),
        (lambda: torch.device("cpu"), set()),
        (lambda: hooked(modules.register_module_forward_hook), {"hooks everywhere"}),
        (lambda: hooked(modules.register_module_forward_pre_hook), {"hooks everywhere"}),
        (lambda: hooked(modules.register_module_full_backward_hook), {"hooks everywhere"}),
        (lambda: hooked(modules.register_module_full_backward_pre_hook), {"hooks everywhere"}),
    ],
)
def test_each_place_is_seen_and_no_other(
    place: Callable[[], AbstractContextManager[object]], expected: set[str]
) -> None:
    assert answers() == set()
    with place():
        assert answers() == expected
    assert answers() == set()


@pytest.mark.parametrize("transform", [torch.func.vmap, torch.func.grad], ids=["vmap", "grad"])
def test_a_transform_is_seen_with_its_tensors(
    transform: Callable[..., Callable[..., Tensor]],
) -> None:
    seen = []

    def look(x: Tensor) -> Tensor:
        seen.append((answers(), torch_internals.is_in_transform(x), torch_internals.has_memory(x)))
        return x.sum()

    transform(look)(torch.zeros(3))
    assert seen == [({"transform"}, True, False)]
    assert not torch_internals.is_in_transform(torch.zeros(3))


@pytest.mark.parametrize(
    ("tensor", "expected"),
    [
        (torch.zeros(2, 3), True),
        (torch.zeros(2, 3, dtype=torch.int32).t(), True),
        (torch.zeros(3, requires_grad=True), False),
        (torch.zeros(3, device="meta"), False),
        (torch._neg_view(torch.zeros(3)), False),
        (torch._efficientzerotensor((3,)), False),
        (torch.zeros(3).to_sparse(), False),
        (TwoTensor(torch.zeros(3), torch.zeros(3)), False),
    ],
    ids=["plain", "integers", "gradient", "meta", "negative", "zeros", "sparse", "a wrapper"],
)
def test_plain_tensors_on_the_cpu_are_known(tensor: Tensor, expected: bool) -> None:
    assert torch_internals.plain_on_cpu(tensor) is expected


def test_nothing_is_plain_while_it_is_traced_and_everything_without_gradients() -> None:
    seen: list[bool] = []

    def look(x: Tensor) -> Tensor:
        seen.append(torch_internals.plain_on_cpu(x))
        return x + 1

    torch.jit.trace(look, torch.zeros(3), check_trace=False)
    assert seen == [False]
    with torch.no_grad():
        assert torch_internals.plain_on_cpu(torch.zeros(3, requires_grad=True))


@pytest.mark.parametrize(
    ("tensor", "expected"),
    [
        (torch.zeros(3), True),
        (torch.zeros(3)[1:], True),
        (nn.Parameter(torch.zeros(3)), True),
        (torch.zeros(3).to_sparse(), False),
    ],
    ids=["plain", "a slice", "a parameter", "sparse"],
)
def test_tensors_without_memory_are_known(tensor: Tensor, expected: bool) -> None:
    assert torch_internals.has_memory(tensor) is expected


@pytest.mark.parametrize(
    "register",
    [
        "register_forward_hook",
        "register_forward_pre_hook",
        "register_full_backward_hook",
        "register_full_backward_pre_hook",
    ],
)
def test_every_hook_of_a_module_is_seen(register: str) -> None:
    module = nn.ReLU()
    assert not torch_internals.has_hooks(module)
    with hooked(getattr(module, register)):
        assert torch_internals.has_hooks(module)
    assert not torch_internals.has_hooks(module)


@pytest.mark.parametrize("name", ["forward", "_conv_forward"])
def test_a_replaced_method_is_seen_and_called(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    image, module = torch.zeros(1, 1, 1, 1), nn.Conv2d(1, 1, 1)
    assert not torch_internals.layers_are_patched()
    with monkeypatch.context() as patch:
        patch.setattr(nn.Conv2d, name, lambda self, *_: image + 1)
        assert torch_internals.layers_are_patched()
        assert module(image) == 1
    assert not torch_internals.is_patched(module)
    monkeypatch.setattr(module, name, lambda *_: image + 2)
    assert torch_internals.is_patched(module)
    assert not torch_internals.layers_are_patched()
    assert module(image) == 2


def test_the_gradient_of_a_softmax_is_that_of_autograd() -> None:
    logits, grad = torch.randn(4, 3).requires_grad_(), torch.randn(4, 3)
    output = logits.softmax(1)
    (expected,) = torch.autograd.grad(output, logits, grad)
    assert torch.equal(torch_internals.softmax_backward(grad, output.detach()), expected)


def test_no_other_file_uses_the_private_interface() -> None:
    private = re.compile(
        r"\btorch(?:\.\w+)*\._(?!_)\w+|\bforward_ad\._\w+|from torch[\w.]* import \(?[^)\n]*\b_\w+"
        r"|from torch\.[\w.]*\._\w+|\._(?:forward|backward)(?:_pre)?_hooks|\._global_\w+"
    )
    found = {
        (path.relative_to(PACKAGE).as_posix(), match[0])
        for path in PACKAGE.rglob("*.py")
        for match in private.finditer(path.read_text(encoding="utf-8"))
        # An installed package also holds the benchmarks, whose counter of launches is such a mode.
        if path.name != "torch_internals.py" and "benchmarks" not in path.parts
    }
    assert found == set()
