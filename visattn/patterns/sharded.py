"""Sharded strided attention: a local band of blocks, and every ``stride``-th block of keys per
head."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from visattn._arguments import check_count, check_flag
from visattn.blocks.predicates import Places, Predicate, linear_form
from visattn.blocks.table_predicates import CoarseTable
from visattn.geometry.layout import Grid
from visattn.geometry.orders import LineOrder, Order
from visattn.patterns.base.pattern import Pattern, SearchMembers
from visattn.patterns.base.sizes import count_runs


@dataclass(frozen=True, eq=False)
class Sharded(Pattern):
    """In runs of ``block`` raster tokens numbered ``b``: kept when ``|b_q - b_k| < local``, or when
    ``(b_k + shard + 1) mod stride == 0``.

    Args:
        local: runs kept on each side, itself included, at least 1.
        stride: distance of the kept key runs, at least 1.
        shard: which runs of the residue classes are kept, 0 to ``stride - 1``; heads take
            different ones.
        block: tokens of a run, at least 32.
        causal: also require ``k <= q``.

    Raises:
        TypeError, ValueError: a parameter has a wrong type or value.

    Example:
        >>> from visattn import Grid, TokenLayout
        >>> from visattn.patterns import Sharded
        >>> pattern = Sharded(local=2, stride=4, block=32)
        >>> round(pattern.density(TokenLayout(Grid(6, 8, 8))), 3)
        0.431

    Source:
        Lin et al. (2024), "S2-Attention: Hardware-Aware Context Sharding Among Attention Heads",
        arXiv 2407.17678, as in Phi-3-small.
    Default:
        paper
    Differences:
        - Nothing is causal unless ``causal`` says so.
    """

    local: int
    stride: int
    shard: int = 0
    block: int = 64
    causal: bool = False
    name: ClassVar[str] = "sharded"
    family: ClassVar[str] = "bands"
    color: ClassVar[str] = "#a64a00"
    example: ClassVar[str] = "sharded(2, 4, block=32)"

    def __post_init__(self) -> None:
        for name, minimum in (("local", 1), ("stride", 1), ("shard", 0), ("block", 32)):
            check_count(name, getattr(self, name), minimum)
        if self.shard >= self.stride:
            raise ValueError(f"shard={self.shard} must be below stride={self.stride}")
        check_flag("causal", self.causal)

    @classmethod
    def search_members(cls, grid: Grid, block: int) -> dict[str, SearchMembers]:
        return {
            "sharded": [
                Sharded(local, stride, block=max(32, block // 2))
                for local in (1, 2, 4)
                for stride in (2, 3, 4, 6, 8, 12, 16)
            ]
        }

    def for_heads(self, count: int) -> tuple[Sharded, ...]:
        """Return the pattern of each head, with the shards distributed as in S2-Attention."""
        check_count("count", count, 1)
        step = max(1, self.stride // count)
        fields = (self.block, self.causal)
        return tuple(
            Sharded(self.local, self.stride, (self.shard + head * step) % self.stride, *fields)
            for head in range(count)
        )

    def keeps(self, q: Places, k: Places, grid: Grid) -> torch.Tensor:
        q_form, k_form = linear_form(grid.strides, q), linear_form(grid.strides, k)
        q_run, k_run = q_form // self.block, k_form // self.block
        kept = ((q_run - k_run).abs() < self.local) | ((k_run + self.shard + 1) % self.stride == 0)
        return kept & (k_form <= q_form) if self.causal else kept

    def table(self, grid: Grid) -> torch.Tensor:
        """Return the kept pairs of runs, bool ``[n, n]``."""
        run = torch.arange(count_runs("block", self.block, grid))
        kept = (run + self.shard + 1) % self.stride == 0
        small = run.to(torch.int16)  # the table of differences is the largest tensor here
        return ((small[:, None] - small).abs_() < min(self.local, len(run))).logical_or_(kept)

    def pairs(self, grid: Grid) -> int:
        (predicate,) = self.on(grid).predicates
        assert isinstance(predicate, CoarseTable)
        table = predicate.table
        length = torch.full((len(table),), self.block)
        length[-1] = grid.numel - self.block * (len(table) - 1)
        areas = length[:, None] * length
        if self.causal:  # below the diagonal runs are whole, on it they are triangles
            diagonal = length * (length + 1) // 2
            return int((areas * table.tril(-1)).sum() + (diagonal * table.diagonal()).sum())
        return int((areas * table).sum())

    def predicates(self, grid: Grid) -> tuple[Predicate, ...]:
        return (CoarseTable(grid.strides, self.block, self.table(grid), self.causal),)

    def orders(self, grid: Grid, block_q: int, block_k: int) -> tuple[Order, Order]:
        return LineOrder(), LineOrder()
