"""Tilings of a grid for the measures: boxes, or runs in raster order."""

from __future__ import annotations

from dataclasses import dataclass

from visattn._arguments import check_count
from visattn.geometry.layout import Grid, TokenLayout
from visattn.geometry.orders import (
    BoxOrder,
    LineOrder,
    SequenceBlocks,
    Triple,
    fitted,
    sequence_blocks,
)

__all__ = ["MOST_TOKENS", "Tiling", "default_tilings"]

MOST_TOKENS = 64


@dataclass(frozen=True)
class Tiling:
    """Tiles of a grid. Other segments of a layout are cut into runs of the same number of tokens.

    Args:
        tile: sides of a box ``(frames, height, width)``; boxes at the far borders may be smaller.
            Or the tokens of a run in raster order.

    Raises:
        TypeError: ``tile`` is neither three integers nor one.
        ValueError: a number is below 1.

    Example:
        >>> from visattn.readout import Tiling
        >>> Tiling((1, 8, 8)).name, Tiling(64).name
        ('1x8x8', 'run 64')
    """

    tile: Triple | int

    def __post_init__(self) -> None:
        if isinstance(self.tile, tuple):
            if len(self.tile) != 3:
                raise TypeError(f"tile={self.tile!r} must be three integers, or one for a run")
            for side in self.tile:
                check_count("tile", side, 1)
        else:
            check_count("tile", self.tile, 1)

    @property
    def size(self) -> int:
        """Most tokens of a tile."""
        if isinstance(self.tile, int):
            return self.tile
        return self.tile[0] * self.tile[1] * self.tile[2]

    @property
    def name(self) -> str:
        """``"1x8x8"``, or ``"run 64"``."""
        return f"run {self.tile}" if isinstance(self.tile, int) else "x".join(map(str, self.tile))

    def blocks(self, layout: TokenLayout) -> SequenceBlocks:
        """Return the tiles of a whole sequence; the tiles of a grid are in raster order."""
        order = LineOrder() if isinstance(self.tile, int) else BoxOrder(self.tile)
        return sequence_blocks(layout, (order,) * len(layout.grids), self.size)

    def count(self, grid: Grid) -> Grid:
        """Return the grid of tiles; runs form a line."""
        if isinstance(self.tile, int):
            return Grid(1, 1, -(-grid.numel // self.tile))
        t, h, w = (-(-length // side) for length, side in zip(grid.shape, self.tile, strict=True))
        return Grid(t, h, w)


def default_tilings(grid: Grid, most: int = MOST_TOKENS) -> tuple[Tiling, ...]:
    """Return the tilings that are measured by default.

    These are boxes of about ``most`` tokens, from flat to long in time (for 64: 1x8x8, 2x4x8,
    4x4x4, 8x2x4, 16x2x2, ...), each fitted to the grid, and runs of ``most`` tokens in raster
    order, without duplicates.

    Args:
        grid: the grid.
        most: most tokens of a tile.

    Returns:
        The tilings.

    Example:
        >>> from visattn import Grid
        >>> from visattn.readout import default_tilings
        >>> [tiling.name for tiling in default_tilings(Grid(1, 16, 16))]
        ['1x8x8', 'run 64']
    """
    check_count("most", most, 1)
    boxes, frames = [], 1
    while frames <= most and frames < 2 * grid.frames:
        height = 1 << (((most // frames).bit_length() - 1) // 2)
        boxes.append(Tiling(fitted((frames, height, most // frames // height), grid, most)))
        frames *= 2
    return tuple(dict.fromkeys([*boxes, Tiling(min(most, grid.numel))]))
