"""Weak references: a denoiser with a plan is freed when nothing else refers to it."""

from __future__ import annotations

import copy
import weakref
from typing import Generic, TypeVar

__all__ = ["Weak"]

T = TypeVar("T")


class Weak(Generic[T]):
    """A weak reference. A copy refers to the copy of the object, which the copy of its owner keeps
    alive."""

    def __init__(self, target: T) -> None:
        self._ref = weakref.ref(target)

    def __call__(self) -> T:
        target = self._ref()
        if target is None:
            raise RuntimeError(
                "a part of a denoiser with a plan was called after the denoiser was freed; keep a "
                "reference to the denoiser, or call remove_plan before calling parts of it"
            )
        return target

    def __deepcopy__(self, memo: dict[int, object]) -> Weak[T]:
        return Weak(copy.deepcopy(self(), memo))
