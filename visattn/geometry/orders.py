"""Orders of a grid's tokens, and the blocks that an order is cut into.

An order is a permutation of a grid: raster order in any sequence of axes, boxes (3-D tiles, also of
the residue classes of a dilation), a Hilbert curve, or an explicit index. Blocks are runs of at
most ``size`` tokens of the ordered sequence; each carries the box of coordinates that bounds it,
from which predicates classify whole blocks. Orders are hashable.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Protocol

import torch

from visattn._arguments import check_count
from visattn.geometry.layout import Grid, TokenLayout, on_cpu

__all__ = [
    "AXES",
    "BoxOrder",
    "ExplicitOrder",
    "HilbertOrder",
    "LineOrder",
    "Order",
    "OrderedBlocks",
    "SequenceBlocks",
    "axis_cells",
    "axis_permutation",
    "fitted",
]

AXES = "thw"
Triple = tuple[int, int, int]


def axis_permutation(axes: str) -> Triple:
    """``"hwt"`` -> ``(1, 2, 0)``: the axis of the grid at each place, slowest first."""
    if not isinstance(axes, str) or sorted(axes) != sorted(AXES):
        raise ValueError(
            f"order={axes!r} must hold each of the letters t, h, w once, slowest axis first"
        )
    return (AXES.index(axes[0]), AXES.index(axes[1]), AXES.index(axes[2]))


@dataclass(frozen=True, eq=False)
class OrderedBlocks:
    """The blocks of one ordered grid. ``N`` blocks; all tensors int64 on the CPU.

    Attributes:
        start: first position of each block in the ordered grid, ``[N]``.
        length: number of tokens of each block, ``[N]``.
        low: lowest coordinates ``(t, h, w)`` of each block, ``[N, 3]``.
        high: highest coordinates ``(t, h, w)`` of each block, ``[N, 3]``.
        step: distance of neighbouring coordinates inside a block, per axis; 1 except for boxes of
            residue classes.
    """

    order: Order
    grid: Grid
    start: torch.Tensor
    length: torch.Tensor
    low: torch.Tensor
    high: torch.Tensor
    step: Triple = (1, 1, 1)


class Order(Protocol):
    """A permutation of a grid. ``index`` maps ordered positions to raster indices, int64
    ``[n]``."""

    def index(self, grid: Grid) -> torch.Tensor: ...

    def blocks(self, grid: Grid, size: int) -> OrderedBlocks: ...

    def permuted(self, axes: Triple, grid: Grid) -> Order:
        """Return an order of ``grid`` with the blocks of this one on ``grid.permuted(axes)``."""
        ...


def _unpermute(values: torch.Tensor, axes: Triple) -> torch.Tensor:
    """Return the columns ``[N, 3]`` of a permuted grid in the order ``t, h, w``."""
    out = torch.empty_like(values)
    out[:, list(axes)] = values
    return out


def _unpermute_triple(values: Triple, axes: Triple) -> Triple:
    out = [0, 0, 0]
    for place, axis in enumerate(axes):
        out[axis] = values[place]
    return (out[0], out[1], out[2])


@dataclass(frozen=True)
class LineOrder:
    """Raster order. ``axes`` names the axes, slowest first; ``"thw"`` is the natural order."""

    axes: str = AXES

    def __post_init__(self) -> None:
        axis_permutation(self.axes)

    def index(self, grid: Grid) -> torch.Tensor:
        return (
            torch.arange(grid.numel)
            .view(grid.shape)
            .permute(axis_permutation(self.axes))
            .reshape(-1)
        )

    def blocks(self, grid: Grid, size: int) -> OrderedBlocks:
        permutation = axis_permutation(self.axes)
        inner = grid.permuted(permutation)
        start = torch.arange(0, grid.numel, size)
        length = (grid.numel - start).clamp(max=size)
        a0, b0, c0 = inner.coordinates(start)
        a1, b1, c1 = inner.coordinates(start + length - 1)
        one_plane, one_row = a0 == a1, (a0 == a1) & (b0 == b1)
        zero = torch.zeros_like(a0)
        low = torch.stack([a0, b0.where(one_plane, zero), c0.where(one_row, zero)], 1)
        high = torch.stack(
            [
                a1,
                b1.where(one_plane, zero + inner.height - 1),
                c1.where(one_row, zero + inner.width - 1),
            ],
            1,
        )
        return OrderedBlocks(
            self, grid, start, length, _unpermute(low, permutation), _unpermute(high, permutation)
        )

    def permuted(self, axes: Triple, grid: Grid) -> LineOrder:
        return LineOrder("".join(AXES[axes[axis]] for axis in axis_permutation(self.axes)))


def axis_cells(
    length: int, tile: int, unit: int = 0, offset: int = 0, dilation: int = 1
) -> torch.Tensor:
    """Cut one axis into cells: int64 ``[cells, 2]`` of inclusive first and last coordinates.

    Each residue class modulo ``dilation`` is an axis of its own, cut at ``offset`` and then every
    ``unit`` places (0: no unit); ``tile`` cuts a unit further, or joins several units when it is a
    multiple of ``unit``.
    """
    cells = []
    for residue in range(min(dilation, length)):
        inner = -(-(length - residue) // dilation)
        period = max(unit, tile) if unit else tile
        edges = {0, inner}
        first = offset % period - period if offset else 0
        for begin in range(first, inner, period):
            edges.update(edge for edge in range(begin, begin + period, tile) if 0 < edge < inner)
        cuts = sorted(edges)
        cells += [(residue + a * dilation, residue + (b - 1) * dilation) for a, b in pairwise(cuts)]
    return torch.tensor(cells)


@dataclass(frozen=True)
class BoxOrder:
    """Boxes of tokens, one after the other; inside a box tokens keep raster order. A box is a
    block.

    Args:
        tile: largest box, per axis.
        unit: places at which boxes must begin anew, per axis (0: none); ``tile`` may be a multiple.
        offset: shift of the cuts, per axis.
        dilation: number of residue classes per axis; boxes hold one class (Hassani and Shi 2022,
            arXiv 2209.15001, dilated neighborhoods).
    """

    tile: Triple
    unit: Triple = (0, 0, 0)
    offset: Triple = (0, 0, 0)
    dilation: Triple = (1, 1, 1)

    def __post_init__(self) -> None:
        for name, least in (("tile", 1), ("unit", 0), ("offset", 0), ("dilation", 1)):
            value = getattr(self, name)
            if not isinstance(value, tuple) or len(value) != 3:
                raise TypeError(f"{name}={value!r} must be three integers, (frames, height, width)")
            for item in value:
                check_count(name, item, least)

    def cells(self, grid: Grid) -> list[torch.Tensor]:
        parameters = zip(grid.shape, self.tile, self.unit, self.offset, self.dilation, strict=True)
        return [axis_cells(*values) for values in parameters]

    def index(self, grid: Grid) -> torch.Tensor:
        box = torch.zeros((), dtype=torch.int64)
        for axis, cells in enumerate(self.cells(grid)):
            owner = torch.empty(grid.shape[axis], dtype=torch.int64)
            for number, (first, last) in enumerate(cells.tolist()):
                owner[first : last + 1 : self.dilation[axis]] = number
            shape = [1, 1, 1]
            shape[axis] = -1
            box = box * len(cells) + owner.view(shape)
        return torch.argsort(box.reshape(-1), stable=True)

    def blocks(self, grid: Grid, size: int) -> OrderedBlocks:
        cells = self.cells(grid)
        counts = [len(c) for c in cells]
        number = torch.arange(counts[0] * counts[1] * counts[2])
        t, h, w = Grid(counts[0], counts[1], counts[2]).coordinates(number)
        bounds = torch.stack([cells[0][t], cells[1][h], cells[2][w]], 1)  # [N, 3, 2]
        low, high = bounds[..., 0].contiguous(), bounds[..., 1].contiguous()
        length = ((high - low) // torch.tensor(self.dilation) + 1).prod(1)
        largest = int(length.max())
        if largest > size:
            raise ValueError(
                f"tile={self.tile} holds {largest} tokens, more than a block of {size}; use a "
                "smaller tile"
            )
        return OrderedBlocks(
            self, grid, length.cumsum(0) - length, length, low, high, self.dilation
        )

    def permuted(self, axes: Triple, grid: Grid) -> BoxOrder:
        fields = (self.tile, self.unit, self.offset, self.dilation)
        return BoxOrder(*(_unpermute_triple(values, axes) for values in fields))


def fitted(tile: Triple, grid: Grid, most: int) -> Triple:
    """Return a box close to ``tile`` that cuts a grid evenly. Sides are doubled in turn (width,
    height, frames) while the box holds at most ``most`` tokens; none is longer than the grid. Then
    each becomes as short as the same number of boxes allows: 5 for 8 on an axis of 9."""
    sides = [min(side, length) for side, length in zip(tile, grid.shape, strict=True)]
    grown = True
    while grown:
        grown = False
        for axis in (2, 1, 0):
            longer = [*sides]
            longer[axis] = min(2 * sides[axis], grid.shape[axis])
            if longer != sides and longer[0] * longer[1] * longer[2] <= most:
                sides, grown = longer, True
    t, h, w = (-(-n // -(-n // side)) for n, side in zip(grid.shape, sides, strict=True))
    return t, h, w


def _cut(order: Order, grid: Grid, size: int) -> OrderedBlocks:
    """Return the blocks of ``size`` ordered tokens, with their bounding boxes."""
    start = torch.arange(0, grid.numel, size)
    length = (grid.numel - start).clamp(max=size)
    places = torch.stack(grid.coordinates(order.index(grid)), 1)  # [n, 3]
    owner = (torch.arange(grid.numel) // size)[:, None].expand_as(places)
    low = torch.empty(len(start), 3, dtype=torch.int64).scatter_reduce(
        0, owner, places, "amin", include_self=False
    )
    high = torch.empty(len(start), 3, dtype=torch.int64).scatter_reduce(
        0, owner, places, "amax", include_self=False
    )
    return OrderedBlocks(order, grid, start, length, low, high)


@dataclass(frozen=True)
class HilbertOrder:
    """The Hilbert curve of the smallest cube around the grid whose side is a power of two. Places
    outside the grid are left out.

    Source: J. Skilling, "Programming the Hilbert curve", AIP Conf. Proc. 707 (2004).
    """

    def index(self, grid: Grid) -> torch.Tensor:
        places = torch.stack(grid.coordinates(torch.arange(grid.numel)))
        return torch.argsort(_hilbert_rank(places[[n > 1 for n in grid.shape]], max(grid.shape)))

    def blocks(self, grid: Grid, size: int) -> OrderedBlocks:
        return _cut(self, grid, size)

    def permuted(self, axes: Triple, grid: Grid) -> Order:
        return self


def _hilbert_rank(places: torch.Tensor, extent: int) -> torch.Tensor:
    """Rank along the curve of int64 places ``[axes, n]``, all below ``extent``."""
    x = list(places.clone())
    if len(x) == 0:
        return torch.zeros(places.shape[1], dtype=torch.int64)
    bits = max(1, (extent - 1).bit_length())
    for level in reversed(range(1, bits)):  # undo the rotations, coarse to fine
        below = (1 << level) - 1
        for axis in range(len(x)):
            flip = (x[axis] >> level & 1).bool()
            swap = torch.where(flip, 0, (x[0] ^ x[axis]) & below)
            x[0] = torch.where(flip, x[0] ^ below, x[0] ^ swap)
            if axis:
                x[axis] = x[axis] ^ swap
    for axis in range(1, len(x)):  # Gray code
        x[axis] = x[axis] ^ x[axis - 1]
    parity = torch.zeros_like(x[0])
    for level in range(1, bits):
        parity = torch.where((x[-1] >> level & 1).bool(), parity ^ ((1 << level) - 1), parity)
    rank = torch.zeros_like(x[0])
    for level in reversed(range(bits)):
        for value in x:
            rank = rank << 1 | ((value ^ parity) >> level & 1)
    return rank


@dataclass(frozen=True)
class ExplicitOrder:
    """Any permutation, given as the raster index at each position (clusters, sorted keys)."""

    raster: tuple[int, ...]

    def index(self, grid: Grid) -> torch.Tensor:
        index = torch.tensor(self.raster)
        if len(index) != grid.numel or not torch.equal(
            index.sort().values, torch.arange(grid.numel)
        ):
            raise ValueError(
                f"raster holds {len(index)} places; it must be a permutation of the {grid.numel} "
                "tokens"
            )
        return index

    def blocks(self, grid: Grid, size: int) -> OrderedBlocks:
        return _cut(self, grid, size)

    def permuted(self, axes: Triple, grid: Grid) -> ExplicitOrder:
        return ExplicitOrder(
            tuple(LineOrder("".join(AXES[a] for a in axes)).index(grid)[self.index(grid)].tolist())
        )


@dataclass(frozen=True, eq=False)
class SequenceBlocks:
    """The ``N`` blocks of a sequence, int64 on the CPU. No block holds tokens of two segments.

    Attributes:
        index: ordered position -> token, ``[L]``; None when it is the identity.
        start: first ordered position of each block, ``[N]``.
        length: number of tokens of each block, ``[N]``.
        segment: number of the segment, ``[N]``.
        grids: the blocks of each grid of the layout; those of grid ``i`` begin at ``first[i]``.
    """

    layout: TokenLayout
    orders: tuple[Order, ...]
    size: int
    index: torch.Tensor | None
    start: torch.Tensor
    length: torch.Tensor
    segment: torch.Tensor
    grids: tuple[OrderedBlocks, ...]
    first: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.start)

    @on_cpu
    def tokens(self, block: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the token indices of blocks ``[n]``, ``[n, size]``, and which of them exist."""
        offset = torch.arange(self.size)
        exists = offset < self.length[block, None]
        position = self.start[block, None] + offset.minimum(self.length[block, None] - 1)
        return (position if self.index is None else self.index[position]), exists


