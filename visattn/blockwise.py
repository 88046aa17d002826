"""Block-sparse attention in plain torch, on any device: only visited blocks are computed.

Rows of a block map become jobs. Rows that see one contiguous run of keys without a mask are joined
when the run is the same, and their keys are a slice; the others are gathered, rows with equally
many blocks in one batch. Each job is one scaled dot product attention of torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch.nn.functional import scaled_dot_product_attention

from visattn.blockmap import BlockMap
from visattn.layout import valid_keys
from visattn.reference import masked_softmax

__all__ = ["blockwise_attention"]

CHUNK = 1 << 24  # gathered key elements of one job


@dataclass(frozen=True)
class Run:
    """Queries at these ordered positions see the keys ``begin:end``, all of them."""

    queries: torch.Tensor
    begin: int
    end: int


@dataclass(frozen=True)
class Gather:
    """Rows ``[r]`` that visit ``n`` blocks each: key blocks ``[r, n]``, and tiles ``[r, n]``
    (0: whole, ``i``: tile ``i - 1`` of the map), or None when nothing is masked."""

    rows: torch.Tensor
    blocks: torch.Tensor
    tiles: torch.Tensor | None


@lru_cache(maxsize=256)
def _jobs(block_map: BlockMap) -> tuple[list[Run], list[Gather]]:
    bounds, q_blocks, k_blocks = block_map.bounds.long(), block_map.q_blocks, block_map.k_blocks
    _, tile_of = block_map.tiles
    tile_at = torch.zeros(block_map.num_visited, dtype=torch.int64)
    counts = bounds[:, 4] - bounds[:, 3]
    within = torch.arange(len(tile_of)) - torch.repeat_interleave(counts.cumsum(0) - counts, counts)
    tile_at[torch.repeat_interleave(bounds[:, 3], counts) + within] = tile_of + 1
    joined: dict[tuple[int, int], list[int]] = {}
    gathered: dict[tuple[int, bool], list[int]] = {}
    listed: list[tuple[torch.Tensor, torch.Tensor]] = []
    for row, (begin, _, _, whole, end) in enumerate(bounds.tolist()):
        columns, by_position = block_map.columns[begin:end].long().sort()
        listed.append((columns, tile_at[begin:end][by_position]))
        if begin == end:
            continue
        first, last = int(columns[0]), int(columns[-1])
        if whole == end and last - first + 1 == end - begin:
            run = (int(k_blocks.start[first]), int(k_blocks.start[last] + k_blocks.length[last]))
            joined.setdefault(run, []).append(row)
        else:
            masked = whole < end or bool((k_blocks.length[columns] < k_blocks.size).any())
            gathered.setdefault((end - begin, masked), []).append(row)
    runs = []
    for (begin, end), rows in joined.items():
        positions = [torch.arange(int(q_blocks.length[r])) + q_blocks.start[r] for r in rows]
        runs.append(Run(torch.cat(positions), begin, end))
    gathers = []
    for (_, masked), rows in gathered.items():
        blocks = torch.stack([listed[row][0] for row in rows])
        tiles = torch.stack([listed[row][1] for row in rows]) if masked else None
        gathers.append(Gather(torch.tensor(rows), blocks, tiles))
    return runs, gathers


def _attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float,
    with_lse: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attention over the last two axes; a row without a key gives 0."""
    if not with_lse:
        out = scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
        return (out if mask is None else out.masked_fill(~mask.any(-1, keepdim=True), 0)), None
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    logits = q.to(wide) @ k.to(wide).mT * scale
    if mask is None:
        lse = logits.logsumexp(-1)
        return ((logits - lse[..., None]).exp().to(q.dtype).to(wide) @ v.to(wide)).to(q.dtype), lse
    out, lse = masked_softmax(logits.masked_fill(~mask, -torch.inf), mask, v.to(wide), q.dtype)
    return out.to(q.dtype), lse


