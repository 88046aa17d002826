"""MapCache: a cache for block maps and objects computed from them, with a limit in bytes."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Generic, Protocol, TypeVar

__all__ = ["Item", "MapCache", "Sized", "grown"]


class Sized(Protocol):
    """An object that a MapCache can hold."""

    @property
    def nbytes(self) -> int: ...


Item = TypeVar("Item", bound=Sized)
_growths = [0]  # counts the calls of ``grown``


def grown() -> None:
    """Record that an object which a cache may hold has grown, so that caches check their limits."""
    _growths[0] += 1


class MapCache(Generic[Item]):
    """A cache of maps by key with a limit in bytes; it drops the least recently used map first."""

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        self._items: OrderedDict[Hashable, Item] = OrderedDict()
        self._growths = 0  # value of ``_growths[0]`` at the last check of the limit

    def __len__(self) -> int:
        return len(self._items)

    @property
    def nbytes(self) -> int:
        return sum(item.nbytes for item in self._items.values())

    def get(self, key: Hashable, make: Callable[[], Item]) -> Item:
        """Return the item of ``key``; create it if it is missing. The most recently used item stays
        in the cache, whatever its size."""
        if key in self._items:
            self._items.move_to_end(key)
        else:
            self._items[key] = make()
            grown()
        item = self._items[key]
        if self._growths != _growths[0]:
            self._growths = _growths[0]
            left = self.nbytes - self.limit_bytes
            while len(self._items) > 1 and left > 0:
                left -= self._items.popitem(last=False)[1].nbytes
        return item

    def clear(self) -> None:
        self._items.clear()
