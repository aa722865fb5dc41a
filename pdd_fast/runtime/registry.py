"""Classes by name: those of installed packages, by their entry points, and this process's own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cached_property
from importlib.metadata import EntryPoint, entry_points
from typing import Any


class Registry(Mapping[str, type[Any]]):
    """Names are listed without an import; a class is imported when it is asked for.

    Args:
        group: of the entry points, e.g. "pdd_fast.methods".
    """

    def __init__(self, group: str) -> None:
        self.group = group
        self._added: dict[str, type[Any]] = {}

    @cached_property
    def _installed(self) -> dict[str, EntryPoint]:
        # This package's own come first, and nobody else's takes the place of one of them.
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
        """Make ``name`` mean ``cls``, in this process.

        Raises:
            ValueError: the name is another class's.
        """
        if name in self and self[name] is not cls:
            raise ValueError(
                f"register: name must be new, got {name!r}, which is {self[name].__name__}"
            )
        self._added[name] = cls

    def unregister(self, name: str) -> None:
        """Take back what :meth:`register` did."""
        del self._added[name]


def _order(entry: EntryPoint) -> tuple[bool, str]:
    return not entry.value.startswith("pdd_fast."), entry.name


METHODS = Registry("pdd_fast.methods")
