"""Checks of arguments that edits and guidances share: numbers, shares and windows of steps."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

__all__ = ["check_number", "check_share", "check_window", "in_window", "numbers_of"]


def numbers_of(name: str, value: object) -> tuple[int, ...]:
    """One or several numbers from 0 on."""
    items = [value] if isinstance(value, int) else value
    if isinstance(items, (str, bytes)) or not isinstance(items, Sequence):
        raise TypeError(f"{name} is {value!r}; it must be whole numbers from 0 on")
    for item in items:
        if isinstance(item, bool) or not isinstance(item, int) or item < 0:
            raise ValueError(f"{name} has {item!r}; it must be whole numbers from 0 on")
    return tuple(items)


def check_window(name: str, start: object, stop: object) -> None:
    """Raise ValueError for a window that is not one."""
    for bound in (start, stop):
        if isinstance(bound, bool) or not isinstance(bound, (int, float)) or bound < 0:
            raise ValueError(
                f"{name}(start={start!r}, stop={stop!r}) must be steps, or shares of the steps "
                "from 0.0 to 1.0"
            )
        if isinstance(bound, float) and bound > 1:
            raise ValueError(f"{name} has {bound} for a share of the steps; it is at most 1.0")
    if isinstance(start, int) == isinstance(stop, int) and start >= stop:  # type: ignore[operator]
        raise ValueError(f"{name}(start={start!r}, stop={stop!r}) must start before it stops")


def check_number(
    name: str,
    argument: str,
    value: object,
    allowed: str,
    fine: Callable[[float], bool] = math.isfinite,
) -> None:
    """Raise ValueError for an argument that is no number, or not one that is fine."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not fine(value):  # type: ignore[arg-type]
        raise ValueError(f"{name}({argument}={value!r}) must be {allowed}")


def check_share(name: str, share: object) -> None:
    """Raise ValueError for what is no share of something."""
    check_number(name, "share", share, "above 0 and at most 1", lambda own: 0 < own <= 1)


def in_window(start: int | float, stop: int | float, step: int, steps: int) -> bool:
    """Whether a step is in a window, whose start is part of it."""
    first, last = (bound if isinstance(bound, int) else bound * steps for bound in (start, stop))
    return first <= step < last
