"""Sliding tile attention: a window of whole tiles around the query's tile."""

from __future__ import annotations

import itertools
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
class SlidingTile(AxisPattern):
    """Per axis, the tiles within ``window // 2`` of the query's tile, moved inward at the borders.

    Args:
        tile: tokens of a tile, per axis; tiles at the far border may be cut.
        window: tiles per axis, in tiles or as a fraction of the axis' tiles; an even window acts as
            the next odd one, and a window of all tiles is the whole axis.

    Raises:
        TypeError, ValueError: a size is wrong, or larger than the grid.

    Example:
        >>> from visattn import Grid, TokenLayout
        >>> from visattn.patterns import SlidingTile
        >>> pattern = SlidingTile(tile=(2, 2, 2), window=(1, 3, 3))
        >>> round(pattern.density(TokenLayout(Grid(6, 8, 8))), 3)
        0.188

    Source:
        Zhang et al. (2025), "Fast Video Generation with Sliding Tile Attention", arXiv 2502.04507.
        Code: github.com/hao-ai-lab/FastVideo (commit 2f3d407).
    Default:
        code
    Differences:
        - Grids that tiles do not divide, with smaller tiles at the far border.
    """

    tile: Sizes
    window: Sizes
    name: ClassVar[str] = "sliding_tile"
    family: ClassVar[str] = "boxes"
    color: ClassVar[str] = "#3a97cf"
    example: ClassVar[str] = "sliding_tile((2, 2, 2), (1, 3, 3))"

    def __post_init__(self) -> None:
        check_sizes("tile", self.tile)
        check_sizes("window", self.window)

    @classmethod
    def search_members(cls, grid: Grid, block: int) -> dict[str, SearchMembers]:
        tile = searched_tile(grid, block)
        counts = [-(-length // side) for length, side in zip(grid.shape, tile, strict=True)]
        widest = [2 * count - 1 for count in counts]
        windows = itertools.product(*(sorted({1, 3, 5, 7, 9, most}) for most in widest))
        return {
            "sliding tile": [
                SlidingTile(tile, window)
                for window in windows
                if all(size <= most for size, most in zip(window, widest, strict=True))
            ]
        }

    def tiles(self, grid: Grid) -> tuple[Triple, Triple, Triple]:
        """Return per axis: tokens of a tile, tiles of the axis, tiles of the window."""
        tile = sizes_of("tile", self.tile, grid)
        t, h, w = (-(-length // side) for length, side in zip(grid.shape, tile, strict=True))
        counts = (t, h, w)
        chosen = per_axis("window", self.window, grid, 1)
        windows = []
        for axis, count in enumerate(counts):
            given = chosen[axis]
            if isinstance(given, int) and given > count:
                raise ValueError(
                    f"window={self.window} is {given} tiles where grid {grid} has {count} tiles of "
                    f"{tile[axis]}; "
                    f"use at most {count}, or a float as a fraction of the tiles"
                )
            windows.append(to_tokens("window", given, count, axis))
        return tile, counts, (windows[0], windows[1], windows[2])

    def keeps(self, q: Places, k: Places, grid: Grid) -> torch.Tensor:
        kept = torch.ones((), dtype=torch.bool, device=q[0].device)
        for axis, (tile, count, window) in enumerate(zip(*self.tiles(grid), strict=True)):
            center = (q[axis] // tile).clamp(min=window // 2).clamp(max=count - 1 - window // 2)
            kept = kept & ((k[axis] // tile - center).abs() <= window // 2)
        return kept

    def axis_rules(self, grid: Grid) -> Iterator[AxisRule]:
        for length, tile, count, window in zip(grid.shape, *self.tiles(grid), strict=True):
            low, high = [], []
            for coordinate in range(length):
                center = min(max(coordinate // tile, window // 2), count - 1 - window // 2)
                low.append(max(0, center - window // 2) * tile)
                high.append(min((center + window // 2 + 1) * tile, length) - 1)
            yield AxisRule(torch.tensor(low), torch.tensor(high))

    def cuts(self, grid: Grid) -> tuple[Triple, Triple, Triple]:
        return self.tiles(grid)[0], NO_UNIT, (1, 1, 1)
