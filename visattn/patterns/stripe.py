"""Vertical stripes: key columns that every query sees (sinks)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import torch

from visattn._arguments import check_flag, check_size
from visattn.blocks.predicates import Label, Places, Predicate, linear_form
from visattn.geometry.layout import Grid
from visattn.geometry.orders import ExplicitOrder, LineOrder, Order
from visattn.patterns.base.pattern import Pattern, SearchMembers
from visattn.patterns.base.sizes import Size

Column = Size | tuple[Size, Size]


@dataclass(frozen=True, eq=False)
class Stripe(Pattern):
    """Every query sees the same keys: the first frame, chosen columns, or both.

    Args:
        first_frame: keep all keys of frame 0.
        columns: raster indices of kept keys, each an int, a float in [0, 1] (a place as a fraction
            of the grid's tokens), or a pair of these: a half-open run ``(begin, end)``.

    Raises:
        TypeError, ValueError: no key would be kept, or a column is no place of this form.

    Example:
        >>> from visattn import Grid, TokenLayout
        >>> from visattn.patterns import Stripe
        >>> pattern = Stripe(columns=((0.5, 0.55), 0.75))
        >>> round(pattern.density(TokenLayout(Grid(6, 8, 8))), 3)
        0.219

    Source:
        Chen et al. (2025), "Sparse-vDiT: Unleashing the Power of Sparse Attention to Accelerate
        Video Diffusion Transformers", arXiv 2506.03065, mode M4. First-frame
        sinks are also in Radial Attention and Sparse VideoGen.
    Default:
        paper
    Differences:
        - The columns of the paper are not published; the default is the first frame.
    """

    first_frame: bool = True
    columns: tuple[Column, ...] | None = None
    name: ClassVar[str] = "stripe"
    family: ClassVar[str] = "bands"
    color: ClassVar[str] = "#b97f00"
    example: ClassVar[str] = "stripe(columns=((0.5, 0.55), 0.75))"

    def __post_init__(self) -> None:
        check_flag("first_frame", self.first_frame)
        if self.columns is not None and not isinstance(self.columns, tuple):
            raise TypeError(f"columns={self.columns!r} must be a tuple of places or None")
        for column in self.columns or ():
            places = column if isinstance(column, tuple) else (column,)
            if len(places) != 1 + isinstance(column, tuple):
                raise ValueError(f"columns holds {column}; a run is a pair (begin, end)")
            for place in places:
                check_size("columns", place, minimum=0)
                if isinstance(place, float) and place > 1:
                    raise ValueError(
                        f"columns holds {place}; as a fraction of the grid's tokens it is at "
                        "most 1.0"
                    )
        if not self.first_frame and not self.columns:
            raise ValueError(
                "first_frame=False with no columns keeps no key; give columns, or use Skip()"
            )

    @classmethod
    def search_members(cls, grid: Grid, block: int) -> dict[str, SearchMembers]:
        # imported here, so that the order of PATTERNS doesn't depend on it
        from visattn.patterns.diagonal import Diagonal
        from visattn.patterns.union import Union

        widths = (0.01, 0.03, 0.06, 0.1, 0.15, 0.22, 0.3)
        return {"first frame and band": [Union(Diagonal(width), Stripe()) for width in widths]}

    def kept(self, grid: Grid) -> torch.Tensor:
        """Return the kept keys, bool ``[n]``."""
        keys = torch.zeros(grid.numel, dtype=torch.bool)
        if self.first_frame:
            keys[: grid.height * grid.width] = True
        for column in self.columns or ():
            if isinstance(column, tuple):
                begin, end = (_place(value, grid, end=True) for value in column)
                if begin >= end:
                    raise ValueError(
                        f"columns holds the run {column}, which is empty on grid {grid}"
                    )
                keys[begin:end] = True
            else:
                keys[_place(column, grid)] = True
        return keys

    def keeps(self, q: Places, k: Places, grid: Grid) -> torch.Tensor:
        kept = self.kept(grid).to(k[0].device)
        return kept[linear_form(grid.strides, k)] & (q[0] == q[0])

    def pairs(self, grid: Grid) -> int:
        return grid.numel * int(self.kept(grid).sum())

    def predicates(self, grid: Grid) -> tuple[Predicate, ...]:
        return (Label(grid, self.kept(grid).int()),)

    def orders(self, grid: Grid, block_q: int, block_k: int) -> tuple[Order, Order]:
        """Return raster order; scattered columns come first in the keys if that saves visits."""
        kept = self.kept(grid)
        touched = (
            torch.nn.functional.pad(kept, (0, -grid.numel % block_k)).view(-1, block_k).any(1).sum()
        )
        if int(touched) > -(-int(kept.sum()) // block_k):
            return LineOrder(), _columns_first(self, grid)
        return LineOrder(), LineOrder()


@lru_cache(maxsize=16)
def _columns_first(stripe: Stripe, grid: Grid) -> ExplicitOrder:
    return ExplicitOrder(
        tuple(stripe.kept(grid).logical_not().byte().argsort(stable=True).tolist())
    )


def _place(value: Size, grid: Grid, end: bool = False) -> int:
    last = grid.numel if end else grid.numel - 1
    if isinstance(value, float):
        return math.floor(min(value * grid.numel, last))
    if value > last:
        raise ValueError(
            f"columns holds {value}; grid {grid} has {grid.numel} tokens, use a float as a "
            "fraction of them"
        )
    return value
