"""A stencil: tiles at learned relative offsets, and absolute key tiles. A search learns one per
head."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from visattn._arguments import check_count, check_sizes, is_integer
from visattn.blocks.predicates import Label, Places, Predicate, linear_form
from visattn.blocks.table_predicates import TileOffsets
from visattn.geometry.layout import Grid
from visattn.geometry.orders import BoxOrder, Order, Triple
from visattn.patterns.base.boxes import NO_UNIT, box_candidates
from visattn.patterns.base.pattern import Pattern
from visattn.patterns.base.sizes import Sizes, sizes_of


@dataclass(frozen=True, eq=False)
class Stencil(Pattern):
    """The grid is cut into tiles; a query tile sees the tiles at given offsets from it, and fixed
    ones.

    Args:
        tile: tokens of a tile per axis; tiles at the far border may be cut.
        offsets: relative tile offsets ``(dt, dh, dw)``, key tile minus query tile; those that leave
            the grid, wholly or for some queries, are ignored there.
        columns: raster indices of key tiles that every query sees, in the grid of tiles.

    Raises:
        TypeError, ValueError: a value has a wrong type, a column is outside the grid, or some query
            would see no key of its grid.

    Example:
        >>> from visattn import Grid, TokenLayout
        >>> from visattn.patterns import Stencil
        >>> pattern = Stencil(tile=(2, 2, 2), offsets=((0, 0, 0), (-1, 0, 0), (1, 0, 0)))
        >>> round(pattern.density(TokenLayout(Grid(6, 8, 8))), 3)
        0.049

    Source:
        This project: what a search learns of a static head.
    Default:
        own
    Differences:
        none
    """

    tile: Sizes
    offsets: tuple[Triple, ...]
    columns: tuple[int, ...] = ()
    name: ClassVar[str] = "stencil"
    family: ClassVar[str] = "learned"
    color: ClassVar[str] = "#0072b2"
    example: ClassVar[str] = (
        "stencil((2, 2, 2), ((0, 0, 0), (-1, 0, 0), (1, 0, 0), (0, -1, -1), (0, 1, 1)), (0,))"
    )

    def __post_init__(self) -> None:
        check_sizes("tile", self.tile)
        if not isinstance(self.offsets, tuple) or not isinstance(self.columns, tuple):
            raise TypeError(f"offsets={self.offsets!r} and columns={self.columns!r} must be tuples")
        for offset in self.offsets:
            whole = isinstance(offset, tuple) and all(map(is_integer, offset))
            if not whole or len(offset) != 3:
                raise TypeError(
                    f"offsets holds {offset!r}; each is three integers (dt, dh, dw), in tiles"
                )
        for column in self.columns:
            check_count("columns", column, 0)
        if not self.offsets and not self.columns:
            raise ValueError(
                "offsets=() with columns=() keeps no key; give (0, 0, 0), or use Skip()"
            )

    def tiles(self, grid: Grid) -> tuple[Triple, Grid]:
        """Return the tokens of a tile, and the grid of tiles."""
        tile = sizes_of("tile", self.tile, grid)
        t, h, w = (-(-length // side) for length, side in zip(grid.shape, tile, strict=True))
        count = Grid(t, h, w)
        for column in self.columns:
            if column >= count.numel:
                raise ValueError(
                    f"columns holds {column} but grid {grid} has {count.numel} tiles of {tile}"
                )
        return tile, count

    def keeps(self, q: Places, k: Places, grid: Grid) -> torch.Tensor:
        tile, count = self.tiles(grid)
        q_tile = [place // side for place, side in zip(q, tile, strict=True)]
        k_tile = [place // side for place, side in zip(k, tile, strict=True)]
        column = linear_form(count.strides, (k_tile[0], k_tile[1], k_tile[2]))
        kept = (q[0] != q[0]) | torch.isin(
            column, torch.tensor(self.columns, device=column.device, dtype=column.dtype)
        )
        for offset in self.offsets:
            same = [b - a == d for a, b, d in zip(q_tile, k_tile, offset, strict=True)]
            kept = kept | (same[0] & same[1] & same[2])
        return kept

    def table(self, count: Grid) -> torch.Tensor:
        """Return the kept offsets, bool with sides ``2 n - 1``, centered."""
        table = torch.zeros([2 * n - 1 for n in count.shape], dtype=torch.bool)
        for offset in self.offsets:
            place = [d + n - 1 for d, n in zip(offset, count.shape, strict=True)]
            if all(0 <= p < side for p, side in zip(place, table.shape, strict=True)):
                table[place[0], place[1], place[2]] = True
        return table

    def pairs(self, grid: Grid) -> int:
        tile, count = self.tiles(grid)
        sides = [
            (torch.arange(n) * side).add(side).clamp(max=length) - torch.arange(n) * side
            for n, side, length in zip(count.shape, tile, grid.shape, strict=True)
        ]
        volume = sides[0][:, None, None] * sides[1][:, None] * sides[2]
        fixed = torch.zeros(count.numel, dtype=torch.bool)
        fixed[list(self.columns)] = True
        free = volume * ~fixed.view(count.shape)  # keys that not all queries see already
        total = grid.numel * int(volume.view(-1)[fixed].sum())
        for q_tiles, k_tiles in overlaps(self.offsets, count):
            total += int((volume[q_tiles] * free[k_tiles]).sum())
        return total

    def covered(self, grid: Grid) -> torch.Tensor | bool:
        tile, count = self.tiles(grid)
        if self.columns or (0, 0, 0) in self.offsets:
            return True
        seen = torch.zeros(count.shape, dtype=torch.bool)
        for q_tiles, _ in overlaps(self.offsets, count):
            seen[q_tiles] = True
        places = grid.coordinates(torch.arange(grid.numel))
        t, h, w = (place // side for place, side in zip(places, tile, strict=True))
        return seen[t, h, w]

    def predicates(self, grid: Grid) -> tuple[Predicate, ...]:
        tile, count = self.tiles(grid)
        union: list[Predicate] = [TileOffsets(tile, self.table(count))]
        if self.columns:
            places = grid.coordinates(torch.arange(grid.numel))
            t, h, w = (place // side for place, side in zip(places, tile, strict=True))
            owner = linear_form(count.strides, (t, h, w))
            union.append(Label(grid, torch.isin(owner, torch.tensor(self.columns)).int()))
        return tuple(union)

    def orders(self, grid: Grid, block_q: int, block_k: int) -> tuple[Order, Order]:
        """Boxes of whole tiles, or parts of one tile: the fullest, then the most compact."""
        tile, _ = self.tiles(grid)

        def order(size: int) -> Order:
            def worth(box: Triple) -> tuple[bool, int, float, Triple]:
                volume = box[0] * box[1] * box[2]
                whole = all(side % unit == 0 for side, unit in zip(box, tile, strict=True))
                part = all(side <= unit for side, unit in zip(box, tile, strict=True))
                surface = 1 / box[0] + 1 / box[1] + 1 / box[2]
                return (whole or part) and 2 * volume > size, volume, -surface, box

            return BoxOrder(max(box_candidates(grid, tile, size), key=worth), tile, NO_UNIT)

        return order(block_q), order(block_k)


def overlaps(
    offsets: tuple[Triple, ...], count: Grid
) -> list[tuple[tuple[slice, ...], tuple[slice, ...]]]:
    """Return the query tiles and the key tiles of each distinct offset that stays in the grid for
    some tile."""
    out = []
    for offset in dict.fromkeys(offsets):
        if all(abs(d) < n for d, n in zip(offset, count.shape, strict=True)):
            q_tiles = tuple(
                slice(max(0, -d), n - max(0, d)) for d, n in zip(offset, count.shape, strict=True)
            )
            k_tiles = tuple(
                slice(max(0, d), n - max(0, -d)) for d, n in zip(offset, count.shape, strict=True)
            )
            out.append((q_tiles, k_tiles))
    return out
