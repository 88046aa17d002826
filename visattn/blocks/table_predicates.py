"""Predicates that are read from a table. No kernel evaluates them, so they become bit tiles."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from visattn.blocks.predicates import (
    Kind,
    Places,
    Status,
    form_range,
    linear_form,
    permute_weights,
    row_chunks,
)
from visattn.geometry.orders import OrderedBlocks, Triple

__all__ = ["CoarseTable", "TileOffsets"]


@dataclass(frozen=True, eq=False)
class CoarseTable:
    """``table[form(q) // unit, form(k) // unit]``, with ``causal`` also ``form(k) <= form(q)``.

    The form is a raster index; the table is bool ``[n, n]`` over runs of ``unit`` tokens of it.
    """

    weights: Triple
    unit: int
    table: torch.Tensor
    causal: bool = False
    kind: ClassVar[Kind] = "table"

    def allows(self, q: Places, k: Places) -> torch.Tensor:
        q_form, k_form = linear_form(self.weights, q), linear_form(self.weights, k)
        kept = self.table[q_form // self.unit, k_form // self.unit]
        return kept & (k_form <= q_form) if self.causal else kept

    def classify(self, q: OrderedBlocks, k: OrderedBlocks) -> Status:
        (q_low, q_high), (k_low, k_high) = form_range(self.weights, q), form_range(self.weights, k)
        q0, q1, k0, k1 = (x // self.unit for x in (q_low, q_high, k_low, k_high))
        # kept runs of the keys of each block, for each run of queries; then summed over queries
        kept = torch.zeros(len(self.table) + 1, len(k0), dtype=torch.int32)
        for runs in row_chunks(*self.table.shape):
            sums = self.table[runs].cumsum(1, dtype=torch.int32)
            before = sums[:, (k0 - 1).clamp(min=0)].mul_(k0 > 0)
            torch.sub(sums[:, k1], before, out=kept[1:][runs])
        kept.cumsum_(0)
        some = torch.empty(len(q0), len(k0), dtype=torch.bool)
        every = torch.empty_like(some)
        for rows in row_chunks(len(q0), len(k0)):
            count = kept[q1[rows] + 1] - kept[q0[rows]]
            area = (q1[rows] - q0[rows] + 1)[:, None] * (k1 - k0 + 1)
            some[rows], every[rows] = count > 0, count == area
            if self.causal:
                some[rows] &= k_low <= q_high[rows, None]
                every[rows] &= k_high <= q_low[rows, None]
        return some, every

    def permuted(self, axes: Triple) -> CoarseTable:
        return CoarseTable(permute_weights(self.weights, axes), self.unit, self.table, self.causal)


@dataclass(frozen=True, eq=False)
class TileOffsets:
    """``table[tile(k) - tile(q) + center]``: the offset between two tiles decides. The table is
    bool, with sides ``2 n - 1``."""

    tile: Triple
    table: torch.Tensor
    kind: ClassVar[Kind] = "table"

    def allows(self, q: Places, k: Places) -> torch.Tensor:
        shift = [
            b // s - a // s + n // 2
            for a, b, s, n in zip(q, k, self.tile, self.table.shape, strict=True)
        ]
        return self.table[shift[0], shift[1], shift[2]]

    def classify(self, q: OrderedBlocks, k: OrderedBlocks) -> Status:
        tile = torch.tensor(self.tile)
        q0, q1, k0, k1 = (x // tile for x in (q.low, q.high, k.low, k.high))
        center = torch.tensor(self.table.shape) // 2
        table = torch.zeros([n + 1 for n in self.table.shape], dtype=torch.int32)
        table[1:, 1:, 1:] = self.table
        table.cumsum_(0).cumsum_(1).cumsum_(2)
        flat, (_, side_h, side_w) = table.reshape(-1), table.shape
        some = torch.empty(len(q0), len(k0), dtype=torch.bool)
        every = torch.empty_like(some)
        for rows in row_chunks(len(q0), len(k0)):
            low = [k0[:, a] - q1[rows, a, None] + center[a] for a in range(3)]
            high = [k1[:, a] - q0[rows, a, None] + center[a] + 1 for a in range(3)]
            count = torch.zeros_like(low[0], dtype=torch.int32)
            for corner in range(8):
                t, h, w = [high[a] if corner >> a & 1 else low[a] for a in range(3)]
                sign = 1 if corner in (1, 2, 4, 7) else -1
                count += sign * flat[(t * side_h + h) * side_w + w]
            volume = (high[0] - low[0]) * (high[1] - low[1]) * (high[2] - low[2])
            some[rows], every[rows] = count > 0, count == volume
        return some, every

    def permuted(self, axes: Triple) -> TileOffsets:
        order = [axes.index(axis) for axis in range(3)]
        return TileOffsets(
            permute_weights(self.tile, axes), self.table.permute(order).contiguous()
        )
