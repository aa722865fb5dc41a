"""Every setting with its field, and settings small enough that one at a time can be tried."""

from __future__ import annotations

from typing import Any, Literal, get_args, get_origin

from pdd_fast.runtime.registry import METHODS
from pdd_fast.settings import Settings, method_settings, resolve

# Every setting with the method that it is tried with: the run's with mtt, a method's with its own.
FIELDS = {
    (method, name): field
    for method in METHODS
    for model in (method_settings(method), *([Settings] if method == "mtt" else []))
    for name, field in model.model_fields.items()
    if name not in ("name", "method")
}


IDS = [f"{method}-{name}" for method, name in FIELDS]


TYPES = {
    key: str if get_origin(field.annotation) is Literal else field.annotation
    for key, field in FIELDS.items()
}


NUMBERS = [key for key in FIELDS if TYPES[key] is not str]


def bounds(kind: str) -> list[tuple[str, str, float]]:
    """Method, setting and limit of every bound of a kind: ge, gt, le or lt."""
    return [
        (*key, getattr(limit, kind))
        for key, field in FIELDS.items()
        for limit in field.metadata
        if hasattr(limit, kind)
    ]


CHOICES = {key: get_args(f.annotation) for key, f in FIELDS.items() if get_args(f.annotation)}


# Within every bound that links two settings, and of no recipe, so that one setting at a time can be
# tried.
RUN: dict[str, Any] = {"dataset": "mnist-like", "stages": 1, "ipc": 1, "expert_train_epochs": 1}


SMALL: dict[str, Any] = RUN | {"max_start_epoch": 0, "expert_epochs": 1}


def with_one(method: str, **changes: Any) -> Settings:
    """Small settings with ``changes``."""
    return resolve(**(SMALL if method == "mtt" else RUN | {"method": method}) | changes)


def value(settings: Settings, name: str) -> Any:
    """The value of a setting by its flat name."""
    return settings.flat()[name]
