"""Grid attention: tokens at the same place of every block attend to one another."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch

from visattn._arguments import check_count, check_sizes
from visattn.blocks.predicates import AxisRule, Places
from visattn.geometry.layout import Grid
from visattn.geometry.orders import Triple
from visattn.patterns.base.boxes import NO_UNIT, AxisPattern, searched_sizes
from visattn.patterns.base.pattern import SearchMembers
from visattn.patterns.base.sizes import Sizes, sizes_of
from visattn.patterns.block import Block


@dataclass(frozen=True, eq=False)
class GridBlocks(AxisPattern):
    """Per axis, keys a multiple of ``ceil(length / size)`` away: at most ``size`` keys, spread
    evenly.

    Args:
        size: keys per axis (MaxViT's grid size), one for all axes or ``(frames, height, width)``.

    Raises:
        TypeError, ValueError: a size is wrong, or larger than the grid.

    Example:
        >>> from visattn import Grid, TokenLayout
        >>> from visattn.patterns import GridBlocks
        >>> pattern = GridBlocks((3, 4, 4))
        >>> round(pattern.density(TokenLayout(Grid(6, 8, 8))), 3)
        0.125

    Source:
        Tu et al. (2022), "MaxViT: Multi-Axis Vision Transformer", arXiv 2204.01697, its grid half.
    Default:
        paper
    Differences:
        - No trained bias of relative positions.
        - Axes that the size does not divide.
    """

    size: Sizes
    name: ClassVar[str] = "grid_blocks"
    family: ClassVar[str] = "boxes"
    color: ClassVar[str] = "#aadbf7"
    example: ClassVar[str] = "grid_blocks((3, 4, 4))"

    def __post_init__(self) -> None:
        check_sizes("size", self.size)

    @classmethod
    def search_members(cls, grid: Grid, block: int) -> dict[str, SearchMembers]:
        return {"grid blocks": [GridBlocks(size) for size in searched_sizes(grid)]}

    def steps(self, grid: Grid) -> Triple:
        """Return the distance of neighbouring keys, per axis."""
        size = sizes_of("size", self.size, grid)
        t, h, w = (-(-length // count) for length, count in zip(grid.shape, size, strict=True))
        return t, h, w

    def keeps(self, q: Places, k: Places, grid: Grid) -> torch.Tensor:
        kept = torch.ones((), dtype=torch.bool, device=q[0].device)
        for axis, step in enumerate(self.steps(grid)):
            kept = kept & (q[axis] % step == k[axis] % step)
        return kept

    def axis_rules(self, grid: Grid) -> Iterator[AxisRule]:
        for length, step in zip(grid.shape, self.steps(grid), strict=True):
            residue = torch.arange(length) % step
            yield AxisRule(residue, residue + (length - 1 - residue) // step * step, step)

    def cuts(self, grid: Grid) -> tuple[Triple, Triple, Triple]:
        return NO_UNIT, NO_UNIT, self.steps(grid)

    def for_layers(self, count: int) -> tuple[AxisPattern, ...]:
        """Return MaxViT's alternation: blocks in even layers, grid attention in odd layers."""
        check_count("count", count, 1)
        return tuple(self if layer % 2 else Block(self.size) for layer in range(count))
