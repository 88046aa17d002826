"""Checks of arguments, one function for each kind.

A check raises an error whose sentence names the argument, its value and what is allowed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from typing import TypeGuard

__all__ = [
    "POSITIVE_SHARE",
    "as_indices",
    "check_block",
    "check_count",
    "check_flag",
    "check_keep",
    "check_number",
    "check_share",
    "check_size",
    "check_sizes",
    "check_window",
    "check_word",
    "in_window",
    "is_integer",
    "is_number",
]

MAX_BLOCK = 1 << 16
# The condition on a number that is a share of something, for ``check_number``.
POSITIVE_SHARE: tuple[str, Callable[[float], bool]] = (
    "above 0 and at most 1",
    lambda share: 0 < share <= 1,
)


def is_integer(value: object) -> TypeGuard[int]:
    """Whether ``value`` is an integer; True and False are not."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: object) -> TypeGuard[int | float]:
    """Whether ``value`` is an int or a float, also NaN or infinite; True and False are not."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def check_count(name: str, value: object, minimum: int, maximum: int | None = None) -> int:
    """Return ``value`` if it is an integer in a range.

    Args:
        name: name of the argument, for the error.
        value: what was passed.
        minimum: the smallest allowed value.
        maximum: the largest allowed value; None: there is no limit.

    Raises:
        TypeError: it is no integer.
        ValueError: it is out of range.
    """
    if not is_integer(value):
        raise TypeError(f"{name}={value!r} must be an integer of at least {minimum}")
    if value < minimum:
        raise ValueError(f"{name}={value} must be at least {minimum}")
    if maximum is not None and value > maximum:
        raise ValueError(f"{name}={value} must be at most {maximum}")
    return value


def check_block(name: str, size: object) -> int:
    """Return ``size`` if it is a number of tokens that a block can have, 1 to 65536."""
    return check_count(name, size, 1, MAX_BLOCK)


def check_flag(name: str, value: object) -> None:
    """Raise TypeError unless ``value`` is True or False."""
    if not isinstance(value, bool):
        raise TypeError(f"{name}={value!r} must be True or False")


def check_word(name: str, value: object, words: Collection[str]) -> None:
    """Raise ValueError unless ``value`` is one of ``words``."""
    if value not in words:
        raise ValueError(f"{name}={value!r} must be one of {', '.join(words)}")


def check_share(name: str, value: object, *, above: bool = False) -> None:
    """Check a share, a number from 0 to 1.

    Args:
        name: name of the argument, for the error.
        value: what was passed.
        above: whether 0 is refused too.

    Raises:
        TypeError: it is no number.
        ValueError: it is out of range.
    """
    if not is_number(value):
        raise TypeError(f"{name}={value!r} must be a number from 0 to 1")
    if not 0 <= value <= 1 or (above and value == 0):
        least = "above 0" if above else "at least 0"
        raise ValueError(f"{name}={value} must be {least} and at most 1")


def check_keep(name: str, value: object) -> None:
    """Check a number of blocks: an int of at least 1, or a float in (0, 1] as a share of them.

    Raises:
        TypeError: it is no number.
        ValueError: it is out of range.
    """
    if not is_number(value):
        raise TypeError(f"{name}={value!r} must be an int (blocks) or a float (share of them)")
    if isinstance(value, int) and value < 1:
        raise ValueError(f"{name}={value} must be at least 1 block, or a float in (0, 1]")
    if isinstance(value, float) and not 0 < value <= 1:
        raise ValueError(f"{name}={value} as a share of the blocks must be above 0 and at most 1")


def check_size(name: str, value: object, minimum: int = 1) -> None:
    """Check a size along an axis: an int in tokens, or a float as a fraction of the axis. Only what
    no grid could allow is refused.

    Args:
        name: name of the argument, for the error.
        value: what was passed.
        minimum: the fewest tokens; with 0 a fraction of 0 is allowed too.

    Raises:
        TypeError: it is no number.
        ValueError: it is NaN, infinite or too small.
    """
    if not is_number(value):
        raise TypeError(
            f"{name}={value!r} must be an int (tokens) or a float (fraction of the axis)"
        )
    if isinstance(value, float):
        if not math.isfinite(value) or value < 0 or (value == 0 and minimum > 0):
            least = "above 0" if minimum else "at least 0"
            raise ValueError(f"{name}={value} as a fraction must be finite and {least}")
    elif value < minimum:
        raise ValueError(f"{name}={value} must be at least {minimum}")


def check_sizes(name: str, value: object, minimum: int = 1) -> None:
    """Check one size as ``check_size`` does, or a tuple of one to three."""
    if not isinstance(value, tuple):
        return check_size(name, value, minimum)
    if not 1 <= len(value) <= 3:
        raise ValueError(
            f"{name}={value} must be one size or a tuple of up to three: (frames, height, width)"
        )
    for item in value:
        check_size(name, item, minimum)


def check_number(
    owner: str,
    argument: str,
    value: object,
    allowed: str,
    fits: Callable[[float], bool] = math.isfinite,
) -> None:
    """Check a number against a condition.

    Args:
        owner: the function or class that takes the argument, for the error.
        argument: name of the argument, for the error.
        value: what was passed.
        allowed: the condition in words, for the error.
        fits: the condition.

    Raises:
        ValueError: it is no number, or does not fit.
    """
    if not is_number(value) or not fits(value):
        raise ValueError(f"{owner}({argument}={value!r}) must be {allowed}")


def as_indices(name: str, value: object) -> tuple[int, ...]:
    """Return one index or several as a tuple; an index is an integer of at least 0.

    Raises:
        TypeError: it is neither an integer nor a sequence.
        ValueError: an item is no integer of at least 0.
    """
    items = [value] if isinstance(value, int) else value
    if isinstance(items, (str, bytes)) or not isinstance(items, Sequence):
        raise TypeError(f"{name} is {value!r}; it must be whole numbers from 0 on")
    for item in items:
        if not is_integer(item) or item < 0:
            raise ValueError(f"{name} has {item!r}; it must be whole numbers from 0 on")
    return tuple(items)


def check_window(owner: str, start: object, stop: object) -> None:
    """Check a window of denoising steps. A bound is an int (steps), or a float from 0.0 to 1.0 (a
    share of the steps).

    Raises:
        ValueError: a bound is no such number, or the window is empty.
    """
    for bound in (start, stop):
        if not is_number(bound) or bound < 0:
            raise ValueError(
                f"{owner}(start={start!r}, stop={stop!r}) must be steps, or shares of the steps "
                "from 0.0 to 1.0"
            )
        if isinstance(bound, float) and bound > 1:
            raise ValueError(f"{owner} has {bound} for a share of the steps; it is at most 1.0")
    if isinstance(start, int) == isinstance(stop, int) and start >= stop:  # type: ignore[operator]
        raise ValueError(f"{owner}(start={start!r}, stop={stop!r}) must start before it stops")


def in_window(start: int | float, stop: int | float, step: int, steps: int) -> bool:
    """Whether ``step`` of ``steps`` lies in a window, which includes ``start``, not ``stop``."""
    first, last = (bound if isinstance(bound, int) else bound * steps for bound in (start, stop))
    return first <= step < last
