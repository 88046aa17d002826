"""Attention where each query has its own list of key blocks, computed key block by key block.

The queries that attend to a key block are gathered into tiles, which attend to that block only. The
output and LSE of each (query, block) pair are written to a slot of a scratch buffer. A second
kernel merges the slots of a query: ``lse = log sum_i exp(lse_i)``, ``out = sum_i exp(lse_i - lse)
out_i``. There are no atomic additions, so results are deterministic. A query without a key has
output 0 and LSE -inf.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from visattn.kernels.levels import Keys, _keys, _step, _values, fitted
from visattn.kernels.pooled import apart

GROUP: tl.constexpr = tl.constexpr(64)  # columns of a group
MOST_PAIRS = 1 << 20  # (query, block) pairs at a time: 512 MiB of scratch at head size 128


@triton.jit
def _columns_kernel(
    levels,
    group_base,
    row_base,
    column_base,
    row_of,
    slot_of,
    num_q,
    num_k,
    groups,
    ROWS: tl.constexpr,
):
    """One program: GROUP key blocks of one head. For each block it lists the queries that attend to
    it, in order, and the slot of each pair.

    group_base int32 ``[B H, Nq, groups]``: number of blocks of a query before a group. row_base
    int64 ``[B H, Nq]``: number of pairs before a query. column_base int64 ``[B H, Nk]``: number of
    pairs before a block.
    """
    i_g = tl.program_id(0)
    i_bh = tl.program_id(1).to(tl.int64)
    o_k = i_g * GROUP + tl.arange(0, GROUP)
    m_k = o_k < num_k
    at = tl.load(column_base + i_bh * num_k + o_k, mask=m_k, other=0)
    for first in range(0, num_q, ROWS):
        o_q = first + tl.arange(0, ROWS)
        m_q = o_q < num_q
        p_level = levels + (i_bh * num_q + o_q)[:, None] * num_k + o_k[None, :]
        own = tl.load(p_level, mask=m_q[:, None] & m_k[None, :], other=0) == 1
        ones = own.to(tl.int32)
        place = at[None, :] + tl.cumsum(ones, 0) - ones
        before = tl.load(group_base + (i_bh * num_q + o_q) * groups + i_g, mask=m_q, other=0)
        base = tl.load(row_base + i_bh * num_q + o_q, mask=m_q, other=0)
        slot = (base + before)[:, None] + tl.cumsum(ones, 1) - ones
        tl.store(row_of + place, o_q[:, None] + slot.to(tl.int32) * 0, mask=own)
        tl.store(slot_of + place, slot, mask=own)
        at += tl.sum(ones, 0)


@triton.jit
def _queries_kernel(
    q,
    k,
    v,
    bias,
    part_out,
    part_lse,
    column_of,
    first_of,
    column_base,
    row_of,
    slot_of,
    tokens,
    stride_qb,
    stride_qh,
    stride_ql,
    stride_tb,
    stride_th,
    heads,
    slots,
    num_k,
    rows,
    scale,
    DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    WIDTH: tl.constexpr,
    IEEE: tl.constexpr,
):
    """One program: BLOCK_M pairs of one key block.

    column_of int32 ``[T]``: the block of a tile, numbered over all heads; first_of int64 ``[T]``:
    the first pair of a tile; k, v ``[B, S, rows, D]`` and bias ``[B, S, rows]``, WIDTH rows per
    block; tokens int32 ``[G, G', Nq, 1]``.
    """
    PRECISION: tl.constexpr = "ieee" if IEEE else "tf32"
    column = tl.load(column_of + tl.program_id(0))
    i_bh = column // num_k
    i_k = column % num_k
    i_b = (i_bh // heads).to(tl.int64)
    i_h = i_bh % heads
    i_s = i_h // (heads // slots)
    o_n = tl.arange(0, BLOCK_N)
    o_d = tl.arange(0, BLOCK_D)
    pair = tl.load(first_of + tl.program_id(0)) + tl.arange(0, BLOCK_M)
    m_m = pair < tl.load(column_base + column + 1)
    row = tl.load(row_of + pair, mask=m_m, other=0)
    slot = tl.load(slot_of + pair, mask=m_m, other=0)
    p_tokens = tokens + i_b * stride_tb + i_h.to(tl.int64) * stride_th
    token = tl.load(p_tokens + row, mask=m_m, other=0).to(tl.int64)
    p_q = q + i_b * stride_qb + i_h.to(tl.int64) * stride_qh
    b_q = _values(p_q, token * stride_ql, o_d, m_m, DIM, BLOCK_D, True)
    factor = scale * 1.4426950408889634  # log2(e)
    p_k = k + (i_b * slots + i_s) * rows * DIM
    p_v = v + (i_b * slots + i_s) * rows * DIM
    p_bias = bias + (i_b * slots + i_s) * rows
    b_m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    b_l = tl.zeros([BLOCK_M], tl.float32)
    b_o = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for first in range(i_k * WIDTH, (i_k + 1) * WIDTH, BLOCK_N):
        at = (first + o_n).to(tl.int64) * DIM
        b_k = _keys(p_k, at, o_d, o_n, DIM, BLOCK_D, False)
        b_v = _values(p_v, at, o_d, o_n, DIM, BLOCK_D, False)
        b_bias = tl.load(p_bias + first + o_n)[None, :]
        b_m, b_l, b_o, _, _, _ = _step(b_q, b_k, b_v, b_bias, b_m, b_l, b_o, factor, PRECISION)
    total = tl.where(b_l == 0.0, 1.0, b_l)
    b_o = b_o / total[:, None]
    b_lse = tl.where(b_l == 0.0, float("-inf"), b_m + tl.log2(total))
    m_md = m_m[:, None] & (o_d < DIM)[None, :]
    tl.store(part_out + slot[:, None] * DIM + o_d[None, :], b_o, mask=m_md)
    tl.store(part_lse + slot, b_lse, mask=m_m)


@triton.jit
def _join_kernel(
    part_out,
    part_lse,
    out,
    lse,
    row_base,
    tokens,
    stride_tb,
    stride_th,
    length_q,
    num_q,
    heads,
    DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ROWS: tl.constexpr,
):
    """One program: merge the slots of ROWS queries of one head."""
    i_bh = tl.program_id(1)
    i_b = (i_bh // heads).to(tl.int64)
    i_h = (i_bh % heads).to(tl.int64)
    o_q = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    o_d = tl.arange(0, BLOCK_D)
    m_q = o_q < num_q
    p_base = row_base + i_bh.to(tl.int64) * num_q + o_q
    begin = tl.load(p_base, mask=m_q, other=0)
    many = (tl.load(p_base + 1, mask=m_q, other=0) - begin).to(tl.int32)
    b_m = tl.full([ROWS], float("-inf"), tl.float32)
    b_l = tl.zeros([ROWS], tl.float32)
    b_o = tl.zeros([ROWS, BLOCK_D], tl.float32)
    for i in range(0, tl.max(many, 0)):
        here = m_q & (i < many)
        b_x = tl.load(part_lse + begin + i, mask=here, other=float("-inf"))
        m_new = tl.maximum(b_m, b_x)
        m_safe = tl.where(m_new == float("-inf"), 0.0, m_new)
        alpha = tl.exp2(b_m - m_safe)
        weight = tl.exp2(b_x - m_safe)
        p_part = part_out + (begin + i)[:, None] * DIM + o_d[None, :]
        b_part = tl.load(p_part, mask=here[:, None] & (o_d < DIM)[None, :], other=0.0)
        b_o = b_o * alpha[:, None] + b_part * weight[:, None]
        b_l = b_l * alpha + weight
        b_m = m_new
    empty = b_l == 0.0
    total = tl.where(empty, 1.0, b_l)
    b_o = b_o / total[:, None]
    b_lse = tl.where(empty, float("-inf"), (b_m + tl.log2(total)) * 0.6931471805599453)
    p_tokens = tokens + i_b * stride_tb + i_h * stride_th
    token = tl.load(p_tokens + o_q, mask=m_q, other=0).to(tl.int64)
    at = i_bh.to(tl.int64) * length_q + token
    m_qd = m_q[:, None] & (o_d < DIM)[None, :]
    tl.store(out + at[:, None] * DIM + o_d[None, :], b_o.to(out.dtype.element_ty), mask=m_qd)
    tl.store(lse + at, b_lse, mask=m_q)


class Pairs(NamedTuple):
    """Pairs of a query and a key block, sorted by block. Their slots are sorted by query.

    Attributes:
        count: number of pairs.
        row_base: int64 ``[B H Nq + 1]``, number of pairs before each query.
        column_base: int64 ``[B H Nk + 1]``, number of pairs before each block.
        row_of: int32 ``[count]``, the query of each pair.
        slot_of: int64 ``[count]``, the slot of each pair.
    """

    count: int
    row_base: torch.Tensor
    column_base: torch.Tensor
    row_of: torch.Tensor
    slot_of: torch.Tensor


def pairs_of(levels: torch.Tensor) -> Pairs:
    """Return the pairs where uint8 ``[B, H, Nq, Nk]``, contiguous, is 1 and not 0. This reads their
    number back from the device."""
    batch, heads, num_q, num_k = levels.shape
    device = levels.device
    flat = levels.view(batch * heads, num_q, num_k)
    starts = torch.arange(0, num_k, GROUP.value, device=device)
    upto = flat.cumsum(-1, dtype=torch.int32)
    group_base = torch.nn.functional.pad(upto, (1, 0)).index_select(-1, starts).contiguous()
    row_base, column_base = (
        torch.nn.functional.pad(count.flatten().long().cumsum(0), (1, 0))
        for count in (upto[..., -1], flat.sum(1, dtype=torch.int64))
    )
    count = int(row_base[-1])
    row_of = torch.empty(count, dtype=torch.int32, device=device)
    slot_of = torch.empty(count, dtype=torch.int64, device=device)
    _columns_kernel[(len(starts), batch * heads)](
        levels,
        group_base,
        row_base,
        column_base,
        row_of,
        slot_of,
        num_q,
        num_k,
        len(starts),
        ROWS=64,
        num_warps=8,
    )
    return Pairs(count, row_base, column_base, row_of, slot_of)


def queries_forward(
    q: torch.Tensor,
    levels: torch.Tensor,
    tokens: torch.Tensor,
    keys: Keys,
    scale: float,
    *,
    tile: tuple[int, int],
    warps: int,
    stages: int,
    most: int = MOST_PAIRS,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute attention where each query has its own key blocks.

    The numbers of pairs and tiles are read back from the device, because the size of the scratch
    buffer depends on them.

    Args:
        q: ``[B, H, Lq, D]``, stride 1 along D.
        levels: uint8 ``[B, H, Nq, Nk]``, contiguous: 1 where a query attends to a block, else 0.
        tokens: int32 ``[G, G', Nq, 1]``, the query of each row.
        keys: keys in block order; each block has the same multiple of ``tile[1]`` rows.
        scale: factor of the logits.
        tile: queries and keys of a tile.
        warps: warps of a program.
        stages: stages of the loop pipeline.
        most: limit of the pairs processed at a time; a single query may exceed it.

    Returns:
        Output ``[B, H, Lq, D]`` in the dtype of q, and LSE float32 ``[B, H, Lq]``.
    """
    batch, heads, length_q, dim = q.shape
    num_q = levels.shape[2]
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty((batch, heads, length_q), dtype=torch.float32, device=q.device)
    tile, stages = fitted(tile, stages, dim, False)
    run = functools.partial(_run, scale=scale, tile=tile, warps=warps, stages=stages)
    widest = max(1, int(levels.sum(-1, dtype=torch.int32).amax()))
    if widest * batch * heads * num_q <= most:
        run(q, levels, tokens, keys, out, lse)
        return out, lse
    step = max(1, most // widest)  # queries of one head
    queries_per_key = heads // keys.k.shape[1]
    for b in range(batch):
        for h in range(heads):
            key = h // queries_per_key
            head, key_head = (slice(b, b + 1), slice(h, h + 1)), slice(key, key + 1)
            token_head = tuple(
                slice(None) if size == 1 else part
                for size, part in zip(tokens.shape[:2], head, strict=True)
            )
            tensors = (keys.k, keys.v, keys.bias)
            head_keys = Keys(*(x[head[0], key_head].contiguous() for x in tensors))
            for begin in range(0, num_q, step):
                rows = slice(begin, begin + step)
                run(
                    q[head],
                    levels[head][:, :, rows].contiguous(),
                    tokens[token_head][:, :, rows].contiguous(),
                    head_keys,
                    out[head],
                    lse[head],
                )
    return out, lse


def _run(
    q: torch.Tensor,
    levels: torch.Tensor,
    tokens: torch.Tensor,
    keys: Keys,
    out: torch.Tensor,
    lse: torch.Tensor,
    *,
    scale: float,
    tile: tuple[int, int],
    warps: int,
    stages: int,
) -> None:
    """Compute all pairs at once; write contiguous ``out`` and ``lse`` at the queries of tokens."""
    batch, heads, length_q, dim = q.shape
    num_q, num_k = levels.shape[2:]
    device = q.device
    pairs = pairs_of(levels)
    block_m, block_n = tile
    tiles = -(-pairs.column_base.diff() // block_m)
    tile_end = tiles.cumsum(0)
    count = int(tile_end[-1])
    number = torch.arange(count, device=device)
    column_of = torch.searchsorted(tile_end, number, right=True)
    piece = number - (tile_end - tiles)[column_of]
    first_of = pairs.column_base[column_of] + piece * block_m
    part_out = torch.empty((pairs.count, dim), dtype=torch.float32, device=device)
    part_lse = torch.empty(pairs.count, dtype=torch.float32, device=device)
    block_d = max(16, triton.next_power_of_2(dim))
    rows = keys.k.shape[2]
    if count:
        _queries_kernel[(count,)](
            q,
            keys.k,
            keys.v,
            keys.bias,
            part_out,
            part_lse,
            column_of.int(),
            first_of,
            pairs.column_base,
            pairs.row_of,
            pairs.slot_of,
            tokens,
            *q.stride()[:3],
            *apart(tokens),
            heads,
            keys.k.shape[1],
            num_k,
            rows,
            scale,
            DIM=dim,
            BLOCK_M=block_m,
            BLOCK_N=block_n,
            BLOCK_D=block_d,
            WIDTH=rows // num_k,
            IEEE=q.dtype == torch.float32,
            num_warps=warps,
            num_stages=stages,
        )
    join = 16
    _join_kernel[(triton.cdiv(num_q, join), batch * heads)](
        part_out,
        part_lse,
        out,
        lse,
        pairs.row_base,
        tokens,
        *apart(tokens),
        length_q,
        num_q,
        heads,
        DIM=dim,
        BLOCK_D=block_d,
        ROWS=join,
        num_warps=4,
    )
