"""For each head, the static pattern with the smallest error on a few queries of the call."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import ClassVar

import torch

from visattn._arguments import check_block
from visattn.blocks.block_map import NONE
from visattn.geometry.layout import Grid, TokenLayout, on_cpu
from visattn.geometry.orders import LineOrder, Order
from visattn.patterns.base.pattern import Pattern
from visattn.patterns.diagonal import Diagonal, MultiDiagonal
from visattn.patterns.stripe import Stripe
from visattn.patterns.union import Union
from visattn.selectors.per_head_order import even_runs
from visattn.selectors.selector import Selector, only_grid
from visattn.selectors.stages.blocks import partition_by_head
from visattn.selectors.stages.history import SelectorState
from visattn.selectors.stages.selection import Selection

__all__ = ["OnlineChoice"]

SPATIAL = Union(Diagonal(0.2), Stripe())
TEMPORAL = Union(MultiDiagonal(0.2), Stripe())


@dataclass(frozen=True, eq=False)
class OnlineChoice(Selector):
    """The best of several static patterns, chosen in each call for each batch item and head.

    Some query rows are computed in full and with each pattern. The head runs the pattern with the
    smallest mean squared error.

    Args:
        patterns: two or more static patterns; among equally good ones the first is chosen.
        rows: number of query rows by which a pattern is chosen.
        block: tokens of a block.

    Example:
        >>> import torch
        >>> from visattn import Grid, TokenLayout, sparse_attention
        >>> from visattn.selectors import OnlineChoice
        >>> layout = TokenLayout(Grid(2, 8, 8))
        >>> q, k, v = torch.randn(3, 1, 2, layout.length, 16)
        >>> sparse_attention(q, k, v, OnlineChoice(rows=8, block=16), layout).shape
        torch.Size([1, 2, 128, 16])

    Source:
        Xi et al. (2025), "Sparse VideoGen: Accelerating Video Diffusion Transformers with
        Spatial-Temporal Sparsity", ICML 2025, arXiv 2502.01776. Code:
        github.com/svg-project/Sparse-VideoGen (commit 5ce7b01).
    Default:
        paper. The code decides by stand-ins for the masks, of a fixed width of 2 frames (Wan) or
        1.5 (HunyuanVideo), and by rows of the first 10,000 tokens only.
    Differences:
        - Rows are evenly spread and not drawn.
        - Any static patterns can be given; the default ones are a fifth of the sequence wide.
        - Blocks of ``block`` tokens that are partly kept are kept whole.
    """

    patterns: tuple[Pattern, ...] = (SPATIAL, TEMPORAL)
    rows: int = 64
    block: int = 64
    name: ClassVar[str] = "online_choice"
    color: ClassVar[str] = "#00795a"
    example: ClassVar[str] = "online_choice((diagonal(3), stripe()), 9, 8)"

    def __post_init__(self) -> None:
        if not isinstance(self.patterns, tuple) or len(self.patterns) < 2:
            raise ValueError(f"patterns={self.patterns!r} must be a tuple of two or more patterns")
        for pattern in self.patterns:
            if not isinstance(pattern, Pattern):
                raise TypeError(f"patterns holds {pattern!r}; it takes static patterns")
        check_block("rows", self.rows)
        check_block("block", self.block)

    def check(self, grid: Grid) -> None:
        for pattern in self.patterns:
            pattern.check(grid)

    def best(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layout: TokenLayout, scale: float
    ) -> torch.Tensor:
        """Return the number of the pattern with the smallest error, int64 ``[B, H]``."""
        acc_dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
        begin, grid = layout.grids[0]
        count = min(self.rows, grid.numel)
        rows = begin + torch.arange(count, device=q.device) * grid.numel // count
        share = q.shape[1] // k.shape[1]
        keys, values = (x.to(acc_dtype).repeat_interleave(share, 1) for x in (k, v))
        logits = q.index_select(2, rows).to(acc_dtype) @ keys.mT * scale
        full = logits.softmax(-1) @ values
        errors = []
        for pattern in self.patterns:
            mask = _rows_of(pattern, layout, count, q.device)
            out = logits.masked_fill(~mask, -torch.inf).softmax(-1) @ values
            errors.append((out - full).square().mean((-1, -2)))
        return torch.stack(errors, -1).argmin(-1)

    def select(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        layout: TokenLayout,
        scale: float,
        *,
        kernels: bool = False,
        past: SelectorState | None = None,
    ) -> Selection:
        grid = only_grid(layout, self)
        best = self.best(q, k, v, layout, scale)
        orders = [_line_orders(pattern, layout, self.block) for pattern in self.patterns]
        runs = even_runs(torch.empty(*best.shape, grid.numel, device=q.device), self.block)
        sides = []
        for place in range(2):  # queries, keys
            index = _indices(tuple(pair[place] for pair in orders), layout, q.device)
            sides.append(
                partition_by_head(layout, index[best], runs.start, runs.length, self.block)
            )
        pairs = tuple(zip(self.patterns, orders, strict=True))
        levels = _visited(pairs, layout, self.block, q.device)[best]
        return Selection.of(sides[0], sides[1], levels)


def _line_orders(pattern: Pattern, layout: TokenLayout, block: int) -> tuple[Order, Order]:
    """Return the orders of the pattern if these are raster orders, else raster order for both.

    In a raster order blocks are runs of equal length.
    """
    orders = pattern.on(layout.grids[0][1]).orders(block, block)
    plain = all(isinstance(order, LineOrder) for order in orders)
    return orders if plain else (LineOrder(), LineOrder())


# the results of the following functions are copied to the device once


@functools.lru_cache(maxsize=16)
@on_cpu
def _indices(
    orders: tuple[Order, ...], layout: TokenLayout, device: torch.device
) -> torch.Tensor:
    """Return the tokens of the grid in each order, int64 ``[orders, n]``."""
    return torch.stack([order.index(layout.grids[0][1]) for order in orders]).to(device)


@functools.lru_cache(maxsize=16)
@on_cpu
def _visited(
    pairs: tuple[tuple[Pattern, tuple[Order, Order]], ...],
    layout: TokenLayout,
    block: int,
    device: torch.device,
) -> torch.Tensor:
    """Return the blocks that each pattern visits in its orders, uint8 ``[patterns, Nq, Nk]``."""
    status = [
        pattern.lower(layout, block, block, partial="promote", order=orders).status() != NONE
        for pattern, orders in pairs
    ]
    return torch.stack(status).to(device, torch.uint8)


@functools.lru_cache(maxsize=16)
@on_cpu
def _rows_of(
    pattern: Pattern, layout: TokenLayout, count: int, device: torch.device
) -> torch.Tensor:
    """Return the keys that a pattern keeps for evenly spread queries, bool ``[count, L]``."""
    begin, grid = layout.grids[0]
    rows = begin + torch.arange(count) * grid.numel // count
    return pattern.allows(rows[:, None], torch.arange(layout.length), layout).to(device)
