"""Dense attention: every pair is kept."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from visattn.blocks.predicates import UNBOUNDED, Band, Places, Predicate
from visattn.geometry.layout import Grid
from visattn.geometry.orders import LineOrder, Order
from visattn.patterns.base.pattern import Pattern


@dataclass(frozen=True, eq=False)
class Dense(Pattern):
    """Every query sees every key.

    Example:
        >>> from visattn import Grid, TokenLayout
        >>> from visattn.patterns import Dense
        >>> pattern = Dense()
        >>> round(pattern.density(TokenLayout(Grid(6, 8, 8))), 3)
        1.0

    Source:
        This project.
    Default:
        own
    Differences:
        none
    """

    name: ClassVar[str] = "dense"
    family: ClassVar[str] = "plain"
    color: ClassVar[str] = "#4d5660"
    example: ClassVar[str] = "dense()"

    def keeps(self, q: Places, k: Places, grid: Grid) -> torch.Tensor:
        return (q[0] == q[0]) & (k[0] == k[0])

    def pairs(self, grid: Grid) -> int:
        return grid.numel**2

    def predicates(self, grid: Grid) -> tuple[Predicate, ...]:
        return (Band(grid.strides, -UNBOUNDED, UNBOUNDED),)

    def orders(self, grid: Grid, block_q: int, block_k: int) -> tuple[Order, Order]:
        return LineOrder(), LineOrder()