@lru_cache(maxsize=64)
@on_cpu
def sequence_blocks(layout: TokenLayout, orders: tuple[Order, ...], size: int) -> SequenceBlocks:
    """Cut a layout into blocks of at most ``size`` tokens, each grid in its own order."""
    index, start, length, segment, grids, first = [], [], [], [], [], []
    count, ordinal, identity = 0, 0, True
    for number, (begin, part) in enumerate(zip(layout.starts, layout.segments, strict=True)):
        if part.grid is None:
            index.append(begin + torch.arange(part.length))
            segment_start = torch.arange(0, part.length, size)
            segment_length = (part.length - segment_start).clamp(max=size)
        else:
            blocks = orders[ordinal].blocks(part.grid, size)
            order_index = orders[ordinal].index(part.grid)
            identity = identity and bool((order_index == torch.arange(part.length)).all())
            index.append(begin + order_index)
            segment_start, segment_length = blocks.start, blocks.length
            grids.append(blocks)
            first.append(count)
            ordinal += 1
        start.append(begin + segment_start)
        length.append(segment_length)
        segment.append(torch.full_like(segment_start, number))
        count += len(segment_start)
    return SequenceBlocks(
        layout=layout,
        orders=orders,
        size=size,
        index=None if identity else torch.cat(index),
        start=torch.cat(start),
        length=torch.cat(length),
        segment=torch.cat(segment),
        grids=tuple(grids),
        first=tuple(first),
    )
