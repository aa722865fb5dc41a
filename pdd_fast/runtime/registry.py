"""Classes by name, from the entry points of installed packages and from this process."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cached_property
from importlib.metadata import EntryPoint, entry_points
from typing import Any


class Registry(Mapping[str, type[Any]]):
    """Mapping from names to classes.

    Listing the names imports nothing. A class is imported when it is looked up.

    Args:
        group: Group of the entry points, e.g. "pdd_fast.methods".
    """

    def __init__(self, group: str) -> None:
        self.group = group
        self._added: dict[str, type[Any]] = {}

    @cached_property
    def _installed(self) -> dict[str, EntryPoint]:
        # This package's own entries come first, so that no other package can replace them.
        found: dict[str, EntryPoint] = {}
        for entry in sorted(entry_points(group=self.group), key=_order):
            found.setdefault(entry.name, entry)
        return found

    def __getitem__(self, name: str) -> type[Any]:
        if name in self._added:
            return self._added[name]
        loaded: type[Any] = self._installed[name].load()
        return loaded

    def __iter__(self) -> Iterator[str]:
        return iter(dict.fromkeys([*self._installed, *self._added]))

    def __len__(self) -> int:
        return len(list(iter(self)))

    def __contains__(self, name: object) -> bool:
        return name in self._installed or name in self._added

    def register(self, name: str, cls: type[Any]) -> None:
        """Register ``cls`` under ``name`` in this process.

        Raises:
            ValueError: The name belongs to another class.
        """
        if name in self and self[name] is not cls:
            raise ValueError(
                f"register: name must be new, got {name!r}, which is {self[name].__name__}"
            )
        self._added[name] = cls

    def unregister(self, name: str) -> None:
        """Undo :meth:`register`."""
        del self._added[name]


def _order(entry: EntryPoint) -> tuple[bool, str]:
    return not entry.value.startswith("pdd_fast."), entry.name


METHODS = Registry("pdd_fast.methods")
