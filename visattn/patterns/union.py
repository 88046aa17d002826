"""The union of patterns: a pair is kept when any of them keeps it. One map, in one order."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from visattn.blocks.predicates import Places, Predicate
from visattn.geometry.layout import Grid, TokenLayout
from visattn.geometry.orders import Order
from visattn.patterns.base.pattern import Pattern, visited_blocks


@dataclass(frozen=True, init=False, eq=False)
class Union(Pattern):
    """Every pair that at least one of ``patterns`` keeps.

    Args:
        patterns: two or more static patterns, as positional arguments.

    Raises:
        TypeError, ValueError: fewer than two patterns, or an argument that is no static pattern.

    Example:
        >>> from visattn import Grid, TokenLayout
        >>> from visattn.patterns import Diagonal, Stripe, Union
        >>> pattern = Union(Diagonal(12), Stripe())
        >>> round(pattern.density(TokenLayout(Grid(6, 8, 8))), 3)
        0.22

    Source:
        This project.
    Default:
        own
    Differences:
        none
    """

    patterns: tuple[Pattern, ...]
    name: ClassVar[str] = "union"
    family: ClassVar[str] = "composed"
    color: ClassVar[str] = "#009e73"
    example: ClassVar[str] = "union(diagonal(12), multi_diagonal(5), stripe())"

    def __init__(self, *patterns: Pattern) -> None:
        for pattern in patterns:
            if not isinstance(pattern, Pattern):
                raise TypeError(
                    f"Union got {pattern!r}; it takes patterns, for example Union(Diagonal(64), "
                    "Stripe())"
                )
        if len(patterns) < 2:
            raise ValueError(f"Union got {len(patterns)} patterns; it takes two or more")
        object.__setattr__(self, "patterns", patterns)

    def __repr__(self) -> str:
        return f"Union({', '.join(map(repr, self.patterns))})"

    @property
    def outside(self) -> bool:  # type: ignore[override]
        return any(pattern.outside for pattern in self.patterns)

    def keeps(self, q: Places, k: Places, grid: Grid) -> torch.Tensor:
        kept = self.patterns[0].keeps(q, k, grid)
        for pattern in self.patterns[1:]:
            kept = kept | pattern.keeps(q, k, grid)
        return kept

    def pairs(self, grid: Grid) -> int:
        # whole blocks count by their area, partial ones pair by pair
        block = min(128, grid.numel)
        return self.lower(TokenLayout(grid), block, block).pairs()

    def covered(self, grid: Grid) -> torch.Tensor | bool:
        covered = torch.zeros(grid.numel, dtype=torch.bool)
        for pattern in self.patterns:
            if pattern.outside:
                covered |= pattern.on(grid).covered
        return covered

    def predicates(self, grid: Grid) -> tuple[Predicate, ...]:
        return tuple(
            predicate for pattern in self.patterns for predicate in pattern.on(grid).predicates
        )

    def orders(self, grid: Grid, block_q: int, block_k: int) -> tuple[Order, Order]:
        """Return the orders of the member with which the union visits the fewest blocks."""
        predicates = self.on(grid).predicates
        choices = dict.fromkeys(
            pattern.on(grid).orders(block_q, block_k) for pattern in self.patterns
        )

        def visited(orders: tuple[Order, Order]) -> int:
            q, k = orders[0].blocks(grid, block_q), orders[1].blocks(grid, block_k)
            return visited_blocks(predicates, q, k)

        return min(choices, key=visited) if len(choices) > 1 else next(iter(choices))
