"""Gradients of attention by levels, one key set at a time, with the LSE over all key sets.

As in ``backward.py``, ``p = exp(s - lse)`` with the keys of a set and the LSE of the whole row. The
gradients of the keys of disjoint sets are independent, and dq is a sum over the sets. A set is

- LIST: the lanes (tokens, or means of some) of the key blocks at one level of the row, from lists;
- MEANS: one mean of each block at a level; the kernel checks the level of every block;
- SAMPLE: the same keys for all rows, with one bias per query block and key.

The bias of a lane is added to its logit, with SPREAD also ``1/2 sum_c (scale q_c)^2 var_c``, so
that::

    dq += scale ds k + scale^2 q (ds var)        dvar = 1/2 ds^T (scale q)^2

If each query has its own list of blocks (query blocks of one query), the queries are gathered. Each
pair of a query and a tile of lanes writes its part of dq to scratch, and a second kernel adds the
parts in a fixed order.

q, grad_out ``[B, H, Lq, D]``, stride 1 along D; k, v, spread ``[B, S, rows, D]`` and bias float32
``[1 or B, S, rows]`` in log2; lse, delta float32 ``[B, H, Lq]``; dq float32 ``[B, H, Lq, D]``; dk,
dv, dspread float32 ``[B, H, rows, D]``.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from visattn.kernels.backward import LOG2E, _rows_of
from visattn.kernels.forward import _wide
from visattn.kernels.levels import Keys, _lists_kernel, _values
from visattn.kernels.pooled import apart
from visattn.kernels.queries import MOST_PAIRS, pairs_of

LIST, MEANS, SAMPLE = (tl.constexpr(value) for value in range(3))


@triton.jit
def _half(b_q, scale):
    """``(scale q)^2 / 2``."""
    b_x = b_q.to(tl.float32) * scale
    return b_x * b_x * 0.5


@triton.jit
def _level_dq_kernel(
    q,
    k,
    v,
    bias,
    spread,
    grad_out,
    lse,
    delta,
    dq,
    levels,
    blocks,
    counts,
    tokens,
    length,
    stride_qb,
    stride_qh,
    stride_ql,
    stride_gb,
    stride_gh,
    stride_gl,
    stride_biasb,
    stride_biasr,
    stride_tb,
    stride_th,
    stride_nb,
    stride_nh,
    heads,
    slots,
    length_q,
    num_q,
    num_k,
    size,
    rows,
    lanes,
    level,
    scale,
    DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    KIND: tl.constexpr,
    SPREAD: tl.constexpr,
    FIRST: tl.constexpr,
    IEEE: tl.constexpr,
):
    """One program: BLOCK_M queries of a block, of one head. blocks int32 ``[B H Nq, Nk]`` and
    counts int32 ``[B H Nq, 2]``: the key blocks at the level, with ``lanes`` lanes each. Without
    FIRST the result is added to dq."""
    PRECISION: tl.constexpr = "ieee" if IEEE else "tf32"
    subs = (size + BLOCK_M - 1) // BLOCK_M
    i_q = tl.program_id(0) // subs
    i_sub = tl.program_id(0) % subs
    i_h = tl.program_id(1)
    i_b = tl.program_id(2).to(tl.int64)
    i_s = i_h // (heads // slots)
    many = tl.load(length + i_b * stride_nb + i_h.to(tl.int64) * stride_nh + i_q)
    if i_sub * BLOCK_M >= many:
        return
    o_m = i_sub * BLOCK_M + tl.arange(0, BLOCK_M)
    o_n = tl.arange(0, BLOCK_N)
    o_d = tl.arange(0, BLOCK_D)
    m_m = o_m < many
    m_md = m_m[:, None] & (o_d < DIM)[None, :]
    p_tokens = tokens + i_b * stride_tb + i_h.to(tl.int64) * stride_th + i_q.to(tl.int64) * size
    token = tl.load(p_tokens + tl.where(m_m, o_m, i_sub * BLOCK_M)).to(tl.int64)
    p_q = q + i_b * stride_qb + i_h.to(tl.int64) * stride_qh
    p_g = grad_out + i_b * stride_gb + i_h.to(tl.int64) * stride_gh
    b_q = _values(p_q, token * stride_ql, o_d, m_m, DIM, BLOCK_D, False)
    b_g = _values(p_g, token * stride_gl, o_d, m_m, DIM, BLOCK_D, False)
    at = (i_b * heads + i_h) * length_q
    b_lse, b_delta = _rows_of(lse, delta, at, token)
    row = (i_b * heads + i_h) * num_q + i_q
    p_k = k + (i_b * slots + i_s) * rows * DIM
    p_v = v + (i_b * slots + i_s) * rows * DIM
    p_s = spread + (i_b * slots + i_s) * rows * DIM
    if KIND == SAMPLE:
        p_bias = bias + i_b * stride_biasb + (i_h.to(tl.int64) * num_q + i_q) * stride_biasr
    else:
        p_bias = bias + i_b * stride_biasb + i_s.to(tl.int64) * stride_biasr
    factor = scale * LOG2E
    b_half = (_half(b_q, scale) * LOG2E).to(b_q.dtype)
    b_dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    b_dx = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    parts = (lanes + BLOCK_N - 1) // BLOCK_N
    if KIND == LIST:
        steps = tl.load(counts + row * 2) * parts
    else:
        steps = (rows + BLOCK_N - 1) // BLOCK_N
    for j in range(0, steps):
        if KIND == LIST:
            lane = (j % parts) * BLOCK_N + o_n
            there = lane < lanes
            place = tl.load(blocks + row * num_k + j // parts) * lanes + lane
        else:
            place = j * BLOCK_N + o_n
            there = place < rows
            if KIND == MEANS:
                own = tl.load(levels + row * num_k + place, mask=there, other=0)
                there = there & (own == level)
        offset = place.to(tl.int64) * DIM
        b_k = _values(p_k, offset, o_d, there, DIM, BLOCK_D, True)
        b_v = _values(p_v, offset, o_d, there, DIM, BLOCK_D, True)
        b_bias = tl.load(p_bias + place, mask=there, other=float("-inf"))
        b_s = tl.dot(_wide(b_q), tl.trans(_wide(b_k)), input_precision=PRECISION) * factor
        b_s += b_bias[None, :]
        if SPREAD:
            b_x = _values(p_s, offset, o_d, there, DIM, BLOCK_D, True)
            b_s += tl.dot(_wide(b_half), tl.trans(_wide(b_x)), input_precision=PRECISION)
        b_p = tl.exp2(b_s - b_lse[:, None])
        b_dp = tl.dot(_wide(b_g), tl.trans(_wide(b_v)), input_precision=PRECISION)
        b_ds = (b_p * (b_dp - b_delta[:, None])).to(b_k.dtype)
        b_dq = tl.dot(_wide(b_ds), _wide(b_k), b_dq, input_precision=PRECISION)
        if SPREAD:
            b_dx = tl.dot(_wide(b_ds), _wide(b_x), b_dx, input_precision=PRECISION)
    if SPREAD:
        b_dq += b_dx * b_q.to(tl.float32) * scale
    p_dq = dq + (at + token)[:, None] * DIM + o_d[None, :]
    b_dq = b_dq * scale
    if not FIRST:
        b_dq += tl.load(p_dq, mask=m_md, other=0.0)
    tl.store(p_dq, b_dq, mask=m_md)


@triton.jit
def _level_dkdv_kernel(
    q,
    k,
    v,
    bias,
    spread,
    grad_out,
    lse,
    delta,
    dk,
    dv,
    dspread,
    part_dq,
    levels,
    queries,
    counts,
    bases,
    slot_of,
    tokens,
    length,
    stride_qb,
    stride_qh,
    stride_ql,
    stride_gb,
    stride_gh,
    stride_gl,
    stride_biasb,
    stride_biasr,
    stride_tb,
    stride_th,
    stride_nb,
    stride_nh,
    heads,
    slots,
    length_q,
    num_q,
    num_k,
    size,
    rows,
    lanes,
    level,
    scale,
    DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    KIND: tl.constexpr,
    SPREAD: tl.constexpr,
    PAIRS: tl.constexpr,
    FIRST: tl.constexpr,
    IEEE: tl.constexpr,
):
    """One program: BLOCK_N lanes, of one key block with LIST, and one query head.

    queries int32: the query blocks that attend to each key block. With PAIRS, query blocks are
    single queries; the list of a key block starts at its entry of ``bases`` int64 ``[B H Nk + 1]``,
    and the parts of dq are written at ``slot_of`` int64. Otherwise ``queries`` is ``[B H Nk, Nq]``
    with counts int32 ``[B H Nk, 2]``. Without FIRST the results are added to dk, dv and dspread.
    """
    PRECISION: tl.constexpr = "ieee" if IEEE else "tf32"
    i_h = tl.program_id(1)
    i_b = tl.program_id(2).to(tl.int64)
    i_s = i_h // (heads // slots)
    o_m = tl.arange(0, BLOCK_M)
    o_n = tl.arange(0, BLOCK_N)
    o_d = tl.arange(0, BLOCK_D)
    m_d = o_d < DIM
    parts = (lanes + BLOCK_N - 1) // BLOCK_N
    subs = (size + BLOCK_M - 1) // BLOCK_M
    if KIND == LIST:
        block = tl.program_id(0) // parts
        lane = (tl.program_id(0) % parts) * BLOCK_N + o_n
        there = lane < lanes
        place = block * lanes + lane
        column = (i_b * heads + i_h) * num_k + block
    else:
        place = tl.program_id(0) * BLOCK_N + o_n
        there = place < rows
    offset = place.to(tl.int64) * DIM
    base = (i_b * slots + i_s) * rows * DIM
    # [N, D]
    b_k = _values(k + base, offset, o_d, there, DIM, BLOCK_D, True)
    b_v = _values(v + base, offset, o_d, there, DIM, BLOCK_D, True)
    if SPREAD:
        b_x = _values(spread + base, offset, o_d, there, DIM, BLOCK_D, True)
    p_bias = bias + i_b * stride_biasb
    if KIND != SAMPLE:
        p_bias += i_s.to(tl.int64) * stride_biasr
        b_bias = tl.load(p_bias + place, mask=there, other=float("-inf"))
    p_q = q + i_b * stride_qb + i_h.to(tl.int64) * stride_qh
    p_g = grad_out + i_b * stride_gb + i_h.to(tl.int64) * stride_gh
    p_tokens = tokens + i_b * stride_tb + i_h.to(tl.int64) * stride_th
    p_length = length + i_b * stride_nb + i_h.to(tl.int64) * stride_nh
    at = (i_b * heads + i_h) * length_q
    first_row = (i_b * heads + i_h) * num_q
    factor = scale * LOG2E
    b_dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    b_dv = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    b_dx = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    if PAIRS:
        begin = tl.load(bases + column)
        many = (tl.load(bases + column + 1) - begin).to(tl.int32)
        steps = (many + BLOCK_M - 1) // BLOCK_M
    elif KIND == LIST:
        steps = tl.load(counts + column * 2) * subs
    else:
        steps = num_q * subs
    for i in range(0, steps):
        if PAIRS:
            m_m = i * BLOCK_M + o_m < many
            pair = begin + i * BLOCK_M + o_m
            token = tl.load(p_tokens + tl.load(queries + pair, mask=m_m, other=0))
        else:
            if KIND == LIST:
                i_q = tl.load(queries + column * num_q + i // subs)
            else:
                i_q = i // subs
            o_q = (i % subs) * BLOCK_M + o_m
            m_m = o_q < tl.load(p_length + i_q)
            token = tl.load(p_tokens + i_q.to(tl.int64) * size + tl.where(m_m, o_q, 0))
        token = token.to(tl.int64)
        # [M, D]
        b_q = _values(p_q, token * stride_ql, o_d, m_m, DIM, BLOCK_D, False)
        b_g = _values(p_g, token * stride_gl, o_d, m_m, DIM, BLOCK_D, False)
        b_lse, b_delta = _rows_of(lse, delta, at, token)
        b_lse = tl.where(m_m, b_lse, float("inf"))
        if KIND == SAMPLE:
            p_own = p_bias + (i_h.to(tl.int64) * num_q + i_q) * stride_biasr
            b_bias = tl.load(p_own + place, mask=there, other=float("-inf"))
        # [N, M]
        b_s = tl.dot(_wide(b_k), tl.trans(_wide(b_q)), input_precision=PRECISION) * factor
        b_s += b_bias[:, None]
        if KIND == MEANS:
            own = tl.load(levels + (first_row + i_q) * num_k + place, mask=there, other=0)
            b_s = tl.where((own == level)[:, None], b_s, float("-inf"))
        if SPREAD:
            b_half = _half(b_q, scale)
            b_s += tl.dot(
                _wide(b_x),
                tl.trans(_wide((b_half * LOG2E).to(b_x.dtype))),
                input_precision=PRECISION,
            )
        b_p = tl.exp2(b_s - b_lse[None, :])
        b_dv = tl.dot(_wide(b_p.to(b_g.dtype)), _wide(b_g), b_dv, input_precision=PRECISION)
        b_dp = tl.dot(_wide(b_v), tl.trans(_wide(b_g)), input_precision=PRECISION)
        b_ds = (b_p * (b_dp - b_delta[None, :])).to(b_q.dtype)
        b_dk = tl.dot(_wide(b_ds), _wide(b_q), b_dk, input_precision=PRECISION)
        if SPREAD:
            b_dx = tl.dot(
                _wide(b_ds), _wide(b_half.to(b_ds.dtype)), b_dx, input_precision=PRECISION
            )
        if PAIRS:
            b_dq = tl.dot(tl.trans(_wide(b_ds)), _wide(b_k), input_precision=PRECISION) * scale
            slot = tl.load(slot_of + pair, mask=m_m, other=0) * parts + tl.program_id(0) % parts
            tl.store(
                part_dq + slot[:, None] * DIM + o_d[None, :], b_dq, mask=m_m[:, None] & m_d[None, :]
            )
    row = (i_b * heads + i_h) * rows * DIM + offset[:, None] + o_d[None, :]
    m_nd = there[:, None] & m_d[None, :]
    b_dk = b_dk * scale
    if not FIRST:
        b_dk += tl.load(dk + row, mask=m_nd, other=0.0)
        b_dv += tl.load(dv + row, mask=m_nd, other=0.0)
    tl.store(dk + row, b_dk, mask=m_nd)
    tl.store(dv + row, b_dv, mask=m_nd)
    if SPREAD:
        tl.store(dspread + row, b_dx, mask=m_nd)


@triton.jit
def _sum_kernel(
    part_dq,
    dq,
    row_base,
    tokens,
    stride_tb,
    stride_th,
    length_q,
    num_q,
    heads,
    parts,
    DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ROWS: tl.constexpr,
):
    """One program: add the parts of dq of ROWS queries of one head."""
    i_bh = tl.program_id(1)
    i_b = (i_bh // heads).to(tl.int64)
    i_h = (i_bh % heads).to(tl.int64)
    o_q = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    o_d = tl.arange(0, BLOCK_D)
    m_q = o_q < num_q
    p_base = row_base + i_bh.to(tl.int64) * num_q + o_q
    begin = tl.load(p_base, mask=m_q, other=0) * parts
    many = (tl.load(p_base + 1, mask=m_q, other=0) * parts - begin).to(tl.int32)
    b_dq = tl.zeros([ROWS, BLOCK_D], tl.float32)
    for i in range(0, tl.max(many, 0)):
        here = m_q & (i < many)
        p_part = part_dq + (begin + i)[:, None] * DIM + o_d[None, :]
        b_dq += tl.load(p_part, mask=here[:, None] & (o_d < DIM)[None, :], other=0.0)
    p_tokens = tokens + i_b * stride_tb + i_h * stride_th
    token = tl.load(p_tokens + o_q, mask=m_q, other=0).to(tl.int64)
    at = i_bh.to(tl.int64) * length_q + token
    m_qd = m_q[:, None] & (o_d < DIM)[None, :]
    tl.store(dq + at[:, None] * DIM + o_d[None, :], b_dq, mask=m_qd)


def _lists(seen: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the columns where each row of uint8 ``[B, H, R, C]`` is 1, int32 ``[B H R, C]``, and
    their number in the first column of int32 ``[B H R, 2]``."""
    count = seen.shape[3]
    rows = seen.numel() // count
    lists = torch.empty((rows, count), dtype=torch.int32, device=seen.device)
    counts = torch.empty((rows, 2), dtype=torch.int32, device=seen.device)
    block_k = max(16, triton.next_power_of_2(count))
    step = max(1, min(8, 2048 // block_k))
    _lists_kernel[(triton.cdiv(rows, step),)](
        seen,
        lists,
        lists,
        counts,
        rows,
        count,
        0,
        *[0] * 12,
        ROWS=step,
        BLOCK_K=block_k,
        FULL=True,
        POOLS=0,
        num_warps=8,
    )
    return lists, counts


def fitted(
    tile: tuple[int, int], stages: int, spread: bool, pairs: bool
) -> tuple[tuple[int, int], int]:
    """Return the tile and stages of the launch table, reduced with ``spread``, which adds a tile of
    variances and the sum of their gradients, and with ``pairs``, which write parts of dq."""
    if not (spread or pairs):
        return tile, stages
    return (max(16, tile[0] >> 1), max(16, tile[1] >> spread)), 1


def level_backward(
    q: torch.Tensor,
    grad_out: torch.Tensor,
    lse: torch.Tensor,
    delta: torch.Tensor,
    dq: torch.Tensor,
    levels: torch.Tensor,
    tokens: torch.Tensor,
    length: torch.Tensor,
    keys: Keys,
    scale: float,
    *,
    level: int,
    kind: int,
    first: bool,
    tile: tuple[int, int],
    warps: int,
    stages: int,
    most: int = MOST_PAIRS,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Compute the gradients of one set of keys.

    Args:
        q: as above.
        grad_out: as above.
        lse: as above.
        delta: as above.
        dq: float32 ``[B, H, Lq, D]``, contiguous; the gradient of q is added to it, or written to
            it with ``first``.
        levels: uint8 ``[B, H, Nq, Nk]``.
        tokens: int32 ``[G, G', Nq, size]``, the queries of each block.
        length: int32 ``[G, G', Nq]``, the number of queries of each block.
        keys: the keys of the set; with LIST each key block has the same number of rows.
        scale: factor of the logits.
        level: the level of the set.
        kind: LIST, MEANS or SAMPLE.
        first: whether this is the first set, so that dq is written.
        tile: queries and keys of a tile.
        warps: warps of a program.
        stages: stages of the loop pipeline.
        most: limit of the pairs of a single query and a tile that are processed at a time.

    Returns:
        Gradients of keys, values and variances (or None), float32 ``[B, H, rows, D]`` of each query
        head.
    """
    batch, heads, length_q, dim = q.shape
    num_q, num_k = levels.shape[2:]
    size, rows = tokens.shape[3], keys.k.shape[2]
    lanes = rows // num_k if kind == LIST.value else 1
    single_queries = size == 1 and kind == LIST.value and first and keys.spread is None
    tile, stages = fitted(tile, stages, keys.spread is not None, single_queries)
    shape = (batch, heads, rows, dim)
    dk, dv = (torch.empty(shape, dtype=torch.float32, device=q.device) for _ in range(2))
    dspread = None if keys.spread is None else torch.empty_like(dk)
    block_n = min(tile[1], max(16, triton.next_power_of_2(lanes if kind == LIST.value else rows)))
    parts = triton.cdiv(lanes, block_n)
    block_m = tile[0] if single_queries else min(tile[0], max(16, triton.next_power_of_2(size)))
    shared_arguments = {
        "q": q,
        "k": keys.k,
        "v": keys.v,
        "bias": keys.bias,
        "spread": q if keys.spread is None else keys.spread,
        "grad_out": grad_out,
        "lse": lse,
        "delta": delta,
        "length": length,
        "stride_qb": q.stride(0),
        "stride_qh": q.stride(1),
        "stride_ql": q.stride(2),
        "stride_gb": grad_out.stride(0),
        "stride_gh": grad_out.stride(1),
        "stride_gl": grad_out.stride(2),
        "stride_biasb": apart(keys.bias)[0],
        "stride_biasr": keys.bias.stride(-2),
        "stride_tb": apart(tokens)[0],
        "stride_th": apart(tokens)[1],
        "stride_nb": apart(length)[0],
        "stride_nh": apart(length)[1],
        "heads": heads,
        "slots": keys.k.shape[1],
        "length_q": length_q,
        "num_k": num_k,
        "size": size,
        "rows": rows,
        "lanes": lanes,
        "level": level,
        "scale": scale,
        "DIM": dim,
        "BLOCK_M": block_m,
        "BLOCK_N": block_n,
        "BLOCK_D": max(16, triton.next_power_of_2(dim)),
        "KIND": kind,
        "SPREAD": keys.spread is not None,
        "IEEE": q.dtype == torch.float32,
        "num_warps": warps,
        "num_stages": stages,
    }
    grid = (num_k * parts if kind == LIST.value else triton.cdiv(rows, block_n), heads, batch)
    gradients = {"dk": dk, "dv": dv, "dspread": dk if dspread is None else dspread}
    if not single_queries:
        lists = by_key = (levels, levels)
        if kind == LIST.value:
            seen = (levels == level).to(torch.uint8)
            lists, by_key = _lists(seen), _lists(seen.mT.contiguous())
        _level_dq_kernel[(num_q * triton.cdiv(size, block_m), heads, batch)](
            dq=dq,
            levels=levels,
            blocks=lists[0],
            counts=lists[1],
            tokens=tokens,
            num_q=num_q,
            FIRST=first,
            **shared_arguments,
        )
        _level_dkdv_kernel[grid](
            **gradients,
            part_dq=dq,
            levels=levels,
            queries=by_key[0],
            counts=by_key[1],
            bases=levels,
            slot_of=levels,
            tokens=tokens,
            num_q=num_q,
            PAIRS=False,
            FIRST=True,
            **shared_arguments,
        )
        return dk, dv, dspread
    widest = max(1, int((levels == level).sum(-1, dtype=torch.int32).amax()))
    step = max(1, most // (widest * parts * batch * heads))
    for begin in range(0, num_q, step):
        rows_of_step = slice(begin, begin + step)
        seen = (levels[:, :, rows_of_step] == level).to(torch.uint8).contiguous()
        step_tokens = tokens[:, :, rows_of_step].contiguous()
        token_strides = apart(step_tokens)
        pairs = pairs_of(seen)
        part_dq = torch.empty((pairs.count * parts, dim), dtype=torch.float32, device=q.device)
        _level_dkdv_kernel[grid](
            **gradients,
            part_dq=part_dq,
            levels=seen,
            queries=pairs.row_of,
            counts=pairs.row_of,
            bases=pairs.column_base,
            slot_of=pairs.slot_of,
            tokens=step_tokens,
            num_q=seen.shape[2],
            PAIRS=True,
            FIRST=begin == 0,
            **shared_arguments | {"stride_tb": token_strides[0], "stride_th": token_strides[1]},
        )
        sums = 16
        _sum_kernel[(triton.cdiv(seen.shape[2], sums), batch * heads)](
            part_dq,
            dq,
            pairs.row_base,
            step_tokens,
            *token_strides,
            length_q,
            seen.shape[2],
            heads,
            parts,
            DIM=dim,
            BLOCK_D=max(16, triton.next_power_of_2(dim)),
            ROWS=sums,
            num_warps=4,
        )
    return dk, dv, dspread
