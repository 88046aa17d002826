"""Block-sparse attention in plain torch, on any device: only visited blocks are computed.

Rows of a block map become jobs. Rows that see one contiguous run of keys without a mask are joined
when the run is the same, and their keys are a slice; the others are gathered, rows with equally
many blocks in one batch. Each job is one scaled dot product attention of torch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
from torch.nn.functional import scaled_dot_product_attention

from visattn.blockmap import BlockMap
from visattn.layout import on_cpu, valid_keys
from visattn.reference import masked_softmax

__all__ = ["blockwise_attention", "blockwise_backward"]

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


_JOBS: WeakKeyDictionary[BlockMap, tuple[list[Run], list[Gather]]] = WeakKeyDictionary()


def _jobs(block_map: BlockMap) -> tuple[list[Run], list[Gather]]:
    """The jobs of a map, made once."""
    if block_map not in _JOBS:
        _JOBS[block_map] = _make_jobs(block_map)
    return _JOBS[block_map]


@on_cpu
def _make_jobs(block_map: BlockMap) -> tuple[list[Run], list[Gather]]:
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


@dataclass(frozen=True)
class Piece:
    """One attention of a job: tokens ``[r, m]`` of queries and which of them exist, key positions
    as a
    slice or ``[r, n]``, and the mask ``[B or 1, r, m or 1, n]`` or None."""

    tokens: torch.Tensor
    exists: torch.Tensor
    keys: slice | torch.Tensor
    mask: torch.Tensor | None


def pieces(
    block_map: BlockMap, valid: torch.Tensor | None, rows: int, dim: int, fused: bool
) -> Iterator[Piece]:
    """Every visited block of a map, in pieces of bounded size. Indices are on the CPU, masks on the
    device
    of ``valid`` or the CPU.

    Args:
        valid: valid keys in block order, bool ``[B, Lk]``, or None.
        rows: batch times heads; dim: head size; fused: unmasked products are not written out.
    """
    q_blocks, k_blocks = block_map.q_blocks, block_map.k_blocks
    runs, gathers = _jobs(block_map)
    for run in runs:
        tokens = run.queries if q_blocks.index is None else q_blocks.index[run.queries]
        keys = slice(run.begin, run.end)
        mask = None if valid is None else valid[:, None, None, keys]
        step = len(tokens) if fused and valid is None else CHUNK // (rows * (run.end - run.begin))
        for part in tokens.split(max(1, step)):
            yield Piece(part[None], torch.ones_like(part[None], dtype=torch.bool), keys, mask)
    whole = torch.ones(1, block_map.block_q, block_map.block_k, dtype=torch.bool, device="cpu")
    all_tiles = torch.cat([whole, block_map.tiles[0]])
    offset = torch.arange(block_map.block_k, device="cpu")
    for job in gathers:
        width = job.blocks.shape[1] * block_map.block_k
        step = max(1, CHUNK // (rows * max(dim, block_map.block_q) * width))
        for begin in range(0, len(job.rows), step):
            blocks = job.blocks[begin : begin + step]
            tokens, q_exists = q_blocks.tokens(job.rows[begin : begin + step])
            length = k_blocks.length[blocks, None]
            position = (k_blocks.start[blocks, None] + offset.minimum(length - 1)).flatten(1)
            mask = None
            if job.tiles is not None:
                tiles = all_tiles[job.tiles[begin : begin + step]]  # [r, n, q, k]
                mask = (tiles & (offset < length)[:, :, None, :]).transpose(1, 2).flatten(2)[None]
            if valid is not None:
                seen = valid[:, position.to(valid.device)][:, :, None, :]  # [B, r, 1, n]
                mask = seen if mask is None else mask.to(valid.device) & seen
            yield Piece(tokens, q_exists, position, mask)


def take(x: torch.Tensor, index: slice | torch.Tensor) -> torch.Tensor:
    """``x[:, :, index]`` as ``[B, H, r, n, D]``; a slice is one row."""
    if isinstance(index, slice):
        return x[:, :, None, index]
    rows = x.index_select(2, index.flatten().to(x.device))
    return rows.reshape(*x.shape[:2], *index.shape, *x.shape[3:])


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
    q_blocks = block_map.q_blocks
    k, v, valid = in_block_order(block_map, k, v, valid)
    outs: list[torch.Tensor] = []
    lses: list[torch.Tensor] = []
    places: list[torch.Tensor] = []
    for piece in pieces(block_map, valid, batch * heads, dim, not with_lse):
        own = [take(x, index) for x, index in ((q, piece.tokens), (k, piece.keys), (v, piece.keys))]
        mask = None if piece.mask is None else spread(piece.mask, q, own[0].shape[3])
        flat = [x.reshape(batch * heads, *x.shape[2:]) for x in own]
        out, lse = _attend(flat[0], flat[1], flat[2], mask, scale, with_lse)
        kept = piece.exists.flatten().nonzero()[:, 0]
        places.append(piece.tokens.flatten()[kept])
        kept = kept.to(q.device)
        outs.append(out.reshape(batch, heads, -1, dim).index_select(2, kept))
        if lse is not None:
            lses.append(lse.reshape(batch, heads, -1).index_select(2, kept))
    empty = (block_map.visits == 0).nonzero()[:, 0]
    if len(empty):  # rows of Skip
        tokens, exists = q_blocks.tokens(empty)
        places.append(tokens[exists])
        unseen = q.index_select(2, places[-1].to(q.device))
        never = torch.zeros_like(unseen, dtype=torch.bool)
        outs.append(torch.where(never, unseen, 0))  # zero, and zero gradients
        wide = torch.float64 if q.dtype == torch.float64 else torch.float32
        lses.append(q.new_full((batch, heads, len(places[-1])), -torch.inf, dtype=wide))
    back = torch.cat(places).argsort().to(q.device)
    out = torch.cat(outs, 2).index_select(2, back)
    return out, torch.cat(lses, 2).index_select(2, back) if with_lse else None


def in_block_order(
    block_map: BlockMap, k: torch.Tensor, v: torch.Tensor, valid: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Keys, values and valid keys in the order of the map's key blocks."""
    if block_map.k_blocks.index is None:
        return k, v, valid
    order = block_map.k_blocks.index.to(k.device)
    valid = None if valid is None else valid.index_select(1, order)
    return k.index_select(2, order), v.index_select(2, order), valid