def _one_map(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    block_map: BlockMap,
    valid: torch.Tensor | None,
    scale: float,
    with_lse: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Heads that share a map: ``[B, H, L, D]`` in token order, in and out."""
    batch, heads, _, dim = q.shape
    device, q_blocks, k_blocks = q.device, block_map.q_blocks, block_map.k_blocks
    if k_blocks.index is not None:
        order = k_blocks.index.to(device)
        k, v = k.index_select(2, order), v.index_select(2, order)
        valid = None if valid is None else valid.index_select(1, order)
    runs, gathers = _jobs(block_map)
    outs: list[torch.Tensor] = []
    lses: list[torch.Tensor] = []
    places: list[torch.Tensor] = []

    def emit(out: torch.Tensor, lse: torch.Tensor | None, tokens: torch.Tensor) -> None:
        outs.append(out)
        places.append(tokens)
        if lse is not None:
            lses.append(lse)

    for run in runs:
        tokens = run.queries if q_blocks.index is None else q_blocks.index[run.queries]
        keys = slice(run.begin, run.end)
        mask = None if valid is None else valid[:, None, None, keys].expand(-1, 1, len(tokens), -1)
        emit(
            *_attend(
                q.index_select(2, tokens.to(device)),
                k[:, :, keys],
                v[:, :, keys],
                mask,
                scale,
                with_lse,
            ),
            tokens,
        )
    whole = torch.ones(1, block_map.block_q, block_map.block_k, dtype=torch.bool)
    all_tiles = torch.cat([whole, block_map.tiles[0]])
    for job in gathers:
        width = job.blocks.shape[1] * block_map.block_k
        step = max(1, CHUNK // (batch * heads * width * dim))
        for begin in range(0, len(job.rows), step):
            rows, blocks = job.rows[begin : begin + step], job.blocks[begin : begin + step]
            q_tokens, q_exists = q_blocks.tokens(rows)
            offset = torch.arange(block_map.block_k)
            position = k_blocks.start[blocks, None] + offset.minimum(
                k_blocks.length[blocks, None] - 1
            )
            position = position.flatten(1)  # [r, width]
            mask = None
            if job.tiles is not None:
                exists = offset < k_blocks.length[blocks, None]
                tiles = (
                    all_tiles[job.tiles[begin : begin + step]] & exists[:, :, None, :]
                )  # [r, n, q, k]
                mask = tiles.transpose(1, 2).flatten(2).to(device)[None]
            if valid is not None:
                seen = valid[:, position.to(device)][:, :, None, :]  # [B, r, 1, width]
                mask = seen if mask is None else mask & seen
                mask = mask.expand(batch, len(rows), block_map.block_q, width).repeat_interleave(
                    heads, 0
                )
            flat_q, flat_k = q_tokens.flatten().to(device), position.flatten().to(device)
            own_q = q.index_select(2, flat_q).reshape(batch * heads, *q_tokens.shape, dim)
            own_k = k.index_select(2, flat_k).reshape(batch * heads, *position.shape, dim)
            own_v = v.index_select(2, flat_k).reshape(batch * heads, *position.shape, dim)
            out, lse = _attend(own_q, own_k, own_v, mask, scale, with_lse)
            kept = q_exists.flatten().nonzero()[:, 0]
            emit(
                out.reshape(batch, heads, -1, dim).index_select(2, kept.to(device)),
                None
                if lse is None
                else lse.reshape(batch, heads, -1).index_select(2, kept.to(device)),
                q_tokens.flatten()[kept],
            )
    blocks = (block_map.visits == 0).nonzero()[:, 0]
    if len(blocks):  # rows of Skip
        tokens, exists = q_blocks.tokens(blocks)
        wide = torch.float64 if q.dtype == torch.float64 else torch.float32
        lse = (
            q.new_full((batch, heads, int(exists.sum())), -torch.inf, dtype=wide)
            if with_lse
            else None
        )
        emit(q.new_zeros(batch, heads, int(exists.sum()), dim), lse, tokens[exists])
    back = torch.cat(places).argsort().to(device)
    out = torch.cat(outs, 2).index_select(2, back)
    return out, torch.cat(lses, 2).index_select(2, back) if with_lse else None


def blockwise_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    maps: Sequence[BlockMap],
    text_lengths: torch.Tensor | None,
    scale: float,
    with_lse: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attention by one block map per head; shapes and results as ``reference_attention``.

    Args:
        maps: one per query head; heads with the same map run together.
        text_lengths: int64 ``[B, text segments]`` or None.
        with_lse: also return the LSE (slower on a CPU: torch's fused attention does not give it).
    """
    distinct = tuple(dict.fromkeys(maps))
    valid = None if text_lengths is None else valid_keys(text_lengths, distinct[0].kv_layout)
    share = q.shape[1] // k.shape[1]
    outs: list[torch.Tensor] = []
    lses: list[torch.Tensor] = []
    heads: list[int] = []
    for block_map in distinct:
        own = [head for head, item in enumerate(maps) if item is block_map]
        heads += own
        if len(own) == len(maps) and share == 1:
            own_q, own_k, own_v = q, k, v
        else:
            own_q, own_k, own_v = (
                q[:, own],
                k[:, [h // share for h in own]],
                v[:, [h // share for h in own]],
            )
        out, lse = _one_map(own_q, own_k, own_v, block_map, valid, scale, with_lse)
        outs.append(out)
        if lse is not None:
            lses.append(lse)
    if len(distinct) == 1:
        return outs[0], lses[0] if with_lse else None
    back = torch.tensor(heads, device=q.device).argsort()
    return torch.cat(outs, 1)[:, back], torch.cat(lses, 1)[:, back] if with_lse else None
