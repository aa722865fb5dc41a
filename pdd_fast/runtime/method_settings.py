"""Settings that belong to one method: their base class, and the methods that have a setting.

Listing the names of methods imports no method. A method's settings are defined beside the method,
so looking at them imports it.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, ClassVar

from pydantic import ConfigDict, Field

from pdd_fast.runtime.errors import UsageError, nearest
from pdd_fast.runtime.models import SettingsModel, checked
from pdd_fast.runtime.registry import METHODS

DEFAULT_METHOD = "mtt"
# Names of settings before 0.1, and their names now.
RENAMED = {
    "base": "method",
    "select": "selection_split",
    "guard": "max_rollbacks",
    "clip": "max_grad_norm",
    "ema": "ema_decay",
    "experts": "num_experts",
    "trajectories": "trajectories_per_step",
}


class MethodSettings(SettingsModel):
    """Base class of a method's own settings."""

    # Per-method defaults of the run's settings.
    run_defaults: ClassVar[Mapping[str, Any]] = {}

    name: str = Field("", description="Method that learns the images of a stage.")

    @property
    def trajectory_epochs(self) -> int:
        """Return the last epoch of a trajectory that the method reads, or 0 if it reads none."""
        return 0

    def check_run(self, run: Any) -> None:
        """Check the run's settings against the method; :meth:`require` suffices for most checks.

        Args:
            run: The run's :class:`pdd_fast.settings.Settings`. Its module imports this one.

        Raises:
            UsageError: The method cannot be used with these settings.
        """

    def require(self, run: SettingsModel, **allowed: tuple[Any, ...]) -> None:
        """Require each named setting of ``run`` to have one of the values allowed for it.

        Args:
            run: Settings of the run.
            **allowed: Allowed values by the name of the setting.

        Raises:
            UsageError: A setting has another value.
        """
        for key, values in allowed.items():
            if getattr(run, key) not in values:
                raise UsageError(
                    f"{key} must be {' or '.join(map(str, values))} where method is {self.name}, "
                    f"got {getattr(run, key)}"
                )

    def own(self) -> dict[str, Any]:
        """Return the settings by name, without the method's name."""
        return self.model_dump(exclude={"name"})


class UnknownMethodSettings(MethodSettings):
    """Settings of a method that is not registered here.

    With them, a run of such a method can still be inspected.
    """

    model_config = ConfigDict(extra="allow")


def settings_class(method: str, run_names: Collection[str] = ()) -> type[MethodSettings]:
    """Return the class of the settings of ``method``.

    Args:
        method: Name of the method.
        run_names: Names of the run's settings, which a method's own must not have.

    Raises:
        UsageError: There is no such method here.
        ValueError: The method has a setting with a name in ``run_names``.
    """
    if not METHODS:
        raise UsageError(
            "no method is installed: the entry points of the package are missing; install pdd-fast "
            "again with `pip install .`"
        )
    if method not in METHODS:
        raise UsageError(f"method must be {' or '.join(METHODS)}, got {method!r}")
    found: type[MethodSettings] = METHODS[method].Settings
    if both := sorted(set(found.model_fields) & set(run_names)):
        raise ValueError(
            f"{found.__name__} must have settings of its own, got {' and '.join(both)}, which the "
            "run has; give another default in run_defaults"
        )
    return found


def own_names(method: str) -> list[str]:
    """Return the names of the settings that ``method`` has of its own."""
    return [name for name in settings_class(method).model_fields if name != "name"]


def owners(setting: str) -> list[str]:
    """Return the methods that have ``setting``."""
    return [method for method in METHODS if setting in own_names(method)]


def own_settings(
    method: str, values: Mapping[str, Any], run_names: Collection[str], any_method: bool = False
) -> MethodSettings:
    """Return the checked settings of ``method``.

    Args:
        method: Name of the method.
        values: Its settings by name.
        run_names: Names of the run's settings.
        any_method: Accept a method that is not registered here, with its settings unchecked.

    Raises:
        UsageError: There is no such method here, a setting is unknown, or a value is not allowed.
    """
    if any_method and method not in METHODS:
        return UnknownMethodSettings(name=method, **values)
    model = settings_class(method, run_names)
    for key, value in values.items():
        if key not in model.model_fields or key == "name":
            raise UsageError(_unknown(key, value, method, run_names))
    return checked(model, {**values, "name": method})


def _unknown(setting: str, value: Any, method: str, run_names: Collection[str]) -> str:
    """Return the sentence about a setting that neither the run nor ``method`` has."""
    if setting in RENAMED:
        return f"unknown setting {setting!r}; it is called {RENAMED[setting]!r}"
    if found := owners(setting):
        return (
            f"{setting} must be left out where method is {method}, got {value}; it is a setting of "
            f"{' and '.join(found)}"
        )
    known = ["method", *run_names, *own_names(method)]
    others = [own for other in METHODS for own in own_names(other)]
    return f"unknown setting {setting!r}{nearest(setting, known) or nearest(setting, others)}"


def upgraded(stored: Mapping[str, Any], run_names: Collection[str]) -> dict[str, Any]:
    """Return the flat settings of a file from before methods had their own settings.

    Such a file holds the settings of all methods, some by the names in ``RENAMED``.

    Args:
        stored: The file's settings.
        run_names: Names of the run's settings.
    """
    flat = {RENAMED.get(key, key): value for key, value in stored.items()}
    method = flat.get("method", DEFAULT_METHOD)
    if method not in METHODS:
        return flat
    known = {"method", *run_names, *own_names(method)}
    return {key: value for key, value in flat.items() if key in known or not owners(key)}