def spread(mask: torch.Tensor, q: torch.Tensor, rows: int) -> torch.Tensor:
    """A mask ``[B or 1, r, m or 1, n]`` for ``[B * H, r, m, n]``."""
    mask = mask.to(q.device)
    if mask.shape[0] == 1:
        return mask
    mask = mask.expand(-1, -1, rows, -1)
    return mask.repeat_interleave(q.shape[1], 0)


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
            keys = [head // share for head in own]
            own_q, own_k, own_v = q[:, own], k[:, keys], v[:, keys]
        out, lse = _one_map(own_q, own_k, own_v, block_map, valid, scale, with_lse)
        outs.append(out)
        if lse is not None:
            lses.append(lse)
    if len(distinct) == 1:
        return outs[0], lses[0] if with_lse else None
    back = torch.tensor(heads, device=q.device).argsort()
    return torch.cat(outs, 1)[:, back], torch.cat(lses, 1)[:, back] if with_lse else None


def blockwise_backward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    grad_out: torch.Tensor,
    grad_lse: torch.Tensor | None,
    maps: Sequence[BlockMap],
    text_lengths: torch.Tensor | None,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of q, k, v, from the visited blocks alone; out and LSE are those of forward.

    With ``p = exp(s - lse)`` and ``delta = sum_d grad_out out - grad_lse``::

        ds = p (grad_out v^T - delta)    dq = scale ds k    dk = scale ds^T q    dv = p^T grad_out
    """
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    delta = (grad_out.to(wide) * out.to(wide)).sum(-1)
    delta = delta if grad_lse is None else delta - grad_lse.to(wide)
    dq, dk, dv = (torch.zeros_like(x, dtype=wide) for x in (q, k, v))
    valid = None if text_lengths is None else valid_keys(text_lengths, maps[0].kv_layout)
    share = q.shape[1] // k.shape[1]
    for head, block_map in enumerate(maps):
        own, key = slice(head, head + 1), slice(head // share, head // share + 1)
        own_k, own_v, own_valid = in_block_order(
            block_map, k[:, key].to(wide), v[:, key].to(wide), valid
        )
        order = block_map.k_blocks.index
        sum_k, sum_v = torch.zeros_like(own_k), torch.zeros_like(own_v)
        for piece in pieces(block_map, own_valid, q.shape[0], q.shape[3], False):
            b_q, b_do = (take(x[:, own].to(wide), piece.tokens) for x in (q, grad_out))
            b_k, b_v = take(own_k, piece.keys), take(own_v, piece.keys)
            b_lse, b_delta = (take(x[:, own, :, None], piece.tokens) for x in (lse, delta))
            p = (b_q @ b_k.mT * scale - b_lse).exp()  # of a row without a key masked below
            kept = piece.exists[None, None, :, :, None].to(q.device)
            if piece.mask is not None:
                kept = kept & piece.mask.to(q.device)[:, None]
            p = torch.where(kept, p, 0)
            ds = p * (b_do @ b_v.mT - b_delta) * scale
            place = piece.tokens.flatten().to(q.device)
            dq[:, own].index_add_(2, place, (ds @ b_k).flatten(2, 3))
            for total, part in ((sum_k, ds.mT @ b_q), (sum_v, p.mT @ b_do)):
                if isinstance(piece.keys, slice):
                    total[:, :, piece.keys] += part[:, :, 0]
                else:
                    total.index_add_(2, piece.keys.flatten().to(q.device), part.flatten(2, 3))
        for total, part in ((dk, sum_k), (dv, sum_v)):
            if order is None:
                total[:, key] += part
            else:
                total[:, key].index_add_(2, order.to(q.device), part)
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)
