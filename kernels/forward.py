"""Attention forward over block lists: one launch for all heads, longest rows first.

For a row of queries and its list of key blocks, in log2 domain with ``c = scale * log2(e)``::

    s = c q k^T (masked: -inf)    m' = max(m, max_n s)    p = 2^(s - m')    a = 2^(m - m')
    l = a l + sum_n p             o = a o + p v           out = o / l      lse = (m + log2 l) ln 2

The first loop computes full blocks without masks. The second loop computes short and partial
blocks. A part of a split row writes its normalised output and LSE to scratch; ``merge`` merges the
parts.

Layouts: q, out ``[B, H, Lq, D]`` in token order, stride 1 along D, any other strides; k, v ``[B, S,
Lk, D]`` in block order, where ``S`` counts the distinct (key head, order); lse float32 ``[B, H,
Lq]``. float16, bfloat16, float32 (ieee products). D up to 256. A row without a key has output 0 and
LSE -inf.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from visattn.kernels.masks import BITS, NONE, bit_tile, keeps, query_side

INTERPRETED: tl.constexpr = tl.constexpr(triton.knobs.runtime.interpret)
NEAR = 1 << 24  # limit of the token stride of keys and values that the kernel can address
ROW: tl.constexpr = tl.constexpr(16)  # integers of a work item
PARAM_ROW: tl.constexpr = tl.constexpr(48)
SLOT_A: tl.constexpr = tl.constexpr(12)
SLOT_B: tl.constexpr = tl.constexpr(28)


@triton.jit
def _wide(x):
    """Return an operand of a product. Triton's interpreter would multiply the bit patterns of
    bfloat16 as integers, so it gets float32."""
    if INTERPRETED and x.dtype == tl.bfloat16:
        return x.to(tl.float32)
    return x


@triton.jit
def _key_length(p_k_table, p_text, column, i_b, texts, LENGTHS: tl.constexpr):
    """Return the first position and the number of valid keys of a block; ``k_table`` int32 ``[Nk,
    4]``: first position, length, text segment (-1: none), offset in it."""
    first = tl.load(p_k_table + column * 4)
    length = tl.load(p_k_table + column * 4 + 1)
    if LENGTHS:
        segment = tl.load(p_k_table + column * 4 + 2)
        valid = tl.load(p_text + i_b * texts + segment, mask=segment >= 0, other=2147483647)
        valid = valid - tl.load(p_k_table + column * 4 + 3)
        length = tl.minimum(length, tl.maximum(valid, 0))
    return first, length


@triton.jit
def _tokens(p_work, q_index, length_q, BLOCK_M: tl.constexpr, Q_ORDERED: tl.constexpr):
    """Return the query tokens of a work item, and which lanes have one; others repeat the first.

    The loads are volatile: tokens that are needed after a loop are loaded again and not kept in
    registers during the loop. Without this the kernel spills.
    """
    o_m = tl.arange(0, BLOCK_M)
    first_q = tl.load(p_work + 4, volatile=True)
    m_m = o_m < tl.load(p_work + 5, volatile=True)
    token = tl.where(m_m, first_q + o_m, first_q)
    if Q_ORDERED:
        q_order = tl.load(p_work + 12, volatile=True)
        token = tl.load(q_index + q_order * length_q + token)
    return token, m_m


@triton.jit
def _forward_kernel(
    q,
    k,
    v,
    k_box,
    v_box,
    out,
    lse,
    part_out,
    part_lse,
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
    stride_ob,
    stride_oh,
    stride_ol,
    heads,
    length_q,
    length_k,
    num_k,
    grids,
    parts,
    texts,
    scale,
    DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    KIND_A: tl.constexpr,
    KIND_B: tl.constexpr,
    Q_ORDERED: tl.constexpr,
    K_ORDERED: tl.constexpr,
    LENGTHS: tl.constexpr,
    SPLIT: tl.constexpr,
    IEEE: tl.constexpr,
    BOXES: tl.constexpr,
):
    """One program: one work item of one batch item.

    work int32 ``[W, 16]``: head, key slot, map, grid (-1: none), first query position, number of
    queries, part (-1: the whole row), the bounds of the list (begin, full, text, short, partial),
    and the rows of ``q_index`` and ``k_index``, int32 ``[orders, L]``: ordered position -> token.
    With BOXES, ``k_box`` and ``v_box`` are tensor descriptors of k and v, with boxes ``[1, 1,
    BLOCK_N, BLOCK_D]``.
    """
    PRECISION: tl.constexpr = "ieee" if IEEE else "tf32"
    i_b = tl.program_id(1)
    p_work = work + tl.program_id(0) * ROW
    i_h = tl.load(p_work)
    i_slot = tl.load(p_work + 1)
    i_map = tl.load(p_work + 2)
    i_grid = tl.load(p_work + 3)
    begin = tl.load(p_work + 7)
    end_full = tl.load(p_work + 8)
    end_text = tl.load(p_work + 9)
    end_short = tl.load(p_work + 10)
    end_partial = tl.load(p_work + 11)
    k_order = tl.load(p_work + 13)

    o_m = tl.arange(0, BLOCK_M)
    o_n = tl.arange(0, BLOCK_N)
    o_d = tl.arange(0, BLOCK_D)
    m_d = o_d < DIM
    token, _ = _tokens(p_work, q_index, length_q, BLOCK_M, Q_ORDERED)
    p_q = q + i_b.to(tl.int64) * stride_qb + i_h.to(tl.int64) * stride_qh
    p_q += token.to(tl.int64)[:, None] * stride_ql + o_d[None, :]
    p_k = k + i_b.to(tl.int64) * stride_kb + i_slot.to(tl.int64) * stride_ks
    p_v = v + i_b.to(tl.int64) * stride_vb + i_slot.to(tl.int64) * stride_vs
    # within a block 32 bits are enough: a token's stride is below NEAR
    o_k = o_n[None, :] * stride_kl + o_d[:, None]
    o_v = o_n[:, None] * stride_vl + o_d[None, :]
    p_k_table = k_table + i_map * num_k * 4

    # [M, D]
    if DIM == BLOCK_D:
        b_q = tl.load(p_q)
    else:
        b_q = tl.load(p_q, mask=m_d[None, :], other=0.0)
    factor = scale * 1.4426950408889634  # log2(e)
    b_m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    b_l = tl.zeros([BLOCK_M], tl.float32)
    b_o = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)

    if LENGTHS:
        end_plain = end_full
    else:
        end_plain = end_text
    for j in range(begin, end_plain):
        column = tl.load(columns + j).to(tl.int32)
        first = tl.load(p_k_table + column * 4)
        # [D, N], [N, D]
        if BOXES:
            b_k = tl.trans(k_box.load([i_b, i_slot, first, 0]).reshape([BLOCK_N, BLOCK_D]))
            b_v = v_box.load([i_b, i_slot, first, 0]).reshape([BLOCK_N, BLOCK_D])
        else:
            p_kn = p_k + first.to(tl.int64) * stride_kl
            p_vn = p_v + first.to(tl.int64) * stride_vl
            if DIM == BLOCK_D:
                b_k = tl.load(p_kn + o_k)
                b_v = tl.load(p_vn + o_v)
            else:
                b_k = tl.load(p_kn + o_k, mask=m_d[:, None], other=0.0)
                b_v = tl.load(p_vn + o_v, mask=m_d[None, :], other=0.0)
        b_s = tl.dot(_wide(b_q), _wide(b_k), input_precision=PRECISION) * factor
        m_new = tl.maximum(b_m, tl.max(b_s, 1))
        b_p = tl.exp2(b_s - m_new[:, None])
        alpha = tl.exp2(b_m - m_new)
        b_l = b_l * alpha + tl.sum(b_p, 1)
        b_o = b_o * alpha[:, None]
        b_o = tl.dot(_wide(b_p.to(b_v.dtype)), _wide(b_v), b_o, input_precision=PRECISION)
        b_m = m_new

    if KIND_A != NONE and KIND_A != BITS:
        p_params = rules + (i_map * grids + tl.maximum(i_grid, 0)) * PARAM_ROW
        # tokens outside the grid are clamped; the result of their rule is not used
        token, _ = _tokens(p_work, q_index, length_q, BLOCK_M, Q_ORDERED)
        last = tl.load(p_params + 8) - 1
        q_place = tl.minimum(tl.maximum(token - tl.load(p_params + 6), 0), last)
        k_origin = tl.load(p_params + 7)
        a0, a1, a2, a3, a4 = query_side(p_params, p_params + SLOT_A, tables, q_place, KIND_A)
        b0, b1, b2, b3, b4 = query_side(p_params, p_params + SLOT_B, tables, q_place, KIND_B)
    for j in range(end_plain, end_partial):
        column = tl.load(columns + j).to(tl.int32)
        first, valid = _key_length(p_k_table, text_lengths, column, i_b, texts, LENGTHS)
        m_n = o_n < valid
        p_kn = p_k + first.to(tl.int64) * stride_kl
        p_vn = p_v + first.to(tl.int64) * stride_vl
        # lanes after the last key repeat the first key and are masked below
        inside = tl.where(m_n, o_n, 0)
        o_kn = inside[None, :] * stride_kl + o_d[:, None]
        o_vn = inside[:, None] * stride_vl + o_d[None, :]
        if DIM == BLOCK_D:
            b_k = tl.load(p_kn + o_kn)
            b_v = tl.load(p_vn + o_vn)
        else:
            b_k = tl.load(p_kn + o_kn, mask=m_d[:, None], other=0.0)
            b_v = tl.load(p_vn + o_vn, mask=m_d[None, :], other=0.0)
        b_s = tl.dot(_wide(b_q), _wide(b_k), input_precision=PRECISION) * factor
        kept = m_n[None, :] & (o_m >= 0)[:, None]
        if KIND_A == BITS:
            number = tl.load(tile_of + j, mask=j >= end_short, other=0)
            kept = kept & (bit_tile(bits, number, BLOCK_M, BLOCK_N) | (j < end_short))
        elif KIND_A != NONE:
            k_place = first + tl.where(m_n, o_n, 0)
            if K_ORDERED:
                k_place = tl.load(k_index + k_order * length_k + k_place)
            k_place = tl.minimum(tl.maximum(k_place - k_origin, 0), last)
            p_slot = p_params + SLOT_A
            rule = keeps(p_params, p_slot, tables, a0, a1, a2, a3, a4, k_place, KIND_A)
            if KIND_B != NONE:
                p_slot = p_params + SLOT_B
                rule |= keeps(p_params, p_slot, tables, b0, b1, b2, b3, b4, k_place, KIND_B)
            kept = kept & (rule | (j < end_short))
        b_s = tl.where(kept, b_s, float("-inf"))
        m_new = tl.maximum(b_m, tl.max(b_s, 1))
        m_safe = tl.where(m_new == float("-inf"), 0.0, m_new)
        b_p = tl.exp2(b_s - m_safe[:, None])
        alpha = tl.exp2(b_m - m_safe)
        b_l = b_l * alpha + tl.sum(b_p, 1)
        b_o = b_o * alpha[:, None]
        b_o = tl.dot(_wide(b_p.to(b_v.dtype)), _wide(b_v), b_o, input_precision=PRECISION)
        b_m = m_new

    i_h = tl.load(p_work, volatile=True)
    i_part = tl.load(p_work + 6, volatile=True)
    token, m_m = _tokens(p_work, q_index, length_q, BLOCK_M, Q_ORDERED)
    empty = b_l == 0.0
    b_o = b_o / tl.where(empty, 1.0, b_l)[:, None]
    b_lse = tl.where(
        empty, float("-inf"), (b_m + tl.log2(tl.where(empty, 1.0, b_l))) * 0.6931471805599453
    )
    if SPLIT:  # noqa: SIM102
        if i_part >= 0:
            i_row = (i_b.to(tl.int64) * parts + i_part) * BLOCK_M + o_m
            tl.store(part_out + i_row[:, None] * DIM + o_d[None, :], b_o, mask=m_d[None, :])
            tl.store(part_lse + i_row, b_lse)
            m_m = m_m & (i_part < 0)
    p_out = out + i_b.to(tl.int64) * stride_ob + i_h.to(tl.int64) * stride_oh
    p_out += token.to(tl.int64)[:, None] * stride_ol + o_d[None, :]
    tl.store(p_out, b_o.to(out.dtype.element_ty), mask=m_m[:, None] & m_d[None, :])
    tl.store(lse + (i_b.to(tl.int64) * heads + i_h) * length_q + token, b_lse, mask=m_m)


@triton.jit
def _merge_kernel(
    part_out,
    part_lse,
    out,
    lse,
    rows,
    q_index,
    stride_ob,
    stride_oh,
    stride_ol,
    heads,
    length_q,
    parts,
    DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    Q_ORDERED: tl.constexpr,
):
    """Merge the parts of a split row: ``lse = log sum_i exp(lse_i)``, ``out = sum_i exp(lse_i -
    lse) out_i``.

    rows int32 ``[R, 6]``: head, row of q_index, first query position, queries, first part, parts.
    """
    i_b = tl.program_id(1)
    p_row = rows + tl.program_id(0) * 6
    i_h = tl.load(p_row)
    q_order = tl.load(p_row + 1)
    first_q = tl.load(p_row + 2)
    num_q = tl.load(p_row + 3)
    first_part = tl.load(p_row + 4)
    num_parts = tl.load(p_row + 5)
    o_m = tl.arange(0, BLOCK_M)
    o_d = tl.arange(0, BLOCK_D)
    m_m = o_m < num_q
    m_d = o_d < DIM
    b_m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    b_l = tl.zeros([BLOCK_M], tl.float32)
    b_o = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for i_part in range(first_part, first_part + num_parts):
        i_row = (i_b.to(tl.int64) * parts + i_part) * BLOCK_M + o_m
        b_x = tl.load(part_lse + i_row)
        m_new = tl.maximum(b_m, b_x)
        m_safe = tl.where(m_new == float("-inf"), 0.0, m_new)
        alpha = tl.exp(b_m - m_safe)
        weight = tl.exp(b_x - m_safe)
        b_part = tl.load(
            part_out + i_row[:, None] * DIM + o_d[None, :], mask=m_d[None, :], other=0.0
        )
        b_o = b_o * alpha[:, None] + b_part * weight[:, None]
        b_l = b_l * alpha + weight
        b_m = m_new
    empty = b_l == 0.0
    b_o = b_o / tl.where(empty, 1.0, b_l)[:, None]
    b_lse = tl.where(empty, float("-inf"), b_m + tl.log(tl.where(empty, 1.0, b_l)))
    token = tl.where(m_m, first_q + o_m, first_q)
    if Q_ORDERED:
        token = tl.load(q_index + q_order * length_q + token)
    p_out = out + i_b.to(tl.int64) * stride_ob + i_h.to(tl.int64) * stride_oh
    p_out += token.to(tl.int64)[:, None] * stride_ol + o_d[None, :]
    tl.store(p_out, b_o.to(out.dtype.element_ty), mask=m_m[:, None] & m_d[None, :])
    tl.store(lse + (i_b.to(tl.int64) * heads + i_h) * length_q + token, b_lse, mask=m_m)


def describable(x: torch.Tensor) -> bool:
    """Return whether a tensor descriptor can describe it: rows start at multiples of 16 bytes."""
    steps = [stride * x.element_size() for stride in x.stride()[:3]]
    return x.data_ptr() % 16 == 0 and all(step > 0 and step % 16 == 0 for step in steps)


def forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    lists: dict[str, torch.Tensor],
    text_lengths: torch.Tensor | None,
    scale: float,
    *,
    block: tuple[int, int],
    kinds: tuple[int, int],
    ordered: tuple[bool, bool],
    num_parts: int,
    warps: int,
    stages: int,
    descriptors: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute attention over block lists.

    Args:
        q: ``[B, H, Lq, D]`` in token order.
        k: ``[B, S, Lk, D]`` in block order.
        v: ``[B, S, Lk, D]`` in block order.
        lists: the tensors ``work, rows, columns, k_table, q_index, k_index, rules, tables,
            tile_of, bits`` as the kernels describe them, on the device of q.
        text_lengths: int32 ``[B, text segments]`` or None.
        scale: factor of the logits.
        block: queries and keys of a block.
        kinds: predicate kinds of slots A and B.
        ordered: whether ``q_index``, and whether ``k_index``, differs from the identity.
        num_parts: number of parts of split rows.
        warps: warps of a program.
        stages: stages of the loop pipeline.
        descriptors: read keys and values of full blocks by tensor descriptors (TMA), if their
            strides allow it.

    Returns:
        Output ``[B, H, Lq, D]`` in the dtype of q, contiguous, and LSE float32 ``[B, H, Lq]``.
    """
    batch, heads, length_q, dim = q.shape
    out = torch.empty((batch, heads, length_q, dim), dtype=q.dtype, device=q.device)
    lse = torch.empty((batch, heads, length_q), dtype=torch.float32, device=q.device)
    part_out = q.new_empty((batch, num_parts, block[0], dim), dtype=torch.float32)
    part_lse = q.new_empty((batch, num_parts, block[0]), dtype=torch.float32)
    k, v = (x if x.stride(2) < NEAR else x.contiguous() for x in (k, v))
    block_d = max(16, triton.next_power_of_2(dim))
    boxes = descriptors and all(map(describable, (k, v)))
    k_box, v_box = (
        TensorDescriptor(x, list(x.shape), list(x.stride()), [1, 1, block[1], block_d])
        if boxes
        else x
        for x in (k, v)
    )
    _forward_kernel[(lists["work"].shape[0], batch)](
        q=q,
        k=k,
        v=v,
        k_box=k_box,
        v_box=v_box,
        out=out,
        lse=lse,
        part_out=part_out,
        part_lse=part_lse,
        work=lists["work"],
        columns=lists["columns"],
        k_table=lists["k_table"],
        q_index=lists["q_index"],
        k_index=lists["k_index"],
        rules=lists["rules"],
        tables=lists["tables"],
        tile_of=lists["tile_of"],
        bits=lists["bits"],
        text_lengths=lists["work"] if text_lengths is None else text_lengths,
        stride_qb=q.stride(0),
        stride_qh=q.stride(1),
        stride_ql=q.stride(2),
        stride_kb=k.stride(0),
        stride_ks=k.stride(1),
        stride_kl=k.stride(2),
        stride_vb=v.stride(0),
        stride_vs=v.stride(1),
        stride_vl=v.stride(2),
        stride_ob=out.stride(0),
        stride_oh=out.stride(1),
        stride_ol=out.stride(2),
        heads=heads,
        length_q=length_q,
        length_k=k.shape[2],
        num_k=lists["k_table"].shape[1],
        grids=lists["rules"].shape[1],
        parts=num_parts,
        texts=0 if text_lengths is None else text_lengths.shape[1],
        scale=scale,
        DIM=dim,
        BLOCK_M=block[0],
        BLOCK_N=block[1],
        BLOCK_D=block_d,
        KIND_A=kinds[0],
        KIND_B=kinds[1],
        Q_ORDERED=ordered[0],
        K_ORDERED=ordered[1],
        LENGTHS=text_lengths is not None,
        SPLIT=num_parts > 0,
        IEEE=q.dtype == torch.float32,
        BOXES=boxes,
        num_warps=warps,
        num_stages=stages,
    )
    if num_parts:
        merge(out, lse, part_out, part_lse, lists, q_ordered=ordered[0])
    return out, lse


def merge(
    out: torch.Tensor,
    lse: torch.Tensor,
    part_out: torch.Tensor,
    part_lse: torch.Tensor,
    lists: dict[str, torch.Tensor],
    *,
    q_ordered: bool,
) -> None:
    """Write the rows of ``out`` and ``lse`` that were computed in parts."""
    batch, heads, length_q, dim = out.shape
    _merge_kernel[(lists["rows"].shape[0], batch)](
        part_out=part_out,
        part_lse=part_lse,
        out=out,
        lse=lse,
        rows=lists["rows"],
        q_index=lists["q_index"],
        stride_ob=out.stride(0),
        stride_oh=out.stride(1),
        stride_ol=out.stride(2),
        heads=heads,
        length_q=length_q,
        parts=part_out.shape[1],
        DIM=dim,
        BLOCK_M=part_out.shape[2],
        BLOCK_D=max(16, triton.next_power_of_2(dim)),
        Q_ORDERED=q_ordered,
        num_warps=4,
    )
