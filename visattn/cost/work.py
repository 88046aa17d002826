"""Counts of the work of a backend for the heads that share a pattern."""

from __future__ import annotations

from typing import NamedTuple

import torch

from visattn.attention.backends.block_rows import products_of, rows_of, window_of
from visattn.blocks.block_map import BlockMap

__all__ = ["BROAD", "Work", "work_of"]

BROAD = 192  # from this many queries of a row, a CPU has another rate


class Work(NamedTuple):
    """The work of some heads in a call, added up.

    Attributes:
        full: blocks without a mask; on a CPU, logits divided by the size of a block.
        partial: blocks with a mask, counted in the same way.
        broad: as full, in rows of 192 and more queries, which have a rate of their own on a CPU.
        rows: rows of query blocks; on a CPU, matrix products.
        shapes: the distinct numbers of (full, partial) blocks of a row; empty on a CPU, where one
            row runs at a time.
        moved: elements that are copied.

    Example:
        >>> from visattn.cost import Work
        >>> Work(full=6.0, partial=2.0, broad=0.0, rows=4, shapes=(), moved=0).rows
        4
    """

    full: float
    partial: float
    broad: float
    rows: int
    shapes: tuple[tuple[int, int], ...]
    moved: int


def work_of(block_map: BlockMap, backend: str, heads: int, dim: int) -> Work:
    """Count the work of a block map.

    Args:
        block_map: of the pattern.
        backend: ``"triton"`` or ``"blockwise"``.
        heads: number of heads with the map, times the batch size.
        dim: head size.

    Example:
        >>> from visattn import Grid, TokenLayout
        >>> from visattn.cost import work_of
        >>> from visattn.patterns import Block
        >>> block_map = Block((1, 4, 4)).lower(TokenLayout(Grid(1, 8, 8)), 16, 16)
        >>> work_of(block_map, "triton", heads=2, dim=64).full
        8.0
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
    """Count the work of the kernels, which copy keys and values and read queries by index."""
    bounds = block_map.bounds.long()
    full, masked = bounds[:, 2] - bounds[:, 0], bounds[:, 4] - bounds[:, 2]
    shapes = torch.stack([full, masked], 1).unique(dim=0).tolist()
    ordered = 2 * block_map.kv_layout.length * (block_map.k_blocks.index is not None)
    return Work(
        float(heads * full.sum()),
        float(heads * masked.sum()),
        0.0,
        heads * len(bounds),
        tuple((unmasked, partial) for unmasked, partial in shapes),
        heads * dim * ordered,
    )
