"""Predicates: conditions on coordinates that keep (query, key) pairs of one grid.

Patterns lower to a union (OR) of predicates. A predicate decides single token pairs (``allows``)
and whole block pairs (``classify``). ``classify`` uses the bounding boxes of the blocks, never
their tokens. Kernels evaluate the kinds ``axis``, ``band``, ``radial`` and ``label`` in partial
blocks. Partial blocks of the kind ``table`` become bit tiles; this kind has full blocks only where
its unit nests in the block.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal, Protocol

import torch

from visattn.geometry.layout import Grid
from visattn.geometry.orders import AXES, LineOrder, OrderedBlocks, Triple, axis_permutation

__all__ = [
    "Axis",
    "AxisRule",
    "Band",
    "Kind",
    "Label",
    "Places",
    "Predicate",
    "RadialBand",
    "Status",
    "form_range",
    "linear_form",
    "permute_weights",
    "row_chunks",
]

Places = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # coordinates (t, h, w), broadcastable
Status = tuple[torch.Tensor, torch.Tensor]  # (some pair is kept, every pair is kept), bool [Nq, Nk]
Kind = Literal["axis", "band", "radial", "label", "table"]

UNBOUNDED = 2**40
CHUNK = 1 << 18  # elements of a temporary tensor; block pairs are processed in chunks of rows


class Predicate(Protocol):
    """A condition on token pairs. ``classify`` may report an empty or full block as partial, but
    never a partial block as empty or full."""

    kind: ClassVar[Kind]

    def allows(self, q: Places, k: Places) -> torch.Tensor: ...

    def classify(self, q: OrderedBlocks, k: OrderedBlocks) -> Status: ...

    def permuted(self, axes: Triple) -> Predicate:
        """Return a predicate of a permuted grid (its axis ``i`` is axis ``axes[i]``) as one of the
        grid itself."""
        ...


def line_weights(grid: Grid, axes: Triple) -> Triple:
    """Return the weights of ``t, h, w`` in the raster index with the given nesting of axes."""
    weights = [0, 0, 0]
    for stride, axis in zip(grid.permuted(axes).strides, axes, strict=True):
        weights[axis] = stride
    return (weights[0], weights[1], weights[2])


def permute_weights(weights: Triple, axes: Triple) -> Triple:
    out = [0, 0, 0]
    for weight, axis in zip(weights, axes, strict=True):
        out[axis] = weight
    return (out[0], out[1], out[2])


def linear_form(weights: Triple, places: Places) -> torch.Tensor:
    return weights[0] * places[0] + weights[1] * places[1] + weights[2] * places[2]


def form_range(weights: Triple, blocks: OrderedBlocks) -> tuple[torch.Tensor, torch.Tensor]:
    """Return bounds of a linear form in each block, ``[N]`` each. They are exact if the form is the
    raster index of the order of the blocks."""
    order = blocks.order
    if isinstance(order, LineOrder) and weights == line_weights(
        blocks.grid, axis_permutation(order.axes)
    ):
        return blocks.start, blocks.start + blocks.length - 1
    scale = torch.tensor(weights)
    return (blocks.low * scale).sum(1), (blocks.high * scale).sum(1)


def row_chunks(rows: int, columns: int) -> list[slice]:
    step = max(1, CHUNK // max(1, columns))
    return [slice(begin, min(begin + step, rows)) for begin in range(0, rows, step)]


@dataclass(frozen=True, eq=False)
class Band:
    """``low <= form(k) - form(q) <= high`` for a linear form of the coordinates."""

    weights: Triple
    low: int
    high: int
    kind: ClassVar[Kind] = "band"

    def allows(self, q: Places, k: Places) -> torch.Tensor:
        difference = linear_form(self.weights, k) - linear_form(self.weights, q)
        return (difference >= self.low) & (difference <= self.high)

    def classify(self, q: OrderedBlocks, k: OrderedBlocks) -> Status:
        (q_low, q_high), (k_low, k_high) = form_range(self.weights, q), form_range(self.weights, k)
        smallest, largest = k_low - q_high[:, None], k_high - q_low[:, None]
        return (
            (smallest <= self.high) & (largest >= self.low),
            (smallest >= self.low) & (largest <= self.high),
        )

    def permuted(self, axes: Triple) -> Band:
        return Band(permute_weights(self.weights, axes), self.low, self.high)


@dataclass(frozen=True, eq=False)
class AxisRule:
    """One axis: ``low[x_q] <= x_k <= high[x_q]`` and ``(x_k - x_q) mod modulus == 0``; int64
    ``[L]``."""

    low: torch.Tensor
    high: torch.Tensor
    modulus: int = 1

    @staticmethod
    def everything(length: int) -> AxisRule:
        return AxisRule(torch.zeros(length, dtype=torch.int64), torch.full((length,), length - 1))

    def allows(self, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        inside = (self.low[q] <= k) & (k <= self.high[q])
        return inside & ((k - q) % self.modulus == 0) if self.modulus > 1 else inside

    def pairs(self) -> int:
        """Return the number of kept pairs of the axis. It assumes that both bounds are in the
        residue class of the query."""
        return int(((self.high - self.low) // self.modulus + 1).clamp(min=0).sum())

    def classify(
        self, q_cells: torch.Tensor, q_step: int, k_cells: torch.Tensor, k_step: int
    ) -> Status:
        """Return the status of cells ``[n, 2]`` (first, last coordinate) with the given steps."""
        count = (q_cells[:, 1] - q_cells[:, 0]) // q_step + 1
        inside = torch.arange(int(count.max()))
        place = q_cells[:, :1] + q_step * inside.minimum(
            count[:, None] - 1
        )  # [n, cell], padded with the last one
        low, high = self.low[place], self.high[place]
        first, last = k_cells[:, 0], k_cells[:, 1]
        every = (low.amax(1)[:, None] <= first) & (high.amin(1)[:, None] >= last)
        if bool((low.diff(dim=1) >= 0).all()) and bool((high.diff(dim=1) >= 0).all()):
            # low <= last holds for a prefix of the cell, high >= first for a suffix; a pair is kept
            # if the two overlap
            reached = torch.searchsorted(low, last.expand(len(low), -1).contiguous(), right=True)
            begun = torch.searchsorted(high, first.expand(len(high), -1).contiguous())
            some = reached > begun
        else:
            some = (low.amin(1)[:, None] <= last) & (high.amax(1)[:, None] >= first)
        if self.modulus == 1:
            return some, every
        q_fixed = ((q_step % self.modulus == 0) | (count == 1))[:, None]
        k_fixed = (k_step % self.modulus == 0) | (k_cells[:, 0] == k_cells[:, 1])
        apart = first - q_cells[:, :1]
        same = apart % self.modulus == 0
        fixed = q_fixed & k_fixed
        meets = apart % math.gcd(self.modulus, q_step, k_step) == 0  # else no equal residues
        return some & torch.where(fixed, same, meets), every & same & fixed


@dataclass(frozen=True, eq=False)
class Axis:
    """One rule per axis; a pair is kept if all of them hold."""

    rules: tuple[AxisRule, AxisRule, AxisRule]
    kind: ClassVar[Kind] = "axis"

    def allows(self, q: Places, k: Places) -> torch.Tensor:
        kept = [rule.allows(a, b) for rule, a, b in zip(self.rules, q, k, strict=True)]
        return kept[0] & kept[1] & kept[2]

    def classify(self, q: OrderedBlocks, k: OrderedBlocks) -> Status:
        some: torch.Tensor | None = None
        every: torch.Tensor | None = None
        for axis, rule in enumerate(self.rules):
            q_cells, q_cell = torch.stack([q.low[:, axis], q.high[:, axis]], 1).unique(
                dim=0, return_inverse=True
            )
            k_cells, k_cell = torch.stack([k.low[:, axis], k.high[:, axis]], 1).unique(
                dim=0, return_inverse=True
            )
            axis_some, axis_every = rule.classify(q_cells, q.step[axis], k_cells, k.step[axis])
            axis_some = axis_some[:, k_cell].index_select(0, q_cell)
            axis_every = axis_every[:, k_cell].index_select(0, q_cell)
            some = axis_some if some is None else some.logical_and_(axis_some)
            every = axis_every if every is None else every.logical_and_(axis_every)
        assert some is not None and every is not None
        return some, every

    def permuted(self, axes: Triple) -> Axis:
        by_axis = dict(zip(axes, self.rules, strict=True))
        return Axis((by_axis[0], by_axis[1], by_axis[2]))


class _RangeExtremes:
    """Largest and smallest table value over index ranges, from tables of doubling range length."""

    def __init__(self, table: torch.Tensor) -> None:
        self.largest, self.smallest = [table], [table]
        width = 1
        while 2 * width <= len(table):
            for levels, join in ((self.largest, torch.maximum), (self.smallest, torch.minimum)):
                levels.append(
                    join(
                        levels[-1][: len(table) - 2 * width + 1],
                        levels[-1][width : len(table) - width + 1],
                    )
                )
            width *= 2
        size = len(table)
        self.largest_at = torch.stack(
            [torch.nn.functional.pad(t, (0, size - len(t))) for t in self.largest]
        )
        self.smallest_at = torch.stack(
            [torch.nn.functional.pad(t, (0, size - len(t))) for t in self.smallest]
        )

    def __call__(
        self, first: torch.Tensor, last: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        level = torch.log2((last - first + 1).float()).long()
        other = last - (1 << level) + 1
        largest = torch.maximum(self.largest_at[level, first], self.largest_at[level, other])
        return largest, torch.minimum(
            self.smallest_at[level, first], self.smallest_at[level, other]
        )


@dataclass(frozen=True, eq=False)
class RadialBand:
    """``|r_q - r_k| <= widths[|t_q - t_k|]``: ``t`` the coordinate of the slowest axis, ``r`` the
    raster index in the plane of the other two. ``widths`` int64 ``[T]``, -1 for no pair.
    """

    grid: Grid
    widths: torch.Tensor
    axes: str = AXES
    kind: ClassVar[Kind] = "radial"

    def forms(self) -> tuple[int, Triple]:
        """Return the slowest axis and the weights of ``r``."""
        axes = axis_permutation(self.axes)
        weights = list(line_weights(self.grid, axes))
        weights[axes[0]] = 0
        return axes[0], (weights[0], weights[1], weights[2])

    def allows(self, q: Places, k: Places) -> torch.Tensor:
        axis, weights = self.forms()
        return (linear_form(weights, q) - linear_form(weights, k)).abs() <= self.widths[
            (q[axis] - k[axis]).abs()
        ]

    def _pieces(self, blocks: OrderedBlocks) -> torch.Tensor:
        """Return blocks as int64 ``[P, 5]``: block, first and last t, first and last r.

        Blocks in the order of the predicate are split at planes, so that each piece is a product of
        two ranges.
        """
        axis, weights = self.forms()
        number = torch.arange(len(blocks.start))
        if blocks.order != LineOrder(self.axes):
            scale = torch.tensor(weights)
            low, high = (blocks.low * scale).sum(1), (blocks.high * scale).sum(1)
            return torch.stack([number, blocks.low[:, axis], blocks.high[:, axis], low, high], 1)
        plane = self.grid.numel // self.grid.shape[axis]
        first, last = blocks.start, blocks.start + blocks.length - 1
        t0, t1 = first // plane, last // plane
        zero = torch.zeros_like(t0)
        head = torch.stack(
            [number, t0, t0, first % plane, (last - t0 * plane).clamp(max=plane - 1)], 1
        )
        middle = torch.stack([number, t0 + 1, t1 - 1, zero, zero + plane - 1], 1)
        tail = torch.stack([number, t1, t1, zero, last % plane], 1)
        pieces = torch.cat([head, middle[t1 - t0 > 1], tail[t1 > t0]])
        return pieces[pieces[:, 0].argsort(stable=True)]

    def classify(self, q: OrderedBlocks, k: OrderedBlocks) -> Status:
        q_pieces, k_pieces = self._pieces(q), self._pieces(k)
        extremes = _RangeExtremes(self.widths)
        _, k_t0, k_t1, k_r0, k_r1 = k_pieces.unbind(1)
        some = torch.zeros(len(q.start), len(k.start), dtype=torch.uint8)
        every = torch.ones_like(some)
        for rows in row_chunks(len(q_pieces), len(k_pieces)):
            owner, t0, t1, r0, r1 = (column[:, None] for column in q_pieces[rows].unbind(1))
            nearest = torch.maximum(t0 - k_t1, k_t0 - t1).clamp_(min=0)
            furthest = torch.maximum(t1 - k_t0, k_t1 - t0)
            widest, narrowest = extremes(nearest, furthest)
            gap = torch.maximum(r0 - k_r1, k_r0 - r1).clamp_(min=0)
            reach = torch.maximum(r1 - k_r0, k_r1 - r0)
            _fold(some, (widest >= gap), owner, k_pieces[:, 0], "amax")
            _fold(every, (narrowest >= reach), owner, k_pieces[:, 0], "amin")
        return some.bool(), every.bool()

    def permuted(self, axes: Triple) -> RadialBand:
        inner = axis_permutation(self.axes)
        shape = [0, 0, 0]
        for size, axis in zip(self.grid.shape, axes, strict=True):
            shape[axis] = size
        return RadialBand(Grid(*shape), self.widths, "".join(AXES[axes[axis]] for axis in inner))


def _fold(
    out: torch.Tensor, pieces: torch.Tensor, q_owner: torch.Tensor, k_owner: torch.Tensor, how: str
) -> None:
    """Reduce piece pairs ``[p, P]`` into their block pairs, the entries of ``out`` ``[Nq, Nk]``."""
    start = torch.full((len(pieces), out.shape[1]), int(how == "amin"), dtype=torch.uint8)
    by_key = start.scatter_reduce_(1, k_owner.expand(pieces.shape), pieces.byte(), how)
    out.scatter_reduce_(0, q_owner.expand(by_key.shape), by_key, how)


@dataclass(frozen=True, eq=False)
class Label:
    """``q_bits & k_bits != 0``, with int32 labels ``[n]`` by raster index. ``q_bits=None`` means
    that all bits of the queries are set."""

    grid: Grid
    k_bits: torch.Tensor
    q_bits: torch.Tensor | None = None
    kind: ClassVar[Kind] = "label"

    def allows(self, q: Places, k: Places) -> torch.Tensor:
        keys = self.k_bits[linear_form(self.grid.strides, k)]
        if self.q_bits is None:
            return (keys != 0) & (q[0] >= 0)
        return (self.q_bits[linear_form(self.grid.strides, q)] & keys) != 0

    @staticmethod
    def _union_and_common(
        bits: torch.Tensor, blocks: OrderedBlocks
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the bits set in at least one token, and in all tokens, of each block, ``[N]``."""
        owner = torch.repeat_interleave(torch.arange(len(blocks.start)), blocks.length)
        bits = bits[blocks.order.index(blocks.grid)]
        union = torch.zeros(len(blocks.start), dtype=bits.dtype)
        common = union.clone()
        for bit in range(32):
            plane = (bits >> bit & 1).to(bits.dtype)
            if bool(plane.any()):
                union |= torch.zeros_like(union).scatter_reduce(0, owner, plane, "amax") << bit
                common |= torch.ones_like(union).scatter_reduce(0, owner, plane, "amin") << bit
        return union, common

    def classify(self, q: OrderedBlocks, k: OrderedBlocks) -> Status:
        k_union, k_common = self._union_and_common(self.k_bits, k)
        if self.q_bits is None:
            rows = torch.ones(len(q.start), 1, dtype=torch.bool)
            owner = torch.repeat_interleave(torch.arange(len(k.start)), k.length)
            set_bits = (self.k_bits[k.order.index(k.grid)] != 0).byte()
            every = torch.ones(len(k.start), dtype=torch.uint8).scatter_reduce(
                0, owner, set_bits, "amin"
            )
            return rows & (k_union != 0), rows & every.bool()
        q_union, q_common = self._union_and_common(self.q_bits, q)
        return (q_union[:, None] & k_union) != 0, (q_common[:, None] & k_common) != 0

    def permuted(self, axes: Triple) -> Label:
        shape = [0, 0, 0]
        for size, axis in zip(self.grid.shape, axes, strict=True):
            shape[axis] = size
        order = [axes.index(axis) for axis in range(3)]
        view = self.grid.shape

        def move(bits: torch.Tensor) -> torch.Tensor:
            return bits.view(view).permute(order).reshape(-1).contiguous()

        return Label(
            Grid(*shape), move(self.k_bits), None if self.q_bits is None else move(self.q_bits)
        )
