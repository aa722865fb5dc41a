"""Registration of operators with torch's dispatcher, and the checks that all operators share.

The arguments of an operator are written once, as the fields of a ``NamedTuple`` whose methods check
them, allocate the results, call the compiled kernel and compute the reference (:class:`Call`).
:class:`Operator` makes torch's schema from the fields and registers the methods.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Generic, ParamSpec, Protocol, TypeVar, get_args, get_type_hints

import torch
from torch import Tensor

from pdd_fast.ops import _native

_LIBRARY = torch.library.Library("pdd_fast", "DEF")
_SCHEMA_TYPES = {Tensor: "Tensor", float: "float", bool: "bool", Sequence[int]: "int[]"}

_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")
_ResultOf = TypeVar("_ResultOf", covariant=True)


class Call(Protocol[_ResultOf]):
    """Arguments of one call of an operator: a NamedTuple whose first field is a tensor.

    That tensor gives the device. If images have 16 bits, so has it.
    """

    def __iter__(self) -> Iterator[Any]:
        """Yield the arguments in order."""
        ...

    def check(self, name: str) -> None:
        """Raise ValueError or TypeError unless the arguments fit; runs before any other method.

        Args:
            name: name of the operator, for the message.
        """
        ...

    def allocate(self) -> _ResultOf:
        """Return uninitialized results; also the fake kernel."""
        ...

    def kernel(self, name: str) -> _ResultOf:
        """Return the results of the compiled kernel ``name``."""
        ...

    def reference(self) -> _ResultOf:
        """Return the results in plain torch.

        Tests compare with them, and they are the results if nothing was compiled.
        """
        ...


class Operator(Generic[_Arguments, _Result]):
    """Function ``pdd_fast::<name>`` of torch's dispatcher, for CPU, CUDA and fake tensors.

    Args:
        name: name of the operator and of its compiled kernel.
        record: class of its arguments.
    """

    def __init__(self, name: str, record: Callable[_Arguments, Call[_Result]]) -> None:
        self.name, self._record = name, record
        # torch leaves out trailing arguments that equal their defaults.
        positional: Callable[..., Call[_Result]] = record
        _LIBRARY.define(_schema(name, record))
        for key in ("CPU", "CUDA"):
            _LIBRARY.impl(name, lambda *given: self._compute(positional(*given)), key)
        torch.library.register_fake(
            f"pdd_fast::{name}", lambda *given: positional(*given).allocate(), lib=_LIBRARY
        )
        self._dispatched = getattr(torch.ops.pdd_fast, name).default

    def __call__(self, *arguments: _Arguments.args, **named: _Arguments.kwargs) -> _Result:
        """Return the results of the kernel, or those of the reference if none was compiled."""
        return self._dispatched(*arguments, **named)

    def reference(self, *arguments: _Arguments.args, **named: _Arguments.kwargs) -> _Result:
        """Return the results in plain torch."""
        return self._record(*arguments, **named).reference()

    def _compute(self, call: Call[_Result]) -> _Result:
        call.check(self.name)
        first = next(iter(call))
        device_type = first.device.type
        if _native.load(device_type) is None:
            _native.explain_missing(device_type)
            return computed_in_32_bits(self.reference, *call)
        if device_type == "cuda" or first.dtype not in HALF:
            return call.kernel(self.name)
        record: Callable[..., Call[_Result]] = self._record
        return computed_in_32_bits(lambda *wide: record(*wide).kernel(self.name), *call)


def _schema(name: str, record: Any) -> str:
    """Return the operator's name, arguments and results in torch's schema language."""
    defaults = record._field_defaults
    arguments = [
        f"{_SCHEMA_TYPES[kind]} {field}" + (f"={defaults[field]}" if field in defaults else "")
        for field, kind in get_type_hints(record).items()
    ]
    result = get_type_hints(record.allocate)["return"]
    results = ["Tensor" for _ in get_args(result) or (result,)]
    return f"{name}({', '.join(arguments)}) -> ({', '.join(results)})"


HALF = (torch.bfloat16, torch.float16)


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the type of sums, statistics and per-channel vectors for images of type ``dtype``."""
    return torch.float32 if dtype in HALF else dtype


def require_floating(
    operator: str, argument: str, tensor: torch.Tensor, half: bool = False
) -> None:
    """Raise TypeError unless ``tensor`` is float32 or float64, or 16-bit if ``half``."""
    allowed = (torch.float32, torch.float64, *(HALF if half else ()))
    if tensor.dtype not in allowed:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in allowed[:-1])
        last = str(allowed[-1]).removeprefix("torch.")
        raise TypeError(f"{operator}: {argument} must be {names} or {last}, got {tensor.dtype}")


def require_like(
    operator: str,
    argument: str,
    tensor: torch.Tensor,
    like: torch.Tensor,
    shape: tuple[int, ...],
    dtype: torch.dtype | None = None,
) -> None:
    """Raise TypeError or ValueError unless ``tensor`` has the shape, device and type asked for.

    Args:
        operator: name of the operator, for the message.
        argument: name of ``tensor``, for the message.
        tensor: the argument.
        like: tensor that gives the device, and the type if ``dtype`` is None.
        shape: required shape.
        dtype: required type.
    """
    wanted = like.dtype if dtype is None else dtype
    if tensor.dtype != wanted:
        raise TypeError(f"{operator}: {argument} must be {wanted}, got {tensor.dtype}")
    if tensor.device != like.device:
        raise ValueError(f"{operator}: {argument} must be on {like.device}, got {tensor.device}")
    if tensor.shape != shape:
        raise ValueError(
            f"{operator}: {argument} must have shape {tuple(shape)}, got {tuple(tensor.shape)}"
        )


def computed_in_32_bits(function: Callable[..., Any], *arguments: Any) -> Any:
    """Return ``function`` of the arguments, with 16-bit tensors computed in float32.

    Results that are images are rounded back to 16 bits. The CUDA kernels do the same in registers;
    this serves the CPU and the references. If images have 16 bits, so has the first argument.
    """
    half = arguments[0].dtype
    if half not in HALF:
        return function(*arguments)
    wide = (a.float() if isinstance(a, torch.Tensor) and a.dtype == half else a for a in arguments)
    results = function(*wide)
    if isinstance(results, torch.Tensor):
        return results.to(half)
    return tuple(r.to(half) if r.dim() == 4 else r for r in results)
