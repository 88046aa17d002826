"""Families of static patterns, and their members at levels of density.

A family is a function of a number from 0 to 1 that keeps more pairs the larger it is, or, where
sizes come in steps, a list of members.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from typing import NamedTuple

from visattn.geometry.layout import Grid, TokenLayout
from visattn.geometry.orders import fitted
from visattn.patterns import (
    AxisOrder,
    Block,
    Diagonal,
    GridBlocks,
    Halo,
    MultiDiagonal,
    Neighborhood,
    Pattern,
    Radial,
    Sharded,
    ShiftedBlock,
    SlidingTile,
    Stripe,
    Union,
)

__all__ = ["LEVELS", "Candidate", "Family", "members", "static_families"]

Family = Callable[[float], Pattern] | Sequence[Pattern]
LEVELS = (0.03, 0.06, 0.1, 0.15, 0.2, 0.25, 0.32, 0.4, 0.5, 0.65)
SLACK = 1.02  # of a level that a member may keep
HALVINGS = 9
PARTS = (1, 2, 3, 4, 6, 8, 12, 16)  # an axis is cut into
ORDERS = ("thw", "twh", "htw", "hwt", "wth", "wht")


class Candidate(NamedTuple):
    """A pattern that heads may run, with its family."""

    family: str
    pattern: Pattern


def static_families(grid: Grid, block: int) -> dict[str, Family]:
    """Every static pattern by name, bands in all orders of the axes that differ on the grid.

    Args:
        block: tokens of a block.
    """
    tile = fitted((1, 8, 8) if block >= 64 else (1, 4, 4), grid, block)
    count = [-(-length // side) for length, side in zip(grid.shape, tile, strict=True)]
    reach = [sorted({1, 3, 5, 7, 9, 2 * n - 1}) for n in count]
    tiles = [
        SlidingTile(tile, (t, h, w))
        for t, h, w in itertools.product(*reach)
        if t <= 2 * count[0] - 1 and h <= 2 * count[1] - 1 and w <= 2 * count[2] - 1
    ]
    frames, height, width = grid.shape
    frame = 32 if height * width < 512 else 128
    boxes = list(dict.fromkeys(itertools.product(*(_sides(n) for n in grid.shape))))
    flat = [size for size in boxes if size[0] == 1]
    tubes = [size for size in boxes if size[0] == frames]
    whole = [(t, height, width) for t in _sides(frames)]
    out: dict[str, Family] = {}
    for order in _orders(grid):
        name = "band" if order == "thw" else f"band {order}"
        out[name] = Diagonal if order == "thw" else _band(order)
    out |= {
        "bands across frames": MultiDiagonal,
        "first frame and band": [
            Union(Diagonal(share), Stripe()) for share in (0.01, 0.03, 0.06, 0.1, 0.15, 0.22, 0.3)
        ],
        "radial": lambda x: Radial(decay=max(4 * x, 0.01), block=frame),
        "radial with sink": lambda x: Radial(decay=max(4 * x, 0.01), sink=True, block=frame),
        "neighborhood": lambda x: Neighborhood((x, x, x)),
        "neighborhood in the frame": lambda x: Neighborhood((1, x, x)),
        "neighborhood along time": lambda x: Neighborhood((1.0, x, x)),
        "neighborhood of frames": lambda x: Neighborhood((x, 1.0, 1.0)),
        "sliding tile": tiles,
        "windows in the frame": [Block(size) for size in flat],
        "windows along time": [Block(size) for size in tubes],
        "windows of frames": [Block(size) for size in whole],
        "windows": [Block(size) for size in boxes],
        "windows, shifted": [ShiftedBlock(size) for size in boxes if size != grid.shape],
        "grid blocks": [GridBlocks(size) for size in boxes],
        "halo": [
            Halo(tile, (t, side, side)) for t in range(min(4, frames)) for side in (0, 1, 2, 4, 8)
        ],
        "sharded": [
            Sharded(local, stride, block=max(32, block // 2))
            for local in (1, 2, 4)
            for stride in (2, 3, 4, 6, 8, 12, 16)
        ],
    }
    return out


def members(
    family: Family, layout: TokenLayout, levels: Iterable[float] = LEVELS
) -> list[Pattern]:
    """The members of a family that keep most within each level, ascending, none twice; where none
    keeps so little, the one that keeps least, if it is not dense."""
    found: dict[Pattern, float] = {}
    chosen: dict[Pattern, None] = {}
    if not callable(family):
        for own in family:
            with suppress(ValueError):  # larger than the grid, or a query without a key
                found[own] = own.density(layout)
    for level in levels:
        if callable(family):
            found = _halved(family, layout, level)
        within = [own for own, density in found.items() if density <= level * SLACK]
        if within:
            best = max(within, key=lambda own: found[own])
            if found[best] < 1:
                chosen[best] = None
    if not chosen and found:
        least = min(found, key=lambda own: found[own])
        chosen = {least: None} if found[least] < 1 else {}
    return list(chosen)


def _halved(
    family: Callable[[float], Pattern], layout: TokenLayout, level: float
) -> dict[Pattern, float]:
    """Members near a level, with their densities."""
    found: dict[Pattern, float] = {}
    low, high = 0.0, 1.0
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        try:
            own = family(middle)
            found[own] = own.density(layout)
        except ValueError:  # too small for the grid
            low = middle
            continue
        low, high = (middle, high) if found[own] <= level * SLACK else (low, middle)
    return found


def _sides(length: int) -> list[int]:
    return sorted({1} | {-(-length // part) for part in PARTS if part <= length})


def _orders(grid: Grid) -> list[str]:
    """Orders of the axes in which tokens come differently: axes of one token do not count."""
    shape = dict(zip("thw", grid.shape, strict=True))
    seen: dict[str, str] = {}
    for order in ORDERS:
        seen.setdefault("".join(axis for axis in order if shape[axis] > 1), order)
    return list(seen.values())


def _band(order: str) -> Callable[[float], Pattern]:
    return lambda x: AxisOrder(Diagonal(x), order)


