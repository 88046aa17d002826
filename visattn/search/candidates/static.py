"""Static candidates: instances that the pattern classes offer, at several levels of density."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import NamedTuple

from visattn.geometry.layout import Grid, TokenLayout
from visattn.patterns import PATTERNS, Pattern
from visattn.patterns.base.pattern import SearchMembers

__all__ = ["LEVELS", "Candidate", "members", "static_families"]

LEVELS = (0.03, 0.06, 0.1, 0.15, 0.2, 0.25, 0.32, 0.4, 0.5, 0.65)
SLACK = 1.02  # a member may keep this factor times a level
HALVINGS = 9  # steps of the bisection over the parameter of a family


class Candidate(NamedTuple):
    """A pattern that heads can run, with its family."""

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
        if "search_members" not in vars(kind):  # inherited: the base class has these members
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
    """Return the densest member of a family within each level, without repetition, in the order of
    the levels.

    If no member is sparse enough for any level, return the sparsest one, unless it is dense.

    Args:
        family: the members, or a function from a number in [0, 1] to a member.
        layout: the token layout at which densities are computed.
        levels: densities, ascending.
    """
    densities: dict[Pattern, float] = {}
    chosen: dict[Pattern, None] = {}
    if not callable(family):
        for member in family:
            with suppress(ValueError):  # larger than the grid, or a query without a key
                densities[member] = member.density(layout)
    for level in levels:
        if callable(family):
            densities = _bisected(family, layout, level)
        within = [member for member, density in densities.items() if density <= level * SLACK]
        if within:
            best = max(within, key=lambda member: densities[member])
            if densities[best] < 1:
                chosen[best] = None
    if not chosen and densities:
        least = min(densities, key=lambda member: densities[member])
        chosen = {least: None} if densities[least] < 1 else {}
    return list(chosen)


def _bisected(
    family: Callable[[float], Pattern], layout: TokenLayout, level: float
) -> dict[Pattern, float]:
    """Return the members that a bisection towards a level meets, with their densities."""
    densities: dict[Pattern, float] = {}
    low, high = 0.0, 1.0
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        try:
            member = family(middle)
            densities[member] = member.density(layout)
        except ValueError:  # too small for the grid
            low = middle
            continue
        low, high = (middle, high) if densities[member] <= level * SLACK else (low, middle)
    return densities
