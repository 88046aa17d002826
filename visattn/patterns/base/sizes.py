"""Sizes in patterns: an int counts tokens, a float is a fraction of its axis.

An int too large for the grid raises; a fraction is rounded to whole tokens and clamped, so that a
pattern given in fractions fits any resolution.
"""

from __future__ import annotations

import math
from typing import TypeVar

from visattn.geometry.layout import Grid

Size = int | float
Sizes = Size | tuple[Size, ...]
T = TypeVar("T")

AXIS_WORDS = ("frames", "rows", "columns")


def per_axis(name: str, value: T | tuple[T, ...], grid: Grid, single: T) -> tuple[T, T, T]:
    """One value per axis. A scalar goes to every axis of more than one token (``single`` to the
    others); a tuple shorter than three goes to the last axes, and the others must have one token.
    """
    if not isinstance(value, tuple):
        t, h, w = (value if length > 1 else single for length in grid.shape)
        return t, h, w
    missing = 3 - len(value)
    if any(length > 1 for length in grid.shape[:missing]):
        raise ValueError(
            f"{name}={value} has {len(value)} values but grid {grid} has more than one token on "
            "an axis before them; give (frames, height, width)"
        )
    t, h, w = (single,) * missing + value
    return t, h, w


def to_tokens(
    name: str, value: Size, length: int, axis: int, limit: int | None = None, minimum: int = 1
) -> int:
    """Tokens of a size on an axis; ``limit`` is the largest legal one (default: the axis)."""
    most = length if limit is None else limit
    if isinstance(value, float):
        return max(minimum, math.floor(min(most, value * length + 0.5)))
    if value > most:
        raise ValueError(
            f"{name}={value} is more than the {most} allowed on an axis of {length} "
            f"{AXIS_WORDS[axis]}; use at most {most}, or a float as a fraction of the axis"
        )
    return value


def sizes_of(name: str, value: Sizes, grid: Grid) -> tuple[int, int, int]:
    """A size per axis in tokens, each at most its axis."""
    chosen = per_axis(name, value, grid, 1)
    t, h, w = (to_tokens(name, chosen[axis], grid.shape[axis], axis) for axis in range(3))
    return t, h, w


MAX_RUNS = 16384  # a table of their pairs then takes a quarter of a gigabyte


def count_runs(name: str, size: int, grid: Grid) -> int:
    """Runs of ``size`` raster tokens in a grid, few enough for a table of their pairs."""
    runs = -(-grid.numel // size)
    if runs > MAX_RUNS:
        raise ValueError(
            f"{name}={size} cuts grid {grid} into {runs} runs; at most {MAX_RUNS} are allowed, "
            f"use {name}={-(-grid.numel // MAX_RUNS)} or more"
        )
    return runs
