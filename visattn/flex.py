"""Block maps to and from FlexAttention's ``BlockMask``.

FlexAttention cuts a sequence into equal blocks. Therefore a map can be converted only if its blocks
are equal: every segment begins at a multiple of the block, and no order has cut boxes.
"""

from __future__ import annotations

import torch
from torch.nn.attention.flex_attention import BlockMask

from visattn.blocks.block_map import (
    FULL,
    NONE,
    PARTIAL,
    SHORT,
    TEXT,
    BlockMap,
    build_map,
    check_rows,
    distinct_tiles,
    pack_rows,
)
from visattn.geometry.layout import TokenLayout, on_cpu
from visattn.geometry.orders import LineOrder, SequenceBlocks, sequence_blocks

__all__ = ["from_block_mask", "to_block_mask"]


def _check_aligned(name: str, blocks: SequenceBlocks) -> None:
    equal = torch.arange(0, blocks.layout.length, blocks.size)
    if len(equal) != len(blocks) or not torch.equal(equal, blocks.start):
        raise ValueError(
            f"{name} {blocks.layout} is not cut into equal blocks of {blocks.size}; "
            "FlexAttention needs segments that begin at a multiple of the block and an order "
            "without cut boxes, such as LineOrder()"
        )


@on_cpu
def to_block_mask(block_map: BlockMap, device: torch.device | str = "cpu") -> BlockMask:
    """Convert a block map to a BlockMask of one batch item and head.

    FlexAttention then takes q, k and v in the orders of the map (``q_blocks.index`` and
    ``k_blocks.index``).

    Args:
        block_map: the map of a pattern.
        device: device of the BlockMask.

    Returns:
        The BlockMask, ``[1, 1, Lq, Lk]``.

    Raises:
        ValueError: the blocks of the map are not of equal length.

    Example:
        >>> from visattn import Grid, TokenLayout
        >>> from visattn.flex import to_block_mask
        >>> from visattn.patterns import Neighborhood
        >>> block_map = Neighborhood((3, 5, 5)).lower(TokenLayout(Grid(4, 8, 8)), 64, 64)
        >>> to_block_mask(block_map).shape
        (1, 1, 256, 256)
    """
    _check_aligned("layout", block_map.q_blocks)
    _check_aligned("kv_layout", block_map.k_blocks)
    status = block_map.status()
    tiles, index = block_map.tiles
    shape = (block_map.block_q, block_map.block_k)
    table = torch.cat([torch.zeros(1, *shape).bool(), torch.ones(1, *shape).bool(), tiles]).to(
        device
    )
    tile_of = ((status != NONE) & (status != PARTIAL)).long()
    tile_of[block_map.partial_pairs] = index + 2
    tile_of = tile_of.to(device)

    def mask_mod(
        b: torch.Tensor, h: torch.Tensor, q: torch.Tensor, k: torch.Tensor
    ) -> torch.Tensor:
        return table[tile_of[q // shape[0], k // shape[1]], q % shape[0], k % shape[1]]

    def lists(kept: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        first = kept.int().argsort(dim=1, descending=True, stable=True)
        return kept.sum(1).int()[None, None].to(device), first.int()[None, None].to(device)

    whole = (status == FULL) | (status == TEXT) | (status == SHORT)
    return BlockMask.from_kv_blocks(
        *lists(status == PARTIAL),
        *lists(whole),
        BLOCK_SIZE=shape,
        mask_mod=mask_mod,
        seq_lengths=(block_map.layout.length, block_map.kv_layout.length),
    )


@on_cpu
def from_block_mask(
    block_mask: BlockMask,
    layout: TokenLayout,
    kv_layout: TokenLayout | None = None,
    *,
    batch: int = 0,
    head: int = 0,
) -> BlockMap:
    """Convert one batch item and head of a BlockMask to a block map, with bit masks of the partial
    blocks.

    Args:
        block_mask: a mask whose ``mask_mod`` takes index tensors that broadcast.
        layout: what the queries are; its length must be that of the mask.
        kv_layout: what the keys are, if they are not the tokens of ``layout``.
        batch: which batch item.
        head: which head.

    Returns:
        The block map, in the natural order of the tokens.

    Raises:
        ValueError: lengths differ, blocks are not aligned with the segments, or a row is empty.

    Example:
        >>> from torch.nn.attention.flex_attention import create_block_mask
        >>> from visattn import Grid, TokenLayout
        >>> from visattn.flex import from_block_mask
        >>> def causal(b, h, q, k):
        ...     return q >= k
        >>> mask = create_block_mask(causal, None, None, 256, 256, device="cpu", BLOCK_SIZE=64)
        >>> from_block_mask(mask, TokenLayout(Grid(4, 8, 8))).num_visited
        10
    """
    keys = kv_layout or layout
    if tuple(block_mask.seq_lengths) != (layout.length, keys.length):
        raise ValueError(
            f"block_mask is for {tuple(block_mask.seq_lengths)} tokens but the layouts have "
            f"{(layout.length, keys.length)}"
        )
    for name, value, axis in (("batch", batch, 0), ("head", head, 1)):
        held = block_mask.kv_num_blocks.shape[axis]
        if not (0 <= value < held or (held == 1 and value >= 0)):
            raise ValueError(f"{name}={value} must be from 0 to {held - 1}, as block_mask has them")
    block_q, block_k = block_mask.BLOCK_SIZE
    natural = LineOrder()
    q_blocks = sequence_blocks(layout, (natural,) * len(layout.grids), block_q)
    k_blocks = sequence_blocks(keys, (natural,) * len(keys.grids), block_k)
    _check_aligned("layout", q_blocks)
    _check_aligned("kv_layout", k_blocks)
    dense = build_map(
        q_blocks, k_blocks, [None] * len(layout.grids), partial="exact", description="block_mask"
    )
    whole = dense.status()
    status = torch.zeros_like(whole)
    for counts, indices, partial in (
        (block_mask.kv_num_blocks, block_mask.kv_indices, True),
        (block_mask.full_kv_num_blocks, block_mask.full_kv_indices, False),
    ):
        if counts is None or indices is None:
            continue
        count = counts[min(batch, counts.shape[0] - 1), min(head, counts.shape[1] - 1)].cpu()
        index = (
            indices[min(batch, indices.shape[0] - 1), min(head, indices.shape[1] - 1)].cpu().long()
        )
        rows, places = (torch.arange(index.shape[1]) < count[:, None]).nonzero(as_tuple=True)
        columns = index[rows, places]
        status[rows, columns] = PARTIAL if partial else whole[rows, columns]
    bounds, columns = pack_rows(status)
    check_rows(bounds, "exact", "block_mask")
    out = BlockMap(q_blocks, k_blocks, bounds, columns, ((),) * len(layout.grids))
    b, h = torch.tensor(batch), torch.tensor(head)

    def evaluate(rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
        q, q_exists = q_blocks.tokens(rows)
        k, k_exists = k_blocks.tokens(columns)
        kept = block_mask.mask_mod(b, h, q[:, :, None], k[:, None, :])
        return kept & q_exists[:, :, None] & k_exists[:, None, :]

    tiles = distinct_tiles(*out.partial_pairs, block_q, block_k, evaluate)
    return BlockMap(q_blocks, k_blocks, bounds, columns, out.predicates, tiles)
