"""Tiles of a grid for stencils: which tile a token is in, and how far tiles are apart."""

from __future__ import annotations

from functools import cached_property

import torch

from visattn.geometry.layout import Grid, TokenLayout, on_cpu
from visattn.geometry.orders import Triple
from visattn.patterns import Stencil
from visattn.readout import Tiling, default_tilings

__all__ = ["TileGrid", "stencil_of", "tile_grids"]


class TileGrid:
    """The first grid of a layout in tiles, ``n`` of them; ``m`` relative offsets ``(dt, dh, dw)``
    of a key tile from a query tile are numbered in raster order of ``[2 nt - 1, 2 nh - 1, 2 nw -
    1]``, centered.

    Args:
        tile: tokens of a tile per axis; layout: with a grid.
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
        """``"1x8x8"``."""
        return "x".join(map(str, self.tile))

    @cached_property
    @on_cpu
    def owner(self) -> torch.Tensor:
        """The tile of each token, int64 ``[L]``; -1 outside the grid."""
        out = torch.full((self.layout.length,), -1)
        number = torch.arange(len(self.tokens))[:, None].expand_as(self.tokens)
        out[self.tokens[self.exists]] = number[self.exists]
        return out

    @on_cpu
    def offset(self, q_tile: torch.Tensor, k_tile: torch.Tensor) -> torch.Tensor:
        """The number of the offset of key tiles from query tiles, broadcast."""
        out = torch.zeros(torch.broadcast_shapes(q_tile.shape, k_tile.shape), dtype=torch.long)
        places = zip(self.count.coordinates(q_tile), self.count.coordinates(k_tile), strict=True)
        for (own, other), n, stride in zip(
            places, self.count.shape, self.sides.strides, strict=True
        ):
            out = out + (other - own + n - 1) * stride
        return out

    @cached_property
    @on_cpu
    def pairs(self) -> torch.Tensor:
        """How many pairs of tiles are apart by each offset, int64 ``[m]``."""
        sides = [n - (torch.arange(2 * n - 1) - n + 1).abs() for n in self.count.shape]
        return (sides[0][:, None, None] * sides[1][:, None] * sides[2]).flatten()

    @on_cpu
    def triple(self, number: int) -> Triple:
        """The offset of a number."""
        t, h, w = (int(x) for x in self.sides.coordinates(torch.tensor(number)))
        nt, nh, nw = self.count.shape
        return t - nt + 1, h - nh + 1, w - nw + 1

    def mass(self, weights: torch.Tensor) -> torch.Tensor:
        """Mass of each tile of rows ``[..., L]``: ``[..., n]``."""
        tokens, exists = self.tokens.to(weights.device), self.exists.to(weights.device)
        return (weights[..., tokens] * exists).sum(-1)


def tile_grids(layout: TokenLayout, block: int) -> list[TileGrid]:
    """Tiles of about a block, from flat to long in time, that stencils are tried with."""
    tilings = default_tilings(layout.grids[0][1], block)
    return [TileGrid(own.tile, layout) for own in tilings if isinstance(own.tile, tuple)]


@on_cpu
def stencil_of(
    grid: TileGrid, offsets: torch.Tensor, columns: torch.Tensor, share: float
) -> Stencil | None:
    """The stencil of most mass within a share of the pairs of tiles: offsets and columns are taken
    by what a pair of tiles of theirs holds on average, the own tile first.

    Args:
        offsets: mean mass of a pair of tiles by offset, ``[m]``; columns: mean mass of each key
            tile, ``[n]``.
        share: of the pairs of tiles.

    Returns:
        None where not even the own tile fits.
    """
    tiles = grid.count.numel
    left = int(share * tiles**2) - tiles
    if left < 0:
        return None
    own = int(grid.offset(torch.tensor(0), torch.tensor(0)))
    cost = torch.cat([grid.pairs, torch.full((tiles,), tiles)])
    worth = torch.cat([offsets, columns]).double()
    kept: list[Triple] = [(0, 0, 0)]
    seen: list[int] = []
    for number in worth.sort(descending=True, stable=True).indices.tolist():
        if float(worth[number]) <= 0:
            break
        if number == own or int(cost[number]) > left:
            continue
        left -= int(cost[number])
        if number < len(offsets):
            kept.append(grid.triple(number))
        else:
            seen.append(number - len(offsets))
    return Stencil(grid.tile, tuple(kept), tuple(sorted(seen)))
