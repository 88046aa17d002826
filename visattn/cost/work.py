"""Counts of what a backend does for the heads that share a pattern."""

from __future__ import annotations

from typing import NamedTuple

import torch

from visattn.attention.backends.block_rows import products_of, rows_of, window_of
from visattn.blocks.block_map import BlockMap

__all__ = ["BROAD", "Work", "work_of"]

BROAD = 192  # queries of a row from which a CPU multiplies them at a rate of its own


class Work(NamedTuple):
    """What some heads do in a call, all of them together.

    Attributes:
        full, partial: blocks without and with a mask; on a CPU logits over the size of a block.
        broad: as full, in rows of 192 queries and more, which only a CPU tells apart.
        rows: rows of query blocks; on a CPU, products.
        shapes: the blocks (full, partial) of a row, each that some row has; on a CPU none, where
            one row runs at a time.
        moved: elements that are copied to other places.
    """

    full: float
    partial: float
    broad: float
    rows: int
    shapes: tuple[tuple[int, int], ...]
    moved: int


def work_of(block_map: BlockMap, backend: str, heads: int, dim: int) -> Work:
    """The work of a map.

    Args:
        backend: ``"triton"`` or ``"blockwise"``.
        heads: that have the map, times the batch; dim: head size.
    """
    if backend == "triton":
        return _kernels(block_map, heads, dim)
    area = block_map.block_q * block_map.block_k
    full = partial = broad = 0
    copied = rows = 0
    for group in products_of(rows_of(block_map), heads, dim, True):
        rows += 1
        for row in group:
            queries, keys = row.shape
            if row.tiles:
                partial += queries * keys
            elif queries >= BROAD:
                broad += queries * keys
            else:
                full += queries * keys
        if group[0].keys and window_of(group) is None:
            copied += 2 * len(group) * group[0].keys
    ordered = 2 * block_map.layout.length * (block_map.q_blocks.index is not None)
    ordered += 2 * block_map.kv_layout.length * (block_map.k_blocks.index is not None)
    return Work(
        heads * full / area,
        heads * partial / area,
        heads * broad / area,
        rows,
        (),
        heads * dim * (copied + ordered),
    )


def _kernels(block_map: BlockMap, heads: int, dim: int) -> Work:
    """The kernels permute keys and values, and read queries by index."""
    bounds = block_map.bounds.long()
    full, masked = bounds[:, 2] - bounds[:, 0], bounds[:, 4] - bounds[:, 2]
    shapes = torch.stack([full, masked], 1).unique(dim=0).tolist()
    ordered = 2 * block_map.kv_layout.length * (block_map.k_blocks.index is not None)
    return Work(
        float(heads * full.sum()),
        float(heads * masked.sum()),
        0.0,
        heads * len(bounds),
        tuple((own, other) for own, other in shapes),
        heads * dim * ordered,
    )
