"""A dict of bounded size."""

from __future__ import annotations

from typing import TypeVar

__all__ = ["Recent"]

MOST = 256
K = TypeVar("K")
V = TypeVar("V")


class Recent(dict[K, V]):
    """Keeps the 256 items that were added last, so that memory stays bounded in a server that runs
    many sizes."""

    def __setitem__(self, key: K, value: V) -> None:
        if key not in self and len(self) >= MOST:
            self.pop(next(iter(self)), None)
        super().__setitem__(key, value)
