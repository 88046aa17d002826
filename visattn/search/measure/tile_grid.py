"""Tiles of a grid for stencils: the tile of each token, and the offsets between tiles."""

from __future__ import annotations

from functools import cached_property

import torch

from visattn.geometry.layout import Grid, TokenLayout, on_cpu
from visattn.geometry.orders import Triple
from visattn.patterns import Stencil
from visattn.readout import Tiling, default_tilings

__all__ = ["TileGrid", "stencil_of", "tile_grids"]


class TileGrid:
    """The first grid of a layout, divided into ``n`` tiles.

    A key tile has one of ``m`` relative offsets ``(dt, dh, dw)`` from a query tile. The offsets are
    numbered in raster order of ``[2 nt - 1, 2 nh - 1, 2 nw - 1]``, with the zero offset in the
    centre.

    Args:
        tile: tokens of a tile along each axis.
        layout: a layout with a grid.
    """

    @on_cpu
    def __init__(self, tile: Triple, layout: TokenLayout) -> None:
        tiling = Tiling(tile)
        self.tile, self.layout = tile, layout
        self.count: Grid = tiling.count(layout.grids[0][1])
        blocks = tiling.blocks(layout)
        first = blocks.first[0]
        tokens, exists = blocks.tokens(torch.arange(first, first + self.count.numel))
        self.tokens, self.exists = tokens, exists  # int64 and bool [n, size]
        self.sides = Grid(*(2 * n - 1 for n in self.count.shape))

    @property
    def name(self) -> str:
        """The tile as text, as in ``"1x8x8"``."""
        return "x".join(map(str, self.tile))

    @cached_property
    @on_cpu
    def owner(self) -> torch.Tensor:
        """The tile of each token, int64 ``[L]``; -1 outside the grid."""
        owner = torch.full((self.layout.length,), -1)
        number = torch.arange(len(self.tokens))[:, None].expand_as(self.tokens)
        owner[self.tokens[self.exists]] = number[self.exists]
        return owner

    @on_cpu
    def offset(self, q_tile: torch.Tensor, k_tile: torch.Tensor) -> torch.Tensor:
        """Return the numbers of the offsets of key tiles from query tiles, broadcast."""
        numbers = torch.zeros(torch.broadcast_shapes(q_tile.shape, k_tile.shape), dtype=torch.long)
        places = zip(self.count.coordinates(q_tile), self.count.coordinates(k_tile), strict=True)
        for (query, key), n, stride in zip(
            places, self.count.shape, self.sides.strides, strict=True
        ):
            numbers = numbers + (key - query + n - 1) * stride
        return numbers

    @cached_property
    @on_cpu
    def pairs(self) -> torch.Tensor:
        """The number of pairs of tiles that have each offset, int64 ``[m]``."""
        sides = [n - (torch.arange(2 * n - 1) - n + 1).abs() for n in self.count.shape]
        return (sides[0][:, None, None] * sides[1][:, None] * sides[2]).flatten()

    @on_cpu
    def triple(self, number: int) -> Triple:
        """Return the offset ``(dt, dh, dw)`` that has a number."""
        t, h, w = (int(x) for x in self.sides.coordinates(torch.tensor(number)))
        nt, nh, nw = self.count.shape
        return t - nt + 1, h - nh + 1, w - nw + 1

    def mass(self, weights: torch.Tensor) -> torch.Tensor:
        """Return the mass that rows ``[..., L]`` put on each tile, ``[..., n]``."""
        tokens, exists = self.tokens.to(weights.device), self.exists.to(weights.device)
        return (weights[..., tokens] * exists).sum(-1)


def tile_grids(layout: TokenLayout, block: int) -> list[TileGrid]:
    """Return the tilings for stencils: tiles of about ``block`` tokens, from flat ones to ones that
    are long in time."""
    tilings = default_tilings(layout.grids[0][1], block)
    return [TileGrid(x.tile, layout) for x in tilings if isinstance(x.tile, tuple)]


@on_cpu
def stencil_of(
    grid: TileGrid, offsets: torch.Tensor, columns: torch.Tensor, share: float
) -> Stencil | None:
    """Return the stencil of most mass within a share of the pairs of tiles.

    The tile of the query itself comes first. Then offsets and columns are added in the order of
    their mean mass for a pair of tiles.

    Args:
        grid: the tiling.
        offsets: mean mass of a pair of tiles by offset, ``[m]``.
        columns: mean mass of each key tile, ``[n]``.
        share: share of the pairs of tiles that the stencil may keep.

    Returns:
        The stencil, or None if the share is too small for the tile of the query itself.
    """
    tiles = grid.count.numel
    left = int(share * tiles**2) - tiles
    if left < 0:
        return None
    same_tile = int(grid.offset(torch.tensor(0), torch.tensor(0)))
    cost = torch.cat([grid.pairs, torch.full((tiles,), tiles)])
    worth = torch.cat([offsets, columns]).double()
    kept: list[Triple] = [(0, 0, 0)]
    kept_columns: list[int] = []
    for number in worth.sort(descending=True, stable=True).indices.tolist():
        if float(worth[number]) <= 0:
            break
        if number == same_tile or int(cost[number]) > left:
            continue
        left -= int(cost[number])
        if number < len(offsets):
            kept.append(grid.triple(number))
        else:
            kept_columns.append(number - len(offsets))
    return Stencil(grid.tile, tuple(kept), tuple(sorted(kept_columns)))
