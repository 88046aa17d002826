"""MapCache: a cache with a limit of bytes for block maps and what is computed from them."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Generic, Protocol, TypeVar

__all__ = ["Item", "MapCache", "Sized", "grown"]


class Sized(Protocol):
    """What a MapCache holds."""

    @property
    def nbytes(self) -> int: ...


Item = TypeVar("Item", bound=Sized)
_growths = [0]  # how often something that caches hold has grown


def grown() -> None:
    """Note that something that caches may hold takes more memory than before."""
    _growths[0] += 1


class MapCache(Generic[Item]):
    """Maps by key, least recently used out first, within a limit of bytes."""

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        self._items: OrderedDict[Hashable, Item] = OrderedDict()
        self._growths = 0  # when it was last held to the limit

    def __len__(self) -> int:
        return len(self._items)

    @property
    def nbytes(self) -> int:
        return sum(item.nbytes for item in self._items.values())

    def get(self, key: Hashable, make: Callable[[], Item]) -> Item:
        """The item of ``key``, made when it is not there. The last one that was asked for stays,
        whatever its size."""
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
