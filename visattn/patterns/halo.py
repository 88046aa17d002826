"""Halo attention: a block of queries sees the same block of keys and a border around it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch

from visattn._arguments import check_sizes
from visattn.blocks.predicates import AxisRule, Places
from visattn.geometry.layout import Grid
from visattn.geometry.orders import Triple
from visattn.patterns.base.boxes import NO_UNIT, AxisPattern, searched_tile
from visattn.patterns.base.pattern import SearchMembers
from visattn.patterns.base.sizes import Sizes, per_axis, sizes_of, to_tokens


@dataclass(frozen=True, eq=False)
class Halo(AxisPattern):
    """Per axis, keys within ``halo`` of the query's block.

    Args:
        block: sides of a query block, per axis.
        halo: border width in tokens, per axis, at least 0.

    Raises:
        TypeError, ValueError: a size is wrong, or larger than the grid.

    Example:
        >>> from visattn import Grid, TokenLayout
        >>> from visattn.patterns import Halo
        >>> pattern = Halo(block=(2, 4, 4), halo=(1, 2, 2))
        >>> round(pattern.density(TokenLayout(Grid(6, 8, 8))), 3)
        0.312

    Source:
        Vaswani et al. (2021), "Scaling Local Self-Attention for Parameter Efficient Visual
        Backbones" (HaloNet), arXiv 2103.12731.
    Default:
        paper
    Differences:
        - Keys outside the grid do not exist; timm's layer pads keys and values with zeros, which
          then take part in its softmax.
        - No trained relative positions.
    """

    block: Sizes
    halo: Sizes
    name: ClassVar[str] = "halo"
    family: ClassVar[str] = "boxes"
    color: ClassVar[str] = "#1f6690"
    example: ClassVar[str] = "halo((2, 4, 4), (1, 2, 2))"

    def __post_init__(self) -> None:
        check_sizes("block", self.block)
        check_sizes("halo", self.halo, minimum=0)

    @classmethod
    def search_members(cls, grid: Grid, block: int) -> dict[str, SearchMembers]:
        tile = searched_tile(grid, block)
        frames = range(min(4, grid.frames))
        sides = (0, 1, 2, 4, 8)
        return {"halo": [Halo(tile, (t, side, side)) for t in frames for side in sides]}

    def sides(self, grid: Grid) -> tuple[Triple, Triple]:
        """Return block and halo, in tokens."""
        chosen = per_axis("halo", self.halo, grid, 0)
        t, h, w = (
            to_tokens("halo", chosen[axis], grid.shape[axis], axis, minimum=0) for axis in range(3)
        )
        return sizes_of("block", self.block, grid), (t, h, w)

    def keeps(self, q: Places, k: Places, grid: Grid) -> torch.Tensor:
        kept = torch.ones((), dtype=torch.bool, device=q[0].device)
        for axis, (block, halo) in enumerate(zip(*self.sides(grid), strict=True)):
            begin = q[axis] // block * block
            kept = kept & (k[axis] >= begin - halo) & (k[axis] < begin + block + halo)
        return kept

    def axis_rules(self, grid: Grid) -> Iterator[AxisRule]:
        for length, block, halo in zip(grid.shape, *self.sides(grid), strict=True):
            begin = torch.arange(length) // block * block
            end = begin + block + halo
            yield AxisRule((begin - halo).clamp(min=0), (end - 1).clamp(max=length - 1))

    def cuts(self, grid: Grid) -> tuple[Triple, Triple, Triple]:
        return self.sides(grid)[0], NO_UNIT, (1, 1, 1)
