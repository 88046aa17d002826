"""References that keep nothing alive: a denoiser with a plan is freed with its last user."""

from __future__ import annotations

import copy
import weakref
from typing import Generic, TypeVar

__all__ = ["Weak"]

T = TypeVar("T")


class Weak(Generic[T]):
    """An object that is not kept alive. A copy refers to the copy of the object, which the copy of
    its owner keeps alive."""

    def __init__(self, own: T) -> None:
        self._ref = weakref.ref(own)

    def __call__(self) -> T:
        own = self._ref()
        if own is None:
            raise RuntimeError(
                "a part of a denoiser with a plan is called, and the denoiser is gone; keep the "
                "denoiser, or remove_plan before calling parts of it"
            )
        return own

    def __deepcopy__(self, memo: dict[int, object]) -> Weak[T]:
        return Weak(copy.deepcopy(self(), memo))
