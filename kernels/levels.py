"""Attention forward by levels: queries attend to the tokens of a key block, to means of groups of
its tokens, or to one mean of the block.

All queries of a block attend to the same blocks. Computed in log2 domain, as in ``forward.py``,
over

- level 1: runs of BLOCK_N keys of the blocks in a list;
- units: runs of UNIT keys or means, BLOCK_N / UNIT at a time; a list holds the first index of each,
  divided by UNIT;
- the rest: one mean of each block whose level is ``REST_LEVEL``, or a sample of keys.

The logit of a mean of n tokens has log2 n added, with SPREAD also ``1/2 sum_c (scale q_c)^2
var_c``. Keys that are excluded have a bias of minus infinity. A row without a key has output 0 and
LSE -inf.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from visattn.kernels.forward import _wide
from visattn.kernels.pooled import apart

NO_REST, MEANS, SAMPLE = (tl.constexpr(value) for value in range(3))
REST_LEVEL: tl.constexpr = tl.constexpr(255)


@triton.jit
def _lists_kernel(
    levels,
    full_list,
    unit_list,
    counts,
    num_rows,
    num_k,
    units,
    value0,
    value1,
    value2,
    value3,
    count0,
    count1,
    count2,
    count3,
    base0,
    base1,
    base2,
    base3,
    ROWS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    FULL: tl.constexpr,
    POOLS: tl.constexpr,
):
    """One program: ROWS rows.

    full_list int32 ``[rows, Nk]``: the blocks at level 1. unit_list int32 ``[rows, units]``: the
    units of the blocks at the POOLS levels ``value``; a block has ``count`` units, numbered from
    ``base``. counts int32 ``[rows, 2]``: the lengths of both lists.
    """
    o_r = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    o_k = tl.arange(0, BLOCK_K)
    m_r = o_r < num_rows
    inside = m_r[:, None] & (o_k < num_k)[None, :]
    level = tl.load(levels + o_r[:, None] * num_k + o_k[None, :], mask=inside, other=0)
    if FULL:
        own = (level == 1).to(tl.int32)
        place = tl.cumsum(own, 1) - own
        tl.store(full_list + o_r[:, None] * num_k + place, o_k[None, :] + place * 0, mask=own != 0)
        tl.store(counts + o_r * 2, tl.sum(own, 1), mask=m_r)
    else:
        tl.store(counts + o_r * 2, tl.zeros([ROWS], tl.int32), mask=m_r)
    begin = tl.zeros([ROWS], tl.int32)
    for i in tl.static_range(POOLS):
        if i == 0:
            value, count, base = value0, count0, base0
        elif i == 1:
            value, count, base = value1, count1, base1
        elif i == 2:
            value, count, base = value2, count2, base2
        else:
            value, count, base = value3, count3, base3
        own = (level == value).to(tl.int32)
        place = begin[:, None] + (tl.cumsum(own, 1) - own) * count
        p_unit = unit_list + o_r[:, None] * units + place
        for u in range(0, count):
            tl.store(p_unit + u, base + o_k[None, :] * count + u + place * 0, mask=own != 0)
        begin += tl.sum(own, 1) * count
    tl.store(counts + o_r * 2 + 1, begin, mask=m_r)


@triton.jit
def _step(b_q, b_k, b_v, b_bias, b_m, b_l, b_o, factor, PRECISION: tl.constexpr):
    """Add a tile of keys ``[D, N]`` and values ``[N, D]``, with biases ``[1, N]`` or ``[M, N]``."""
    b_s = tl.dot(_wide(b_q), _wide(b_k), input_precision=PRECISION) * factor + b_bias
    m_new = tl.maximum(b_m, tl.max(b_s, 1))
    m_safe = tl.where(m_new == float("-inf"), 0.0, m_new)
    b_p = tl.exp2(b_s - m_safe[:, None])
    b_t = tl.sum(b_p, 1)
    alpha = tl.exp2(b_m - m_safe)
    b_l = b_l * alpha + b_t
    b_o = b_o * alpha[:, None]
    b_o = tl.dot(_wide(b_p.to(b_v.dtype)), _wide(b_v), b_o, input_precision=PRECISION)
    return m_new, b_l, b_o, alpha, b_t, b_s


@triton.jit
def _keys(p, at, o_d, there, DIM: tl.constexpr, BLOCK_D: tl.constexpr, MASKED: tl.constexpr):
    """Load rows at offsets ``at`` as columns ``[D, N]``; without MASKED all of them exist."""
    if MASKED:
        return tl.load(
            p + at[None, :] + o_d[:, None], mask=there[None, :] & (o_d < DIM)[:, None], other=0.0
        )
    elif DIM == BLOCK_D:
        return tl.load(p + at[None, :] + o_d[:, None])
    else:
        return tl.load(p + at[None, :] + o_d[:, None], mask=(o_d < DIM)[:, None], other=0.0)


@triton.jit
def _values(p, at, o_d, there, DIM: tl.constexpr, BLOCK_D: tl.constexpr, MASKED: tl.constexpr):
    """Load rows at offsets ``at``, ``[N, D]``; without MASKED all of them exist."""
    if MASKED:
        return tl.load(
            p + at[:, None] + o_d[None, :], mask=there[:, None] & (o_d < DIM)[None, :], other=0.0
        )
    elif DIM == BLOCK_D:
        return tl.load(p + at[:, None] + o_d[None, :])
    else:
        return tl.load(p + at[:, None] + o_d[None, :], mask=(o_d < DIM)[None, :], other=0.0)


@triton.jit
def _levels_kernel(
    q,
    k,
    v,
    bias,
    pooled_k,
    pooled_v,
    pooled_bias,
    spread,
    rest_k,
    rest_v,
    rest_bias,
    rest_spread,
    out,
    lse,
    rest_share,
    levels,
    full_list,
    unit_list,
    counts,
    tokens,
    length,
    reference,
    highest,
    stride_qb,
    stride_qh,
    stride_ql,
    stride_biasb,
    stride_poolb,
    stride_restb,
    stride_restr,
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
    pooled_rows,
    rest_rows,
    units,
    scale,
    DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    WIDTH: tl.constexpr,
    UNIT: tl.constexpr,
    REST: tl.constexpr,
    SPREAD: tl.constexpr,
    SHARE: tl.constexpr,
    RECORD: tl.constexpr,
    IEEE: tl.constexpr,
):
    """One program: BLOCK_M queries of a block, of one head.

    k, v ``[B, S, rows, D]`` and bias float32 ``[Bb, S, rows]`` in block order, WIDTH rows per block
    (0: no level 1). pooled_k, pooled_v, spread ``[B, S, pooled_rows, D]`` and pooled_bias have the
    same form (UNIT 0: no pools). rest_k, rest_v, rest_spread ``[B, S, rest_rows, D]``, and
    rest_bias per key, with SAMPLE per query block and key, ``[B, H, Nq, rest_rows]``. tokens int32
    ``[G, G', Nq, size]`` and length int32 ``[G, G', Nq]`` give the queries of each block. With
    RECORD, highest float32 ``[B, H, Nq, subs, Nk, WIDTH / BLOCK_N]`` is the largest difference
    logit - reference of each tile, with reference float32 ``[B, H, Lq]``.
    """
    PRECISION: tl.constexpr = "ieee" if IEEE else "tf32"
    subs = (size + BLOCK_M - 1) // BLOCK_M
    i_q = tl.program_id(0) // subs
    i_sub = tl.program_id(0) % subs
    i_h = tl.program_id(1)
    i_b = tl.program_id(2)
    i_s = i_h // (heads // slots)
    many = tl.load(length + i_b.to(tl.int64) * stride_nb + i_h.to(tl.int64) * stride_nh + i_q)
    if i_sub * BLOCK_M >= many:
        return
    o_m = i_sub * BLOCK_M + tl.arange(0, BLOCK_M)
    o_n = tl.arange(0, BLOCK_N)
    o_d = tl.arange(0, BLOCK_D)
    m_m = o_m < many
    m_d = o_d < DIM
    p_tokens = tokens + i_b.to(tl.int64) * stride_tb + i_h.to(tl.int64) * stride_th
    p_tokens += i_q.to(tl.int64) * size
    token = tl.load(p_tokens + tl.where(m_m, o_m, i_sub * BLOCK_M)).to(tl.int64)
    p_q = q + i_b.to(tl.int64) * stride_qb + i_h.to(tl.int64) * stride_qh
    # [M, D]
    b_q = _values(p_q, token * stride_ql, o_d, m_m, DIM, BLOCK_D, False)
    factor = scale * 1.4426950408889634  # log2(e)
    row = (i_b.to(tl.int64) * heads + i_h) * num_q + i_q
    i_bs = i_b.to(tl.int64) * slots + i_s
    b_m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    b_l = tl.zeros([BLOCK_M], tl.float32)
    b_o = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    if RECORD:
        p_lse = reference + (i_b.to(tl.int64) * heads + i_h) * length_q + token
        b_ref = tl.load(p_lse) * 1.4426950408889634

    if WIDTH > 0:
        p_k = k + i_bs * rows * DIM
        p_v = v + i_bs * rows * DIM
        p_bias = bias + i_b.to(tl.int64) * stride_biasb + i_s.to(tl.int64) * rows
        parts: tl.constexpr = WIDTH // BLOCK_N
        for j in range(0, tl.load(counts + row * 2) * parts):
            block = tl.load(full_list + row * num_k + j // parts)
            first = block * WIDTH + (j % parts) * BLOCK_N
            at = (first + o_n).to(tl.int64) * DIM
            b_k = _keys(p_k, at, o_d, o_n, DIM, BLOCK_D, False)
            b_v = _values(p_v, at, o_d, o_n, DIM, BLOCK_D, False)
            b_bias = tl.load(p_bias + first + o_n)[None, :]
            b_m, b_l, b_o, alpha, b_t, b_s = _step(
                b_q, b_k, b_v, b_bias, b_m, b_l, b_o, factor, PRECISION
            )
            if RECORD:
                apart = tl.where(m_m[:, None], b_s - b_ref[:, None], float("-inf"))
                p_high = highest + ((row * subs + i_sub) * num_k + block) * parts + j % parts
                tl.store(p_high, tl.max(tl.max(apart, 1), 0) * 0.6931471805599453)

    if SPREAD:
        b_half = b_q.to(tl.float32) * scale
        b_half = (b_half * b_half * (0.5 * 1.4426950408889634)).to(b_q.dtype)
    if UNIT > 0:
        p_k = pooled_k + i_bs * pooled_rows * DIM
        p_v = pooled_v + i_bs * pooled_rows * DIM
        p_s = spread + i_bs * pooled_rows * DIM
        p_bias = pooled_bias + i_b.to(tl.int64) * stride_poolb + i_s.to(tl.int64) * pooled_rows
        own = tl.load(counts + row * 2 + 1)
        for j in range(0, own, BLOCK_N // UNIT):
            entry = j + o_n // UNIT
            there = entry < own
            unit = tl.load(unit_list + row * units + entry, mask=there, other=0)
            lane = (unit * UNIT + o_n % UNIT).to(tl.int64)
            at = lane * DIM
            b_k = _keys(p_k, at, o_d, there, DIM, BLOCK_D, False)
            b_v = _values(p_v, at, o_d, there, DIM, BLOCK_D, False)
            b_bias = tl.where(there, tl.load(p_bias + lane), float("-inf"))[None, :]
            if SPREAD:
                b_x = _keys(p_s, at, o_d, there, DIM, BLOCK_D, False)
                b_bias = b_bias + tl.dot(_wide(b_half), _wide(b_x), input_precision=PRECISION)
            b_m, b_l, b_o, alpha, b_t, b_s = _step(
                b_q, b_k, b_v, b_bias, b_m, b_l, b_o, factor, PRECISION
            )

    b_r = tl.zeros([BLOCK_M], tl.float32)
    if REST != NO_REST:
        p_k = rest_k + i_bs * rest_rows * DIM
        p_v = rest_v + i_bs * rest_rows * DIM
        p_s = rest_spread + i_bs * rest_rows * DIM
        p_bias = rest_bias + i_b.to(tl.int64) * stride_restb
        if REST == SAMPLE:
            p_bias += i_h.to(tl.int64) * num_q * stride_restr + i_q.to(tl.int64) * stride_restr
        else:
            p_bias += i_s.to(tl.int64) * stride_restr
        for j in range(0, rest_rows, BLOCK_N):
            lane = j + o_n
            there = lane < rest_rows
            if REST == MEANS:
                seen = tl.load(levels + row * num_k + lane, mask=there, other=0)
                there = there & (seen == REST_LEVEL)
            at = lane.to(tl.int64) * DIM
            b_k = _keys(p_k, at, o_d, there, DIM, BLOCK_D, True)
            b_v = _values(p_v, at, o_d, there, DIM, BLOCK_D, True)
            b_bias = tl.load(p_bias + lane, mask=there, other=float("-inf"))[None, :]
            if SPREAD and REST == MEANS:
                b_x = _keys(p_s, at, o_d, there, DIM, BLOCK_D, True)
                b_bias = b_bias + tl.dot(_wide(b_half), _wide(b_x), input_precision=PRECISION)
            b_m, b_l, b_o, alpha, b_t, b_s = _step(
                b_q, b_k, b_v, b_bias, b_m, b_l, b_o, factor, PRECISION
            )
            b_r = b_r * alpha + b_t

    empty = b_l == 0.0
    total = tl.where(empty, 1.0, b_l)
    b_o = b_o / total[:, None]
    b_lse = tl.where(empty, float("-inf"), (b_m + tl.log2(total)) * 0.6931471805599453)
    # loaded again, so that the loops need not keep them in registers
    many = tl.load(
        length + i_b.to(tl.int64) * stride_nb + i_h.to(tl.int64) * stride_nh + i_q, volatile=True
    )
    m_m = o_m < many
    token = tl.load(p_tokens + tl.where(m_m, o_m, i_sub * BLOCK_M), volatile=True).to(tl.int64)
    at = (i_b.to(tl.int64) * heads + i_h) * length_q + token
    m_md = m_m[:, None] & m_d[None, :]
    tl.store(out + at[:, None] * DIM + o_d[None, :], b_o.to(out.dtype.element_ty), mask=m_md)
    tl.store(lse + at, b_lse, mask=m_m)
    if SHARE:
        tl.store(rest_share + at, b_r / total, mask=m_m)


class Keys(NamedTuple):
    """A set of keys.

    Attributes:
        k: ``[B, S, rows, D]``.
        v: ``[B, S, rows, D]``.
        bias: added to the logits in log2 domain, float32 ``[1 or B, S, rows]``; of a sample ``[B,
            H, Nq, rows]``.
        spread: variances of the keys, ``[B, S, rows, D]``, or None.
    """

    k: torch.Tensor
    v: torch.Tensor
    bias: torch.Tensor
    spread: torch.Tensor | None = None


def fitted(
    tile: tuple[int, int], stages: int, dim: int, spread: bool
) -> tuple[tuple[int, int], int]:
    """Return the tile and stages of the launch table, reduced for head sizes above 128 and with
    ``spread``, which holds the queries twice and loads a third tile of keys."""
    halvings = (dim > 128) + spread
    stages = min(stages, 3 - halvings)
    return (max(16, tile[0] >> halvings), tile[1]), stages


def levels_forward(
    q: torch.Tensor,
    levels: torch.Tensor,
    tokens: torch.Tensor,
    length: torch.Tensor,
    scale: float,
    *,
    full: Keys | None,
    pools: tuple[tuple[int, int, int], ...],
    pooled: Keys | None,
    unit: int,
    rest: Keys | None,
    share: bool,
    reference: torch.Tensor | None,
    tile: tuple[int, int],
    warps: int,
    stages: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """Compute attention by levels.

    Args:
        q: ``[B, H, Lq, D]``, stride 1 along D.
        levels: uint8 ``[B, H, Nq, Nk]``.
        tokens: int32 ``[G, G', Nq, size]``, the queries of each block; each query is in one block.
        length: int32 ``[G, G', Nq]``, the number of queries of each block.
        scale: factor of the logits.
        full: keys of level 1 in block order; each block has the same multiple of ``tile[1]`` rows.
            None: level 1 is one of the pools.
        pools: for each other level ``(level, units of a block, first unit)``.
        pooled: keys of the pools.
        unit: keys or means of a unit.
        rest: one mean of each block, for level 255; or a sample.
        share: return the share of the rest in each query's attention mass.
        reference: LSE ``[B, H, Lq]`` that is subtracted from the recorded largest logits; None:
            they are not recorded.
        tile: queries and keys of a tile.
        warps: warps of a program.
        stages: stages of the loop pipeline.

    Returns:
        Output ``[B, H, Lq, D]`` in the dtype of q; LSE float32 ``[B, H, Lq]``; the share of the
        rest in each query's mass, float32 ``[B, H, Lq]``, or None; the largest logit of each pair
        of blocks, float32 ``[B, H, Nq, Nk]``, or None.
    """
    batch, heads, length_q, dim = q.shape
    num_q, num_k = levels.shape[2:]
    size = tokens.shape[3]
    device = q.device
    spread = any(keys is not None and keys.spread is not None for keys in (pooled, rest))
    tile, stages = fitted(tile, stages, dim, spread)
    block_m, block_n = tile
    all_rows = batch * heads * num_q
    subs = triton.cdiv(size, block_m)
    units = num_k * max((count for _, count, _ in pools), default=0)
    full_list = torch.empty(all_rows, num_k if full else 0, dtype=torch.int32, device=device)
    unit_list = torch.empty(all_rows, units, dtype=torch.int32, device=device)
    counts = torch.empty(all_rows, 2, dtype=torch.int32, device=device)
    block_k = max(16, triton.next_power_of_2(num_k))
    rows = max(1, min(8, 2048 // block_k))
    values, each, bases = ([pool[i] for pool in pools] + [0] * (4 - len(pools)) for i in range(3))
    _lists_kernel[(triton.cdiv(all_rows, rows),)](
        levels,
        full_list,
        unit_list,
        counts,
        all_rows,
        num_k,
        units,
        *values,
        *each,
        *bases,
        ROWS=rows,
        BLOCK_K=block_k,
        FULL=full is not None,
        POOLS=len(pools),
        num_warps=8,
    )
    out = torch.empty(q.shape, dtype=q.dtype, device=device)
    lse = torch.empty(q.shape[:3], dtype=torch.float32, device=device)
    rest_share = torch.empty_like(lse) if share else None
    width = full.k.shape[2] // num_k if full else 0
    highest = None
    if reference is not None:
        shape = (batch, heads, num_q, subs, num_k, width // block_n)
        highest = torch.full(shape, -torch.inf, dtype=torch.float32, device=device)
    slots = next(keys.k.shape[1] for keys in (full, pooled, rest) if keys)
    no_keys = Keys(q, q, lse)
    full_keys, pooled_keys, rest_keys = full or no_keys, pooled or no_keys, rest or no_keys
    sampled = rest is not None and rest.bias.ndim == 4
    _levels_kernel[(num_q * subs, heads, batch)](
        q=q,
        k=full_keys.k,
        v=full_keys.v,
        bias=full_keys.bias,
        pooled_k=pooled_keys.k,
        pooled_v=pooled_keys.v,
        pooled_bias=pooled_keys.bias,
        spread=q if pooled_keys.spread is None else pooled_keys.spread,
        rest_k=rest_keys.k,
        rest_v=rest_keys.v,
        rest_bias=rest_keys.bias,
        rest_spread=q if rest_keys.spread is None else rest_keys.spread,
        out=out,
        lse=lse,
        rest_share=lse if rest_share is None else rest_share,
        levels=levels,
        full_list=full_list,
        unit_list=unit_list,
        counts=counts,
        tokens=tokens,
        length=length,
        reference=lse if reference is None else reference,
        highest=lse if highest is None else highest,
        stride_qb=q.stride(0),
        stride_qh=q.stride(1),
        stride_ql=q.stride(2),
        stride_biasb=apart(full_keys.bias)[0],
        stride_poolb=apart(pooled_keys.bias)[0],
        stride_restb=apart(rest_keys.bias)[0],
        stride_restr=rest_keys.bias.stride(-2),
        stride_tb=apart(tokens)[0],
        stride_th=apart(tokens)[1],
        stride_nb=apart(length)[0],
        stride_nh=apart(length)[1],
        heads=heads,
        slots=slots,
        length_q=length_q,
        num_q=num_q,
        num_k=num_k,
        size=size,
        rows=full_keys.k.shape[2],
        pooled_rows=pooled_keys.k.shape[2],
        rest_rows=rest_keys.k.shape[2],
        units=units,
        scale=scale,
        DIM=dim,
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        BLOCK_D=max(16, triton.next_power_of_2(dim)),
        WIDTH=width,
        UNIT=unit if pools else 0,
        REST=NO_REST if rest is None else SAMPLE if sampled else MEANS,
        SPREAD=spread,
        SHARE=share,
        RECORD=reference is not None,
        IEEE=q.dtype == torch.float32,
        num_warps=warps,
        num_stages=stages,
    )
    if highest is not None:
        highest = highest.amax((3, 5))
    return out, lse, rest_share, highest
