"""Attention backward over block lists: dq over the lists of the forward pass, dk and dv over the
transposed lists. With the logits ``s = scale q k^T`` and the LSE of the forward pass::

    p = exp(s - lse)    delta = sum_d grad_out out - grad_lse    ds = p (grad_out v^T - delta)
    dq = scale ds k     dk = scale ds^T q                        dv = p^T grad_out

(Dao 2023, FlashAttention-2, arXiv 2307.08691, algorithm 2). Every element of a gradient is written
by one program, so results are deterministic.

Layouts as in ``forward.py``: q, grad_out ``[B, H, Lq, D]`` in token order, stride 1 along D; k, v
``[B, S, Lk, D]`` in block order; lse, delta float32 ``[B, H, Lq]``. dq ``[B, H, Lq, D]`` and dk, dv
``[B, H, Lk, D]`` in token order, of every query head.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from visattn.kernels.forward import (
    NEAR,
    PARAM_ROW,
    ROW,
    SLOT_A,
    SLOT_B,
    _key_length,
    _wide,
)
from visattn.kernels.masks import BITS, NONE, bit_tile, keeps, query_side

LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)


@triton.jit
def _delta_kernel(
    out,
    grad_out,
    grad_lse,
    delta,
    stride_ob,
    stride_oh,
    stride_ol,
    stride_gb,
    stride_gh,
    stride_gl,
    heads,
    length_q,
    DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ROWS: tl.constexpr,
    LSE: tl.constexpr,
):
    """One program: ROWS queries of one head."""
    i_h = tl.program_id(1)
    i_b = tl.program_id(2)
    o_m = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    o_d = tl.arange(0, BLOCK_D)
    m_m = o_m < length_q
    m_md = m_m[:, None] & (o_d < DIM)[None, :]
    row = o_m.to(tl.int64)
    p_out = out + i_b.to(tl.int64) * stride_ob + i_h.to(tl.int64) * stride_oh
    p_grad = grad_out + i_b.to(tl.int64) * stride_gb + i_h.to(tl.int64) * stride_gh
    b_o = tl.load(p_out + row[:, None] * stride_ol + o_d[None, :], mask=m_md, other=0.0)
    b_g = tl.load(p_grad + row[:, None] * stride_gl + o_d[None, :], mask=m_md, other=0.0)
    b_delta = tl.sum(b_o.to(tl.float32) * b_g.to(tl.float32), 1)
    at = (i_b.to(tl.int64) * heads + i_h) * length_q + row
    if LSE:
        b_delta -= tl.load(grad_lse + at, mask=m_m, other=0.0)
    tl.store(delta + at, b_delta, mask=m_m)


@triton.jit
def _rows_of(lse, delta, at, token):
    """Return the LSE in log2 domain, and delta, of queries; a row without a key gets LSE +inf, so
    that p = 0."""
    b_lse = tl.load(lse + at + token)
    b_lse = tl.where(b_lse == float("-inf"), float("inf"), b_lse * LOG2E)
    return b_lse, tl.load(delta + at + token)


@triton.jit
def _queries_of(
    p_block, q_index, q_order, length_q, sub, BLOCK_M: tl.constexpr, Q_ORDERED: tl.constexpr
):
    """Return the tokens of a part of a query block, and which lanes have one; others repeat the
    first. ``p_block`` int32 ``[2]``: first position and length of the block."""
    o_m = tl.arange(0, BLOCK_M)
    first = tl.load(p_block)
    m_m = sub * BLOCK_M + o_m < tl.load(p_block + 1)
    token = tl.where(m_m, first + sub * BLOCK_M + o_m, first)
    if Q_ORDERED:
        token = tl.load(q_index + q_order * length_q + token)
    return token, m_m


@triton.jit
def _dq_kernel(
    q,
    k,
    v,
    grad_out,
    lse,
    delta,
    dq,
    work,
    columns,
    k_table,
    q_index,
    k_index,
    rules,
    tables,
    tile_of,
    bits,
    text_lengths,
    stride_qb,
    stride_qh,
    stride_ql,
    stride_kb,
    stride_ks,
    stride_kl,
    stride_vb,
    stride_vs,
    stride_vl,
    stride_gb,
    stride_gh,
    stride_gl,
    heads,
    length_q,
    length_k,
    num_k,
    grids,
    texts,
    scale,
    DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    SUBS: tl.constexpr,
    KIND_A: tl.constexpr,
    KIND_B: tl.constexpr,
    Q_ORDERED: tl.constexpr,
    K_ORDERED: tl.constexpr,
    LENGTHS: tl.constexpr,
    IEEE: tl.constexpr,
):
    """One program: BLOCK_M queries of one work item of one batch item; ``work`` as in
    ``_forward_kernel``, with no split rows."""
    PRECISION: tl.constexpr = "ieee" if IEEE else "tf32"
    i_b = tl.program_id(1)
    sub = tl.program_id(0) % SUBS
    p_work = work + tl.program_id(0) // SUBS * ROW
    if sub * BLOCK_M >= tl.load(p_work + 5):
        return
    i_h = tl.load(p_work)
    i_slot = tl.load(p_work + 1)
    i_map = tl.load(p_work + 2)
    i_grid = tl.load(p_work + 3)
    begin = tl.load(p_work + 7)
    end_full = tl.load(p_work + 8)
    end_text = tl.load(p_work + 9)
    end_short = tl.load(p_work + 10)
    end_partial = tl.load(p_work + 11)
    q_order = tl.load(p_work + 12)
    k_order = tl.load(p_work + 13)

    o_m = tl.arange(0, BLOCK_M)
    o_n = tl.arange(0, BLOCK_N)
    o_d = tl.arange(0, BLOCK_D)
    m_d = o_d < DIM
    token, m_m = _queries_of(p_work + 4, q_index, q_order, length_q, sub, BLOCK_M, Q_ORDERED)
    at = (i_b.to(tl.int64) * heads + i_h) * length_q
    b_lse, b_delta = _rows_of(lse, delta, at, token)
    p_q = q + i_b.to(tl.int64) * stride_qb + i_h.to(tl.int64) * stride_qh
    p_g = grad_out + i_b.to(tl.int64) * stride_gb + i_h.to(tl.int64) * stride_gh
    b_q = tl.load(
        p_q + token.to(tl.int64)[:, None] * stride_ql + o_d[None, :], mask=m_d[None, :], other=0.0
    )
    b_g = tl.load(
        p_g + token.to(tl.int64)[:, None] * stride_gl + o_d[None, :], mask=m_d[None, :], other=0.0
    )
    p_k = k + i_b.to(tl.int64) * stride_kb + i_slot.to(tl.int64) * stride_ks
    p_v = v + i_b.to(tl.int64) * stride_vb + i_slot.to(tl.int64) * stride_vs
    p_k_table = k_table + i_map * num_k * 4
    factor = scale * LOG2E
    b_dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)

    if LENGTHS:
        end_plain = end_full
    else:
        end_plain = end_text
    for j in range(begin, end_plain):
        column = tl.load(columns + j).to(tl.int32)
        first = tl.load(p_k_table + column * 4)
        # [N, D]
        b_k = tl.load(
            p_k + first.to(tl.int64) * stride_kl + o_n[:, None] * stride_kl + o_d[None, :],
            mask=m_d[None, :],
            other=0.0,
        )
        b_v = tl.load(
            p_v + first.to(tl.int64) * stride_vl + o_n[:, None] * stride_vl + o_d[None, :],
            mask=m_d[None, :],
            other=0.0,
        )
        b_s = tl.dot(_wide(b_q), tl.trans(_wide(b_k)), input_precision=PRECISION) * factor
        b_p = tl.exp2(b_s - b_lse[:, None])
        b_dp = tl.dot(_wide(b_g), tl.trans(_wide(b_v)), input_precision=PRECISION)
        b_ds = (b_p * (b_dp - b_delta[:, None])).to(b_k.dtype)
        b_dq = tl.dot(_wide(b_ds), _wide(b_k), b_dq, input_precision=PRECISION)

    if KIND_A != NONE and KIND_A != BITS:
        p_params = rules + (i_map * grids + tl.maximum(i_grid, 0)) * PARAM_ROW
        # tokens outside the grid are clamped; the result of their rule is not used
        last = tl.load(p_params + 8) - 1
        q_place = tl.minimum(tl.maximum(token - tl.load(p_params + 6), 0), last)
        k_origin = tl.load(p_params + 7)
        a0, a1, a2, a3, a4 = query_side(p_params, p_params + SLOT_A, tables, q_place, KIND_A)
        b0, b1, b2, b3, b4 = query_side(p_params, p_params + SLOT_B, tables, q_place, KIND_B)
    for j in range(end_plain, end_partial):
        column = tl.load(columns + j).to(tl.int32)
        first, valid = _key_length(p_k_table, text_lengths, column, i_b, texts, LENGTHS)
        m_n = o_n < valid
        # lanes after the last key repeat the first key and are masked below
        inside = tl.where(m_n, o_n, 0)
        b_k = tl.load(
            p_k + first.to(tl.int64) * stride_kl + inside[:, None] * stride_kl + o_d[None, :],
            mask=m_d[None, :],
            other=0.0,
        )
        b_v = tl.load(
            p_v + first.to(tl.int64) * stride_vl + inside[:, None] * stride_vl + o_d[None, :],
            mask=m_d[None, :],
            other=0.0,
        )
        b_s = tl.dot(_wide(b_q), tl.trans(_wide(b_k)), input_precision=PRECISION) * factor
        kept = m_n[None, :] & (o_m >= 0)[:, None]
        if KIND_A == BITS:
            number = tl.load(tile_of + j, mask=j >= end_short, other=0) * SUBS + sub
            kept = kept & (bit_tile(bits, number, BLOCK_M, BLOCK_N) | (j < end_short))
        elif KIND_A != NONE:
            k_place = first + inside
            if K_ORDERED:
                k_place = tl.load(k_index + k_order * length_k + k_place)
            k_place = tl.minimum(tl.maximum(k_place - k_origin, 0), last)
            p_slot = p_params + SLOT_A
            rule = keeps(p_params, p_slot, tables, a0, a1, a2, a3, a4, k_place, KIND_A)
            if KIND_B != NONE:
                p_slot = p_params + SLOT_B
                rule |= keeps(p_params, p_slot, tables, b0, b1, b2, b3, b4, k_place, KIND_B)
            kept = kept & (rule | (j < end_short))
        b_p = tl.where(kept, tl.exp2(b_s - b_lse[:, None]), 0.0)
        b_dp = tl.dot(_wide(b_g), tl.trans(_wide(b_v)), input_precision=PRECISION)
        b_ds = (b_p * (b_dp - b_delta[:, None])).to(b_k.dtype)
        b_dq = tl.dot(_wide(b_ds), _wide(b_k), b_dq, input_precision=PRECISION)

    i_h = tl.load(p_work, volatile=True)
    token, m_m = _queries_of(p_work + 4, q_index, q_order, length_q, sub, BLOCK_M, Q_ORDERED)
    row = (i_b.to(tl.int64) * heads + i_h) * length_q + token
    tl.store(
        dq + row[:, None] * DIM + o_d[None, :],
        (b_dq * scale).to(dq.dtype.element_ty),
        mask=m_m[:, None] & m_d[None, :],
    )


@triton.jit
def _dkdv_kernel(
    q,
    k,
    v,
    grad_out,
    lse,
    delta,
    dk,
    dv,
    key_work,
    rows,
    q_table,
    k_table,
    q_index,
    k_index,
    rules,
    tables,
    tile_of,
    bits,
    text_lengths,
    stride_qb,
    stride_qh,
    stride_ql,
    stride_kb,
    stride_ks,
    stride_kl,
    stride_vb,
    stride_vs,
    stride_vl,
    stride_gb,
    stride_gh,
    stride_gl,
    heads,
    length_q,
    length_k,
    num_q,
    num_k,
    grids,
    texts,
    scale,
    DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    KIND_A: tl.constexpr,
    KIND_B: tl.constexpr,
    Q_ORDERED: tl.constexpr,
    K_ORDERED: tl.constexpr,
    LENGTHS: tl.constexpr,
    IEEE: tl.constexpr,
):
    """One program: one key block of one query head of one batch item, and the query blocks that
    visit it. Query blocks have BLOCK_Q queries; those without a mask are processed BLOCK_M queries
    at a time, the others BLOCK_P.

    key_work int32 ``[W, 16]``: head, key slot, map, grid (-1: none), key block, the bounds of the
    list (begin, whole, short, partial), and the rows of ``q_index`` and ``k_index``. rows int32:
    query blocks; q_table int32 ``[M, Nq, 2]``: first position and length.
    """
    PRECISION: tl.constexpr = "ieee" if IEEE else "tf32"
    i_b = tl.program_id(1)
    p_work = key_work + tl.program_id(0) * ROW
    i_h = tl.load(p_work)
    i_slot = tl.load(p_work + 1)
    i_map = tl.load(p_work + 2)
    i_grid = tl.load(p_work + 3)
    column = tl.load(p_work + 4)
    begin = tl.load(p_work + 5)
    end_whole = tl.load(p_work + 6)
    end_short = tl.load(p_work + 7)
    end_partial = tl.load(p_work + 8)
    q_order = tl.load(p_work + 9)
    k_order = tl.load(p_work + 10)

    o_m = tl.arange(0, BLOCK_M)
    o_n = tl.arange(0, BLOCK_N)
    o_d = tl.arange(0, BLOCK_D)
    m_d = o_d < DIM
    p_k_table = k_table + i_map * num_k * 4
    p_q_table = q_table + i_map * num_q * 2
    first, valid = _key_length(p_k_table, text_lengths, column, i_b, texts, LENGTHS)
    # lanes after the last key repeat the first key; their gradients are not stored
    inside = tl.where(o_n < valid, o_n, 0)
    p_k = k + i_b.to(tl.int64) * stride_kb + i_slot.to(tl.int64) * stride_ks
    p_v = v + i_b.to(tl.int64) * stride_vb + i_slot.to(tl.int64) * stride_vs
    position = (first + inside).to(tl.int64)[:, None]
    # [N, D]
    b_k = tl.load(p_k + position * stride_kl + o_d[None, :], mask=m_d[None, :], other=0.0)
    b_v = tl.load(p_v + position * stride_vl + o_d[None, :], mask=m_d[None, :], other=0.0)
    p_q = q + i_b.to(tl.int64) * stride_qb + i_h.to(tl.int64) * stride_qh
    p_g = grad_out + i_b.to(tl.int64) * stride_gb + i_h.to(tl.int64) * stride_gh
    at = (i_b.to(tl.int64) * heads + i_h) * length_q
    factor = scale * LOG2E
    b_dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    b_dv = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)

    WHOLE: tl.constexpr = BLOCK_Q // BLOCK_M
    for i in range(begin * WHOLE, end_whole * WHOLE):
        p_block = p_q_table + tl.load(rows + i // WHOLE) * 2
        token = tl.load(p_block) + i % WHOLE * BLOCK_M + o_m
        if Q_ORDERED:
            token = tl.load(q_index + q_order * length_q + token)
        # [M, D]
        o_q = (token * stride_ql)[:, None] + o_d[None, :]
        o_g = (token * stride_gl)[:, None] + o_d[None, :]
        b_q = tl.load(p_q + o_q, mask=m_d[None, :], other=0.0)
        b_g = tl.load(p_g + o_g, mask=m_d[None, :], other=0.0)
        b_lse, b_delta = _rows_of(lse, delta, at, token)
        # [N, M]
        b_s = tl.dot(_wide(b_k), tl.trans(_wide(b_q)), input_precision=PRECISION) * factor
        b_p = tl.exp2(b_s - b_lse[None, :])
        b_dv = tl.dot(_wide(b_p.to(b_g.dtype)), _wide(b_g), b_dv, input_precision=PRECISION)
        b_dp = tl.dot(_wide(b_v), tl.trans(_wide(b_g)), input_precision=PRECISION)
        b_ds = (b_p * (b_dp - b_delta[None, :])).to(b_q.dtype)
        b_dk = tl.dot(_wide(b_ds), _wide(b_q), b_dk, input_precision=PRECISION)

    if KIND_A != NONE and KIND_A != BITS:
        p_params = rules + (i_map * grids + tl.maximum(i_grid, 0)) * PARAM_ROW
        last = tl.load(p_params + 8) - 1
        q_origin = tl.load(p_params + 6)
        k_place = first + inside
        if K_ORDERED:
            k_place = tl.load(k_index + k_order * length_k + k_place)
        # tokens outside the grid are clamped; the result of their rule is not used
        k_place = tl.minimum(tl.maximum(k_place - tl.load(p_params + 7), 0), last)
    PARTS: tl.constexpr = BLOCK_Q // BLOCK_P
    for i in range(end_whole * PARTS, end_partial * PARTS):
        j = i // PARTS
        sub = i % PARTS
        p_block = p_q_table + tl.load(rows + j) * 2
        token, m_m = _queries_of(p_block, q_index, q_order, length_q, sub, BLOCK_P, Q_ORDERED)
        place = token.to(tl.int64)[:, None]
        b_q = tl.load(p_q + place * stride_ql + o_d[None, :], mask=m_d[None, :], other=0.0)
        b_g = tl.load(p_g + place * stride_gl + o_d[None, :], mask=m_d[None, :], other=0.0)
        b_lse, b_delta = _rows_of(lse, delta, at, token)
        kept = m_m[:, None] & (o_n >= 0)[None, :]
        if KIND_A == BITS:
            number = tl.load(tile_of + j, mask=j >= end_short, other=0) * PARTS + sub
            kept = kept & (bit_tile(bits, number, BLOCK_P, BLOCK_N) | (j < end_short))
        elif KIND_A != NONE:
            q_place = tl.minimum(tl.maximum(token - q_origin, 0), last)
            p_slot = p_params + SLOT_A
            a0, a1, a2, a3, a4 = query_side(p_params, p_slot, tables, q_place, KIND_A)
            rule = keeps(p_params, p_slot, tables, a0, a1, a2, a3, a4, k_place, KIND_A)
            if KIND_B != NONE:
                p_slot = p_params + SLOT_B
                b0, b1, b2, b3, b4 = query_side(p_params, p_slot, tables, q_place, KIND_B)
                rule |= keeps(p_params, p_slot, tables, b0, b1, b2, b3, b4, k_place, KIND_B)
            kept = kept & (rule | (j < end_short))
        b_s = tl.dot(_wide(b_k), tl.trans(_wide(b_q)), input_precision=PRECISION) * factor
        seen = tl.trans(kept.to(tl.int8)) != 0
        b_p = tl.where(seen, tl.exp2(b_s - b_lse[None, :]), 0.0)
        b_dv = tl.dot(_wide(b_p.to(b_g.dtype)), _wide(b_g), b_dv, input_precision=PRECISION)
        b_dp = tl.dot(_wide(b_v), tl.trans(_wide(b_g)), input_precision=PRECISION)
        b_ds = (b_p * (b_dp - b_delta[None, :])).to(b_q.dtype)
        b_dk = tl.dot(_wide(b_ds), _wide(b_q), b_dk, input_precision=PRECISION)

    m_n = o_n < tl.load(p_k_table + column * 4 + 1)
    token = first + tl.where(m_n, o_n, 0)
    if K_ORDERED:
        token = tl.load(k_index + k_order * length_k + token)
    row = ((i_b.to(tl.int64) * heads + i_h) * length_k + token)[:, None] * DIM + o_d[None, :]
    m_nd = m_n[:, None] & m_d[None, :]
    seen = (o_n < valid)[:, None]
    b_dk = tl.where(seen, b_dk * scale, 0.0)
    tl.store(dk + row, b_dk.to(dk.dtype.element_ty), mask=m_nd)
    tl.store(dv + row, tl.where(seen, b_dv, 0.0).to(dv.dtype.element_ty), mask=m_nd)


def delta_of(
    out: torch.Tensor, grad_out: torch.Tensor, grad_lse: torch.Tensor | None
) -> torch.Tensor:
    """Return ``sum_d grad_out out - grad_lse``, float32 ``[B, H, Lq]``; inputs with stride 1 along
    D."""
    batch, heads, length_q, dim = out.shape
    delta = torch.empty((batch, heads, length_q), dtype=torch.float32, device=out.device)
    rows = 32
    _delta_kernel[(triton.cdiv(length_q, rows), heads, batch)](
        out=out,
        grad_out=grad_out,
        grad_lse=delta if grad_lse is None else grad_lse,
        delta=delta,
        stride_ob=out.stride(0),
        stride_oh=out.stride(1),
        stride_ol=out.stride(2),
        stride_gb=grad_out.stride(0),
        stride_gh=grad_out.stride(1),
        stride_gl=grad_out.stride(2),
        heads=heads,
        length_q=length_q,
        DIM=dim,
        BLOCK_D=max(16, triton.next_power_of_2(dim)),
        ROWS=rows,
        LSE=grad_lse is not None,
        num_warps=4,
    )
    return delta


def backward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    grad_out: torch.Tensor,
    grad_lse: torch.Tensor | None,
    lists: dict[str, torch.Tensor],
    text_lengths: torch.Tensor | None,
    scale: float,
    *,
    block: tuple[int, int],
    queries: tuple[int, int],
    kinds: tuple[int, int],
    ordered: tuple[bool, bool],
    shared_keys: bool,
    warps: int,
    stages: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Compute the gradients of attention over block lists.

    Args:
        q: as in ``forward``.
        k: as in ``forward``.
        v: as in ``forward``.
        out: output of ``forward``.
        lse: LSE of ``forward``.
        grad_out: gradient of ``out``, ``[B, H, Lq, D]``, stride 1 along D.
        grad_lse: gradient of ``lse``, float32 ``[B, H, Lq]``, contiguous, or None.
        lists: those of ``forward``, without split rows, and ``key_work, key_rows, row_tiles,
            q_table``.
        text_lengths: as in ``forward``.
        scale: as in ``forward``.
        block: queries and keys of a block.
        queries: queries processed at a time, and those in the masked loop of ``_dkdv_kernel``; both
            divide the queries of a block.
        kinds: as in ``forward``.
        ordered: as in ``forward``.
        shared_keys: whether several query heads share a key head; dk and dv are then float32,
            because the caller sums them.
        warps: as in ``forward``.
        stages: as in ``forward``.

    Returns:
        dq ``[B, H, Lq, D]``, and dk, dv ``[B, H, Lk, D]`` of each query head; contiguous, in the
        dtype of q, dk and dv in float32 with ``shared_keys``.
    """
    batch, heads, length_q, dim = q.shape
    length_k = k.shape[2]
    delta = delta_of(out, grad_out, grad_lse)
    block_d = max(16, triton.next_power_of_2(dim))
    dq = torch.empty((batch, heads, length_q, dim), dtype=q.dtype, device=q.device)
    key_dtype = torch.float32 if shared_keys else q.dtype
    dk, dv = (
        torch.empty((batch, heads, length_k, dim), dtype=key_dtype, device=q.device)
        for _ in range(2)
    )
    k, v = (x if x.stride(2) < NEAR else x.contiguous() for x in (k, v))
    # the kernels address the query tokens of a head with 32 bits
    q, grad_out = (
        x if x.shape[2] * x.stride(2) < 2**31 else x.contiguous() for x in (q, grad_out)
    )
    parts = block[0] // queries[0]
    shared_arguments = {
        "q": q,
        "k": k,
        "v": v,
        "grad_out": grad_out,
        "lse": lse,
        "delta": delta,
        "k_table": lists["k_table"],
        "q_index": lists["q_index"],
        "k_index": lists["k_index"],
        "rules": lists["rules"],
        "tables": lists["tables"],
        "bits": lists["bits"],
        "text_lengths": lists["work"] if text_lengths is None else text_lengths,
        "stride_qb": q.stride(0),
        "stride_qh": q.stride(1),
        "stride_ql": q.stride(2),
        "stride_kb": k.stride(0),
        "stride_ks": k.stride(1),
        "stride_kl": k.stride(2),
        "stride_vb": v.stride(0),
        "stride_vs": v.stride(1),
        "stride_vl": v.stride(2),
        "stride_gb": grad_out.stride(0),
        "stride_gh": grad_out.stride(1),
        "stride_gl": grad_out.stride(2),
        "heads": heads,
        "length_q": length_q,
        "length_k": length_k,
        "num_k": lists["k_table"].shape[1],
        "grids": lists["rules"].shape[1],
        "texts": 0 if text_lengths is None else text_lengths.shape[1],
        "scale": scale,
        "DIM": dim,
        "BLOCK_M": queries[0],
        "BLOCK_N": block[1],
        "BLOCK_D": block_d,
        "KIND_A": kinds[0],
        "KIND_B": kinds[1],
        "Q_ORDERED": ordered[0],
        "K_ORDERED": ordered[1],
        "LENGTHS": text_lengths is not None,
        "IEEE": q.dtype == torch.float32,
        "num_warps": warps,
        "num_stages": stages,
    }
    _dq_kernel[(lists["work"].shape[0] * parts, batch)](
        dq=dq,
        work=lists["work"],
        columns=lists["columns"],
        tile_of=lists["tile_of"],
        SUBS=parts,
        **shared_arguments,
    )
    _dkdv_kernel[(lists["key_work"].shape[0], batch)](
        dk=dk,
        dv=dv,
        key_work=lists["key_work"],
        rows=lists["key_rows"],
        q_table=lists["q_table"],
        num_q=lists["q_table"].shape[1],
        tile_of=lists["row_tiles"],
        BLOCK_P=queries[1],
        BLOCK_Q=block[0],
        **shared_arguments,
    )
    return dq, dk, dv
