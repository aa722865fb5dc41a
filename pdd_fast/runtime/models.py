"""Typed settings whose errors are one sentence: `<name> must <requirement>, got <value>`."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import PurePath
from typing import Any, Literal, TypeVar, get_args, get_origin

from pydantic import BaseModel, ConfigDict, ValidationError, ValidationInfo, field_validator

from pdd_fast.runtime.errors import UsageError, nearest

M = TypeVar("M", bound="SettingsModel")
N = TypeVar("N", int, float)
_BOUNDS = {  # pydantic's error type -> key of the limit in its context, requirement
    "greater_than": ("gt", "above"),
    "greater_than_equal": ("ge", "at least"),
    "less_than": ("lt", "below"),
    "less_than_equal": ("le", "at most"),
}
_KINDS: dict[Any, str] = {int: "a whole number", float: "a number", str: "text"}


class SettingsModel(BaseModel):
    """Immutable group of settings.

    Values may be text, as on a command line.
    """

    model_config = ConfigDict(
        frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=False
    )

    @field_validator("*", mode="before")
    @classmethod
    def _convert(cls, value: Any, info: ValidationInfo) -> Any:
        """Convert text to a number, and refuse values that the setting's type does not allow."""
        field = cls.model_fields.get(str(info.field_name))
        kind = field.annotation if field is not None else None
        if get_origin(kind) is Literal and all(isinstance(name, str) for name in get_args(kind)):
            kind = str
        try:
            if kind is int and not isinstance(value, bool):
                return whole_number(value)
            if kind is float and not isinstance(value, bool):
                return float(value)
            if kind is str and isinstance(value, str | PurePath):
                return str(value)
        except (TypeError, ValueError, OverflowError):
            pass
        if kind in _KINDS:
            raise UsageError(f"{info.field_name} must be {_KINDS[kind]}, got {value!r}")
        return value


def whole_number(value: Any) -> int:
    """Return ``value`` as an int; text such as "1e3" is converted.

    Raises:
        TypeError, ValueError, OverflowError: The value is not a whole number.
    """
    if isinstance(value, str):
        try:
            # A conversion through float would be exact only up to 2^53.
            return int(value)
        except ValueError:
            value = float(value)
    if value != int(value):
        raise ValueError
    return int(value)


def listed(text: str, read: Callable[[str], N]) -> tuple[N, ...]:
    """Return the comma-separated numbers in ``text``, or () if ``read`` refuses one."""
    try:
        return tuple(read(part.strip()) for part in text.split(","))
    except (ValueError, OverflowError):
        return ()


def numbers(setting: str, text: str) -> tuple[float, ...]:
    """Return the comma-separated non-negative numbers in ``text``.

    Raises:
        UsageError: The text contains something else.
    """
    found = listed(text, float)
    if not found or not all(math.isfinite(number) and number >= 0 for number in found):
        raise UsageError(
            f"{setting} must be numbers from 0 on, joined by commas, as in 1000,500,500, got "
            f"{text!r}"
        )
    return found


def whole_numbers(setting: str, text: str) -> tuple[int, ...]:
    """Return the comma-separated positive whole numbers in ``text``.

    Raises:
        UsageError: The text contains something else.
    """
    found = listed(text, whole_number)
    if not found or min(found) < 1:
        raise UsageError(
            f"{setting} must be whole numbers from 1 on, joined by commas, as in 4,2,2,1,1, got "
            f"{text!r}"
        )
    return found


def checked(model: type[M], values: Mapping[str, Any]) -> M:
    """Return ``model(**values)``.

    Raises:
        UsageError: A value is not allowed.
    """
    try:
        return model(**values)
    except ValidationError as error:
        raise UsageError(sentence(error, model)) from None


def sentence(error: ValidationError, model: type[BaseModel]) -> str:
    """Return the first problem in ``error`` as a sentence."""
    first = error.errors(include_url=False)[0]
    name, value = ".".join(map(str, first["loc"])), first["input"]
    kind, context = first["type"], first.get("ctx", {})
    if kind == "value_error":  # a validator's own sentence
        return str(context["error"])
    if kind == "extra_forbidden":
        return f"unknown setting {name!r}{nearest(name, model.model_fields)}"
    if kind in _BOUNDS:
        limit, words = _BOUNDS[kind]
        return f"{name} must be {words} {context[limit]:g}, got {value}"
    if kind == "finite_number":
        return f"{name} must be a finite number, got {value}"
    if kind == "literal_error":
        return f"{name} must be {_names(first, model)}, got {value!r}"
    requirement = first["msg"].replace("Input should", "must").partition(",")[0]
    return f"{name} {requirement}, got {value!r}"


def _names(error: Mapping[str, Any], model: type[BaseModel]) -> str:
    field = model.model_fields.get(str(error["loc"][0]))
    found = get_args(field.annotation) if field is not None else ()
    return " or ".join(map(str, found))
