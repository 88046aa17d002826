"""Blocks that are kept whatever their score."""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass

import torch

from visattn.blocks.block_map import NONE
from visattn.geometry.layout import TokenLayout, on_cpu
from visattn.geometry.orders import Order, Triple
from visattn.patterns import Pattern
from visattn.selectors.stages.blocks import BlockPartition

__all__ = ["AlwaysKept", "always_kept_blocks"]


@dataclass(frozen=True)
class AlwaysKept:
    """Block pairs that are kept whatever their score.

    Keys of text and prefix tokens are always kept, and the queries of these tokens see all keys.

    Args:
        own_block: key blocks that hold tokens of the query block.
        first_frame: key blocks that hold tokens of the first frame.
        sink: the first key block of each grid.
        neighbours: key blocks with a token next to one of the query block, corners included.
        pattern: key blocks of which a static pattern keeps at least one token pair.
        window: sides of a tile and of a window in tiles: key blocks whose tile is within
            ``window // 2`` tiles of the query block's along each axis, for blocks that are tiles.
    """

    own_block: bool = True
    first_frame: bool = False
    sink: bool = False
    neighbours: bool = False
    pattern: Pattern | None = None
    window: tuple[Triple, Triple] | None = None


@functools.lru_cache(maxsize=64)
@on_cpu
def always_kept_blocks(
    always_kept: AlwaysKept,
    layout: TokenLayout,
    orders: tuple[tuple[Order, ...], tuple[Order, ...]],
    sides: tuple[BlockPartition, BlockPartition],
    device: torch.device,
) -> torch.Tensor:
    """Return the pairs that are always kept, bool ``[1, 1, Nq, Nk]`` on ``device``.

    Works for blocks that all heads share. The sides lie on the CPU, so that no value has to be read
    from a device.
    """
    q_side, k_side = sides
    q_grid, k_grid = q_side.grid, k_side.grid
    out = ~q_grid[:, None] | ~k_grid
    q_own, k_own = _segment_of(q_side, layout), _segment_of(k_side, layout)
    same = (q_own[:, None] == k_own) & q_grid[:, None] & k_grid
    if always_kept.own_block:
        out |= _overlap(q_side, k_side, layout.length) & same
    if always_kept.neighbours:
        out |= _touching(q_side, k_side, layout) & same
    if always_kept.first_frame or always_kept.window is not None:
        q_box, k_box = _boxes_of(q_side, layout), _boxes_of(k_side, layout)
        if always_kept.first_frame:
            out |= same & (k_box[:, 0, 0] == 0)
        if always_kept.window is not None:
            tile, window = (torch.tensor(sides) for sides in always_kept.window)
            apart = (q_box[:, None, 0] // tile - k_box[None, :, 0] // tile).abs()
            out |= same & (apart <= window // 2).all(-1)
    if always_kept.sink:
        for segment in k_own[k_grid].unique():
            out[:, int((k_own == segment).nonzero()[0, 0])] = True
    if always_kept.pattern is not None:
        for ordinal in range(len(layout.grids)):
            if orders[0][ordinal] != orders[0][0] or orders[1][ordinal] != orders[1][0]:
                raise ValueError(
                    f"pattern={always_kept.pattern} cannot be kept on grids in different orders"
                )
        block_map = always_kept.pattern.lower(
            layout,
            q_side.size,
            k_side.size,
            partial="promote",
            order=(orders[0][0], orders[1][0]),
        )
        out |= block_map.status() != NONE
    return out[None, None].to(device)


def _segment_of(side: BlockPartition, layout: TokenLayout) -> torch.Tensor:
    """Return the number of the segment of each block, on the CPU."""
    starts = torch.tensor(layout.starts)
    first = side.tokens[0, 0, :, 0].contiguous()
    return torch.searchsorted(starts, first, right=True) - 1


def _owners(side: BlockPartition, length: int) -> torch.Tensor:
    """Return the block of each token, on the CPU."""
    owner = torch.empty(length, dtype=torch.int64)
    tokens = side.tokens[0, 0]
    owner[tokens] = torch.arange(len(side))[:, None].expand_as(tokens)
    return owner


def _overlap(q_side: BlockPartition, k_side: BlockPartition, length: int) -> torch.Tensor:
    """Return the block pairs that share a token."""
    out = torch.zeros(len(q_side), len(k_side), dtype=torch.bool)
    out[_owners(q_side, length), _owners(k_side, length)] = True
    return out


def _touching(q_side: BlockPartition, k_side: BlockPartition, layout: TokenLayout) -> torch.Tensor:
    """Return the pairs of grid blocks that hold equal or adjacent tokens.

    Adjacent tokens differ by at most 1 in each of the three coordinates.
    """
    out = torch.zeros(len(q_side), len(k_side), dtype=torch.bool)
    q_all, k_all = _owners(q_side, layout.length), _owners(k_side, layout.length)
    for begin, grid in layout.grids:
        tokens = slice(begin, begin + grid.numel)
        queries, keys = q_all[tokens].view(grid.shape), k_all[tokens].view(grid.shape)
        for step in itertools.product((-1, 0, 1), repeat=3):
            here, there = [], []
            for d, length in zip(step, grid.shape, strict=True):
                here.append(slice(max(0, -d), length - max(0, d)))
                there.append(slice(max(0, d), length - max(0, -d)))
            out[queries[tuple(here)], keys[tuple(there)]] = True
    return out


def _boxes_of(side: BlockPartition, layout: TokenLayout) -> torch.Tensor:
    """Return the lowest and highest coordinates of each block in its grid, ``[N, 2, 3]``.

    Blocks outside the grids have -9.
    """
    out = torch.full((len(side), 2, 3), -9)
    tokens = side.tokens[0, 0]
    segments = _segment_of(side, layout)
    for number, (begin, segment) in enumerate(zip(layout.starts, layout.segments, strict=True)):
        if segment.grid is None:
            continue
        mine = segments == number
        places = torch.stack(segment.grid.coordinates(tokens[mine] - begin), -1)
        out[mine, 0], out[mine, 1] = places.amin(1), places.amax(1)
    return out
