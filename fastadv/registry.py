"""Names to objects, with errors that help."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping
from typing import TypeVar

from fastadv.errors import SettingsError

T = TypeVar("T")


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The cure for an unknown name: the nearest known one first, then all of them."""
    known = sorted(known)
    near = difflib.get_close_matches(name, known, n=1)
    listing = f"known: {', '.join(known)}"
    return f"did you mean {near[0]!r}? {listing}" if near else listing


class Registry(Mapping[str, T]):
    """A mapping that refuses to register a name twice and answers an unknown name with the nearest known one."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._items: dict[str, T] = {}

    def add(self, name: str, item: T) -> None:
        """Register ``item``. Raises SettingsError when another one holds the name."""
        if name in self._items:
            raise SettingsError(f"{self.kind} {name!r} is registered already", "choose another name")
        self._items[name] = item

    def __getitem__(self, name: str) -> T:
        if name not in self._items:
            raise SettingsError(f"unknown {self.kind} {name!r}", did_you_mean(name, self._items))
        return self._items[name]

    def __contains__(self, name: object) -> bool:
        return name in self._items

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._items))

    def __len__(self) -> int:
        return len(self._items)
