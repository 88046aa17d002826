"""Static candidates: the instances that the pattern classes name, at levels of density."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import NamedTuple

from visattn.geometry.layout import Grid, TokenLayout
from visattn.patterns import PATTERNS, Pattern
from visattn.patterns.base.pattern import SearchMembers

__all__ = ["LEVELS", "Candidate", "members", "static_families"]

LEVELS = (0.03, 0.06, 0.1, 0.15, 0.2, 0.25, 0.32, 0.4, 0.5, 0.65)
SLACK = 1.02  # of a level that a member may keep
HALVINGS = 9


class Candidate(NamedTuple):
    """A pattern that heads may run, with its family."""

    family: str
    pattern: Pattern


def static_families(grid: Grid, block: int) -> dict[str, SearchMembers]:
    """Return the ``search_members`` of every static pattern by label.

    Args:
        grid: the grid of the tokens.
        block: tokens of a block.

    Raises:
        ValueError: two patterns use the same label.
    """
    families: dict[str, SearchMembers] = {}
    for name, kind in PATTERNS.items():
        if "search_members" not in vars(kind):  # members of the base are tried as the base's
            continue
        for label, family in kind.search_members(grid, block).items():
            if label in families:
                raise ValueError(
                    f"search_members of {name!r} returns the label {label!r}, which another "
                    "pattern uses; choose another label"
                )
            families[label] = family
    return families


def members(
    family: SearchMembers, layout: TokenLayout, levels: Iterable[float] = LEVELS
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
