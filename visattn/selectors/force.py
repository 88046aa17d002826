"""Blocks that are kept whatever their score."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

from visattn.blockmap import NONE
from visattn.layout import TokenLayout, on_cpu
from visattn.orders import Order
from visattn.patterns import Pattern
from visattn.selectors.sides import Side

__all__ = ["Force", "forced_blocks"]


@dataclass(frozen=True)
class Force:
    """What is kept besides what is chosen. Text and prefix keys are kept always, and their queries
    see everything.

    Args:
        own: key blocks that hold tokens of the query block.
        first_frame: key blocks that hold tokens of the first frame.
        sink: the first key block of each grid.
        neighbours: key blocks whose box of coordinates touches that of the query block, corners
            included.
        pattern: key blocks that a static pattern keeps anything of.
    """

    own: bool = True
    first_frame: bool = False
    sink: bool = False
    neighbours: bool = False
    pattern: Pattern | None = None


@functools.lru_cache(maxsize=64)
@on_cpu
def forced_blocks(
    force: Force,
    layout: TokenLayout,
    orders: tuple[tuple[Order, ...], tuple[Order, ...]],
    sides: tuple[Side, Side],
) -> torch.Tensor:
    """Bool ``[1, 1, Nq, Nk]`` on the device of the sides, for blocks that all heads share."""
    q_side, k_side = sides
    device = q_side.length.device
    q_grid, k_grid = q_side.grid.cpu(), k_side.grid.cpu()
    out = ~q_grid[:, None] | ~k_grid
    q_own, k_own = _segment_of(q_side, layout), _segment_of(k_side, layout)
    same = (q_own[:, None] == k_own) & q_grid[:, None] & k_grid
    if force.own:
        out |= _overlap(q_side, k_side, layout.length) & same
    if force.neighbours or force.first_frame:
        q_box, k_box = _boxes_of(q_side, layout), _boxes_of(k_side, layout)
        if force.neighbours:
            apart = (q_box[:, None, 0] > k_box[None, :, 1] + 1) | (
                k_box[None, :, 0] > q_box[:, None, 1] + 1
            )
            out |= ~apart.any(-1) & same
        if force.first_frame:
            out |= same & (k_box[:, 0, 0] == 0)
    if force.sink:
        for segment in k_own[k_grid].unique():
            out[:, int((k_own == segment).nonzero()[0, 0])] = True
    if force.pattern is not None:
        for ordinal in range(len(layout.grids)):
            if orders[0][ordinal] != orders[0][0] or orders[1][ordinal] != orders[1][0]:
                raise ValueError(
                    f"pattern={force.pattern} cannot be forced on grids in different orders"
                )
        own = force.pattern.lower(
            layout,
            q_side.size,
            k_side.size,
            partial="promote",
            order=(orders[0][0], orders[1][0]),
        )
        out |= own.status() != NONE
    return out[None, None].to(device)


def _segment_of(side: Side, layout: TokenLayout) -> torch.Tensor:
    """Number of the segment of each block, on the CPU."""
    starts = torch.tensor(layout.starts)
    first = side.tokens[0, 0, :, 0].contiguous().cpu()
    return torch.searchsorted(starts, first, right=True) - 1


def _overlap(q_side: Side, k_side: Side, length: int) -> torch.Tensor:
    """Block pairs that share a token."""
    owner = torch.empty(length, dtype=torch.int64)
    k_tokens = k_side.tokens[0, 0].cpu()
    owner[k_tokens] = torch.arange(len(k_side))[:, None].expand_as(k_tokens)
    q_tokens = q_side.tokens[0, 0].cpu()
    out = torch.zeros(len(q_side), len(k_side), dtype=torch.bool)
    out[torch.arange(len(q_side))[:, None].expand_as(q_tokens), owner[q_tokens]] = True
    return out


def _boxes_of(side: Side, layout: TokenLayout) -> torch.Tensor:
    """First and last coordinates of the tokens of each block within its grid, ``[N, 2, 3]``, -9
    for others."""
    out = torch.full((len(side), 2, 3), -9)
    tokens = side.tokens[0, 0].cpu()
    segments = _segment_of(side, layout)
    for number, (begin, segment) in enumerate(zip(layout.starts, layout.segments, strict=True)):
        if segment.grid is None:
            continue
        mine = segments == number
        places = torch.stack(segment.grid.coordinates(tokens[mine] - begin), -1)
        out[mine, 0], out[mine, 1] = places.amin(1), places.amax(1)
    return out
