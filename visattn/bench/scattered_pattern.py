"""A pattern of random blocks: no order of the tokens makes its block map denser."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from visattn._arguments import check_count
from visattn.blocks.predicates import Places, Predicate, linear_form
from visattn.blocks.table_predicates import CoarseTable
from visattn.geometry.layout import Grid
from visattn.geometry.orders import LineOrder, Order
from visattn.patterns import Pattern

__all__ = ["Scattered"]


@dataclass(frozen=True)
class Scattered(Pattern, register=False):
    """Keeps random runs of keys for each run of queries, and always the run of the queries.

    Args:
        share: share of the runs that are kept, above 0 and at most 1.
        block: number of tokens of a run, in raster order.
        seed: seed of the random choice.

    Raises:
        TypeError: ``block`` is no integer.
        ValueError: an argument is out of its range.

    Example:
        >>> from visattn import Grid, TokenLayout
        >>> from visattn.bench import Scattered
        >>> Scattered(0.5, block=16).density(TokenLayout(Grid(4, 8, 8)))
        0.5
    """

    share: float
    block: int = 128
    seed: int = 0
    name: ClassVar[str] = "scattered"

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise ValueError(f"share={self.share} must be above 0 and at most 1")
        check_count("block", self.block, 1)

    def table(self, grid: Grid) -> torch.Tensor:
        """Return the kept pairs of runs, bool ``[n, n]``, with equally many in each row."""
        count = -(-grid.numel // self.block)
        generator = torch.Generator().manual_seed(self.seed)
        score = torch.rand(count, count, generator=generator).fill_diagonal_(2.0)
        kept = score.topk(max(1, round(self.share * count)), dim=1).indices
        return torch.zeros(count, count, dtype=torch.bool).scatter_(1, kept, True)

    def keeps(self, q: Places, k: Places, grid: Grid) -> torch.Tensor:
        q_run, k_run = (linear_form(grid.strides, x) // self.block for x in (q, k))
        return self.table(grid)[q_run, k_run]

    def pairs(self, grid: Grid) -> int:
        table = self.table(grid)
        length = torch.full((len(table),), self.block)
        length[-1] = grid.numel - self.block * (len(table) - 1)
        return int((length[:, None] * length * table).sum())

    def predicates(self, grid: Grid) -> tuple[Predicate, ...]:
        return (CoarseTable(grid.strides, self.block, self.table(grid), False),)

    def orders(self, grid: Grid, block_q: int, block_k: int) -> tuple[Order, Order]:
        return LineOrder(), LineOrder()
