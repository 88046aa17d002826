"""Attention forward over block lists for Hopper, with separate warps for copies and for products.

It computes the sum of ``forward.py``, for 16-bit types and head sizes up to 128. It is written in
Gluon, which lets the kernel place its waits. One warp copies keys and values by tensor descriptors
(TMA) into two buffers. Two groups of four warps compute 64 queries each and never wait for each
other. A step processes any two key blocks of 64 keys. Within a group, the product of queries and
keys of a step overlaps with the product of probabilities and values of the previous step::

    wait K_i      S_i = q K_i^T  (begins)       wait V_{i-1}    O += P_{i-1} V_{i-1}  (begins)
    S_i is ready: m, P_i = 2^(c S_i - m), l     O is ready: O *= 2^(m' - m)

In steps without masks the compiler moves the exponentials after the second wait. They then overlap
with the products of the other group.

Blocks that are partial, or shorter than 64, are masked by bits: two words of 32 keys for each query
of a block; each distinct tile is stored once. Testing a bit takes two instructions per element,
fewer than coordinates need. A copy always reads 64 rows, also for a shorter block. Values after the
end of a block, of a text or of a list are set to 0 in the buffer, because a weight of 0 does not
remove a NaN.
"""

from __future__ import annotations

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from visattn.kernels.descriptors import key_descriptor
from visattn.kernels.forward import merge

ROWS = 64  # queries of a group of warps
BLOCK_Q, BLOCK_K = 128, 64
WIDTH = 64  # columns of a copy: 128 bytes
STAGES = 2
_BLOCK_Q: gl.constexpr = gl.constexpr(BLOCK_Q)
_ROWS: gl.constexpr = gl.constexpr(ROWS)
_WIDTH: gl.constexpr = gl.constexpr(WIDTH)
_BLOCK_K: gl.constexpr = gl.constexpr(BLOCK_K)
_STEP: gl.constexpr = gl.constexpr(2 * BLOCK_K)
_ROW: gl.constexpr = gl.constexpr(16)


@gluon.jit
def _copy(box, tiles, full, slot, place_a, place_b, column, HALVES: gl.constexpr):
    """Copy two blocks of keys or values into a buffer."""
    mbarrier.expect(full, _STEP * _WIDTH * 2 * HALVES)
    for h in gl.static_range(HALVES):
        at = (slot * HALVES + h) * 2
        tma.async_copy_global_to_shared(box, [place_a, column + h * _WIDTH], full, tiles.index(at))
        tma.async_copy_global_to_shared(
            box, [place_b, column + h * _WIDTH], full, tiles.index(at + 1)
        )


@gluon.jit
def _bring(
    k_box,
    v_box,
    buffers,
    firsts,
    begin,
    end,
    k_place,
    v_place,
    HALVES: gl.constexpr,
    STAGES: gl.constexpr,
):
    """The copying warp: in each step, copy two blocks of keys and two blocks of values."""
    k_tiles, v_tiles, k_full, k_empty, v_full, v_empty = buffers
    k_row, k_column = k_place
    v_row, v_column = v_place
    last = gl.maximum(end - 1, 0)
    steps = gl.maximum((end - begin + 1) // 2, 1)
    a = gl.load(firsts + gl.minimum(begin, last))
    b = gl.load(firsts + gl.minimum(begin + 1, last))
    for i in range(0, steps):
        slot = i % STAGES
        parity = (i // STAGES) & 1
        next_a = gl.load(firsts + gl.minimum(begin + 2 * i + 2, last))
        next_b = gl.load(firsts + gl.minimum(begin + 2 * i + 3, last))
        mbarrier.wait(k_empty.index(slot), parity ^ 1)
        _copy(k_box, k_tiles, k_full.index(slot), slot, k_row + a, k_row + b, k_column, HALVES)
        mbarrier.wait(v_empty.index(slot), parity ^ 1)
        _copy(v_box, v_tiles, v_full.index(slot), slot, v_row + a, v_row + b, v_column, HALVES)
        a = next_a
        b = next_b


@gluon.jit
def _length(lists, j, end, LENGTHS: gl.constexpr):
    """Return the number of valid keys of the block at position j of the list: those before the end
    of the block and of its text; 0 if ``j >= end``."""
    _, _, columns, p_k_table, p_text = lists
    place = gl.minimum(j, gl.maximum(end - 1, 0))
    p_block = p_k_table + gl.load(columns + place).to(gl.int32) * 4
    length = gl.load(p_block + 1)
    if LENGTHS:
        segment = gl.load(p_block + 2)
        valid = gl.load(p_text + gl.maximum(segment, 0)) - gl.load(p_block + 3)
        length = gl.where(segment >= 0, gl.minimum(gl.maximum(valid, 0), length), length)
    return gl.where(j < end, length, 0)


@gluon.jit
def _words(lists, j, end, length, o_m, LENGTHS: gl.constexpr):
    """Return the two mask words of each query for the block at position j of the list: the words of
    its bit tile, or all ones without a tile. Bits of keys after the end of a text, and all bits if
    ``j >= end``, are 0."""
    tile_of, bits, _, _, _ = lists
    place = gl.minimum(j, gl.maximum(end - 1, 0))
    number = gl.load(tile_of + place)
    inside = j < end
    masked = inside & (number >= 0)
    p_bits = bits + gl.maximum(number, 0).to(gl.int64) * (_BLOCK_Q * 2) + o_m * 2
    low = gl.where(masked, gl.load(p_bits), gl.where(inside, -1, 0))
    high = gl.where(masked, gl.load(p_bits + 1), gl.where(inside, -1, 0))
    if LENGTHS:
        low = low & ((1 << gl.minimum(length, 31)) - 1 | gl.where(length > 31, -1, 0))
        rest = gl.maximum(length - 32, 0)
        high = high & ((1 << gl.minimum(rest, 31)) - 1 | gl.where(rest > 31, -1, 0))
    return low, high


@gluon.jit
def _blank(v_tiles, v_full, i, length_a, length_b, HALVES: gl.constexpr, STAGES: gl.constexpr):
    """Set the values after the ends of the blocks of step i to 0. Each group of warps does this
    before its products."""
    ROWS_OF: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    if gl.minimum(length_a, length_b) < _BLOCK_K:
        slot = i % STAGES
        mbarrier.wait(v_full.index(slot), (i // STAGES) & 1)
        o_n = gl.arange(0, _STEP, layout=gl.SliceLayout(1, ROWS_OF))
        there = gl.where(o_n < _BLOCK_K, o_n < length_a, o_n - _BLOCK_K < length_b)
        for h in gl.static_range(HALVES):
            tile = v_tiles.index(slot * HALVES + h)
            values = tile.load(ROWS_OF)
            tile.store(gl.where(there[:, None], values, gl.zeros_like(values)))
        fence_async_shared()


@gluon.jit
def _masked(s, low_a, high_a, low_b, high_b, layout: gl.constexpr):
    """Return logits with -inf where the bit of a key is 0. The shift uses the bits of the column
    index that differ between threads; the constant uses those that differ between the registers of
    a thread. The inline assembly avoids the compiler's comparison, which would first pack all
    results into one register and then unpack them."""
    o_n = gl.arange(0, _STEP, layout=gl.SliceLayout(0, layout))[None, :]
    word = gl.where(
        (o_n & 64) != 0,
        gl.where((o_n & 32) != 0, high_b[:, None], low_b[:, None]),
        gl.where((o_n & 32) != 0, high_a[:, None], low_a[:, None]),
    )
    one = gl.full([_ROWS, _STEP], 1, gl.int32, layout=layout)
    return gl.inline_asm_elementwise(
        """{
        .reg .pred kept;
        .reg .b32 bit;
        and.b32 bit, $2, $3;
        setp.ne.b32 kept, bit, 0;
        selp.f32 $0, $1, 0fFF800000, kept;
        }""",
        "=f,f,r,r",
        [s, word >> (o_n & 6), one << (o_n & 25)],
        dtype=gl.float32,
        is_pure=True,
        pack=1,
    )


@gluon.jit
def _logits(q_tiles, k_tiles, slot, s, GROUP: gl.constexpr, HALVES: gl.constexpr):
    """Start the product q k^T of a step."""
    s = warpgroup_mma(
        q_tiles.index(GROUP * HALVES),
        k_tiles.index(slot * HALVES).permute((1, 0)),
        s,
        use_acc=False,
        is_async=True,
    )
    if HALVES == 2:
        s = warpgroup_mma(
            q_tiles.index(GROUP * HALVES + 1),
            k_tiles.index(slot * HALVES + 1).permute((1, 0)),
            s,
            is_async=True,
        )
    return s


@gluon.jit
def _softmax(s, m, l, factor, MASKED: gl.constexpr):
    """Return the exponentials of a step relative to the new largest logit, and the factor that
    rescales the previous sums."""
    m_new = gl.maximum(m, gl.max(s, 1) * factor)
    if MASKED:
        m_safe = gl.where(m_new == float("-inf"), 0.0, m_new)
    else:
        m_safe = m_new
    p = gl.exp2(s * factor - m_safe[:, None])
    alpha = gl.exp2(m - m_safe)
    l = l * alpha + gl.sum(p, 1)
    return p, m_new, l, alpha


@gluon.jit
def _step(
    i,
    sums,
    q_tiles,
    buffers,
    lists,
    begin,
    end,
    o_m,
    factor,
    MASKED: gl.constexpr,
    LENGTHS: gl.constexpr,
    GROUP: gl.constexpr,
    HALVES: gl.constexpr,
    STAGES: gl.constexpr,
    S_LAYOUT: gl.constexpr,
    O_LAYOUT: gl.constexpr,
    P_LAYOUT: gl.constexpr,
    DTYPE: gl.constexpr,
):
    """Step i: its logits, overlapped with the value product of the previous step."""
    s, e, o_0, o_1, m, l, length_a, length_b = sums
    k_tiles, v_tiles, k_full, k_empty, v_full, v_empty = buffers
    slot = i % STAGES
    before = (i - 1) % STAGES
    p = gl.convert_layout(e.to(DTYPE), P_LAYOUT)
    if MASKED:
        _blank(v_tiles, v_full, i - 1, length_a, length_b, HALVES, STAGES)
        j = begin + 2 * i
        length_a = _length(lists, j, end, LENGTHS)
        length_b = _length(lists, j + 1, end, LENGTHS)
        low_a, high_a = _words(lists, j, end, length_a, o_m, LENGTHS)
        low_b, high_b = _words(lists, j + 1, end, length_b, o_m, LENGTHS)
    mbarrier.wait(k_full.index(slot), (i // STAGES) & 1)
    s = _logits(q_tiles, k_tiles, slot, s, GROUP, HALVES)
    mbarrier.wait(v_full.index(before), ((i - 1) // STAGES) & 1)
    o_0 = warpgroup_mma(p, v_tiles.index(before * HALVES), o_0, is_async=True)
    if HALVES == 2:
        o_1 = warpgroup_mma(p, v_tiles.index(before * HALVES + 1), o_1, is_async=True)
    s = warpgroup_mma_wait(HALVES, deps=[s])
    mbarrier.arrive(k_empty.index(slot), count=1)
    x = s
    if MASKED:
        x = _masked(s, low_a, high_a, low_b, high_b, S_LAYOUT)
    e, m, l, alpha = _softmax(x, m, l, factor, MASKED)
    if HALVES == 2:
        o_0, o_1, p = warpgroup_mma_wait(0, deps=[o_0, o_1, p])
    else:
        o_0, p = warpgroup_mma_wait(0, deps=[o_0, p])
    mbarrier.arrive(v_empty.index(before), count=1)
    alpha = gl.convert_layout(alpha, gl.SliceLayout(1, O_LAYOUT))[:, None]
    o_0 = o_0 * alpha
    if HALVES == 2:
        o_1 = o_1 * alpha
    return s, e, o_0, o_1, m, l, length_a, length_b


@gluon.jit
def _tokens(first_q, num_q, q_order, q_index, length_q, o_m, Q_ORDERED: gl.constexpr):
    """Return the query tokens of a work item, and which lanes have one; others repeat the first."""
    m_m = o_m < num_q
    token = gl.where(m_m, first_q + o_m, first_q)
    if Q_ORDERED:
        token = gl.load(q_index + q_order * length_q + token)
    return token, m_m


@gluon.jit
def _attend(
    tensors,
    strides,
    sizes,
    lists,
    p_work,
    q_tiles,
    buffers,
    factor,
    GROUP: gl.constexpr,
    DIM: gl.constexpr,
    HALVES: gl.constexpr,
    STAGES: gl.constexpr,
    Q_ORDERED: gl.constexpr,
    LENGTHS: gl.constexpr,
    SPLIT: gl.constexpr,
):
    """A group of four warps: 64 queries of a work item."""
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 128, 16]
    )
    O_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 64, 16]
    )
    P_LAYOUT: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=O_LAYOUT, k_width=2)
    LOAD: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    q, out, lse, part_out, part_lse, q_index = tensors
    stride_qb, stride_qh, stride_ql, stride_ob, stride_oh, stride_ol = strides
    heads, length_q, num_k, parts, texts = sizes
    tile_of, bits, columns, k_table, text_lengths = lists
    k_tiles, v_tiles, k_full, k_empty, v_full, _ = buffers
    DTYPE: gl.constexpr = q.dtype.element_ty
    i_b = gl.program_id(1)
    i_h = gl.load(p_work)
    first_q = gl.load(p_work + 4)
    num_q = gl.load(p_work + 5)
    begin = gl.load(p_work + 7)
    if LENGTHS:
        end_plain = gl.load(p_work + 8)
    else:
        end_plain = gl.load(p_work + 9)
    end = gl.load(p_work + 11)
    p_k_table = k_table + gl.load(p_work + 2) * num_k * 4
    lists = (tile_of, bits, columns, p_k_table, text_lengths + i_b * texts)
    q_order = gl.load(p_work + 12)

    o_q = GROUP * _ROWS + gl.arange(0, _ROWS, layout=gl.SliceLayout(1, LOAD))
    o_d = gl.arange(0, _WIDTH, layout=gl.SliceLayout(0, LOAD))
    token, _ = _tokens(first_q, num_q, q_order, q_index, length_q, o_q, Q_ORDERED)
    p_q = q + i_b.to(gl.int64) * stride_qb + i_h.to(gl.int64) * stride_qh
    p_q = p_q + token.to(gl.int64)[:, None] * stride_ql + o_d[None, :]
    for h in gl.static_range(HALVES):
        if DIM == HALVES * _WIDTH:
            b_q = gl.load(p_q + h * _WIDTH)
        else:
            b_q = gl.load(p_q + h * _WIDTH, mask=(h * _WIDTH + o_d < DIM)[None, :], other=0.0)
        q_tiles.index(GROUP * HALVES + h).store(b_q)
    fence_async_shared()

    o_m = GROUP * _ROWS + gl.arange(0, _ROWS, layout=gl.SliceLayout(1, S_LAYOUT))
    steps = gl.maximum((end - begin + 1) // 2, 1)
    plain = (end_plain - begin) // 2
    o_0 = gl.zeros([_ROWS, _WIDTH], gl.float32, layout=O_LAYOUT)
    o_1 = gl.zeros([_ROWS, _WIDTH], gl.float32, layout=O_LAYOUT)
    m = gl.full([_ROWS], float("-inf"), gl.float32, layout=gl.SliceLayout(1, S_LAYOUT))
    l = gl.zeros([_ROWS], gl.float32, layout=gl.SliceLayout(1, S_LAYOUT))
    s = gl.zeros([_ROWS, _STEP], gl.float32, layout=S_LAYOUT)

    length_a = _length(lists, begin, end, LENGTHS)
    length_b = _length(lists, begin + 1, end, LENGTHS)
    low_a, high_a = _words(lists, begin, end, length_a, o_m, LENGTHS)
    low_b, high_b = _words(lists, begin + 1, end, length_b, o_m, LENGTHS)
    mbarrier.wait(k_full.index(0), 0)
    s = _logits(q_tiles, k_tiles, 0, s, GROUP, HALVES)
    s = warpgroup_mma_wait(0, deps=[s])
    mbarrier.arrive(k_empty.index(0), count=1)
    x = _masked(s, low_a, high_a, low_b, high_b, S_LAYOUT)
    e, m, l, _ = _softmax(x, m, l, factor, True)
    for i in range(1, plain):
        s, e, o_0, o_1, m, l, length_a, length_b = _step(
            i,
            (s, e, o_0, o_1, m, l, length_a, length_b),
            q_tiles,
            buffers,
            lists,
            begin,
            end,
            o_m,
            factor,
            False,
            LENGTHS,
            GROUP,
            HALVES,
            STAGES,
            S_LAYOUT,
            O_LAYOUT,
            P_LAYOUT,
            DTYPE,
        )
    for i in range(gl.maximum(plain, 1), steps):
        s, e, o_0, o_1, m, l, length_a, length_b = _step(
            i,
            (s, e, o_0, o_1, m, l, length_a, length_b),
            q_tiles,
            buffers,
            lists,
            begin,
            end,
            o_m,
            factor,
            True,
            LENGTHS,
            GROUP,
            HALVES,
            STAGES,
            S_LAYOUT,
            O_LAYOUT,
            P_LAYOUT,
            DTYPE,
        )
    _blank(v_tiles, v_full, steps - 1, length_a, length_b, HALVES, STAGES)
    last = (steps - 1) % STAGES
    p = gl.convert_layout(e.to(DTYPE), P_LAYOUT)
    mbarrier.wait(v_full.index(last), ((steps - 1) // STAGES) & 1)
    o_0 = warpgroup_mma(p, v_tiles.index(last * HALVES), o_0, is_async=True)
    if HALVES == 2:
        o_1 = warpgroup_mma(p, v_tiles.index(last * HALVES + 1), o_1, is_async=True)
        o_0, o_1, p = warpgroup_mma_wait(0, deps=[o_0, o_1, p])
    else:
        o_0, p = warpgroup_mma_wait(0, deps=[o_0, p])

    empty = l == 0.0
    weight = gl.where(empty, 0.0, 1.0 / gl.where(empty, 1.0, l))
    log_sum = (m + gl.log2(gl.where(empty, 1.0, l))) * 0.6931471805599453
    log_sum = gl.where(empty, float("-inf"), log_sum)
    weight = gl.convert_layout(weight, gl.SliceLayout(1, O_LAYOUT))[:, None]
    o_0 = o_0 * weight
    o_1 = o_1 * weight
    o_m = GROUP * _ROWS + gl.arange(0, _ROWS, layout=gl.SliceLayout(1, O_LAYOUT))
    o_d = gl.arange(0, _WIDTH, layout=gl.SliceLayout(0, O_LAYOUT))[None, :]
    token, m_m = _tokens(first_q, num_q, q_order, q_index, length_q, o_m, Q_ORDERED)
    log_sum = gl.convert_layout(log_sum, gl.SliceLayout(1, O_LAYOUT))
    if SPLIT:
        i_part = gl.load(p_work + 6)
        if i_part >= 0:
            i_row = (i_b.to(gl.int64) * parts + i_part) * _BLOCK_Q + o_m
            p_part = part_out + i_row[:, None] * DIM + o_d
            gl.store(p_part, o_0, mask=o_d < DIM)
            if HALVES == 2:
                gl.store(p_part + _WIDTH, o_1, mask=_WIDTH + o_d < DIM)
            gl.store(part_lse + i_row, log_sum)
        m_m = m_m & (i_part < 0)
    p_out = out + i_b.to(gl.int64) * stride_ob + i_h.to(gl.int64) * stride_oh
    p_out = p_out + token.to(gl.int64)[:, None] * stride_ol + o_d
    gl.store(p_out, o_0.to(out.dtype.element_ty), mask=m_m[:, None] & (o_d < DIM))
    if HALVES == 2:
        gl.store(
            p_out + _WIDTH, o_1.to(out.dtype.element_ty), mask=m_m[:, None] & (_WIDTH + o_d < DIM)
        )
    gl.store(lse + (i_b.to(gl.int64) * heads + i_h) * length_q + token, log_sum, mask=m_m)


@gluon.jit
def _hopper_kernel(
    q,
    k_box,
    v_box,
    out,
    lse,
    part_out,
    part_lse,
    work,
    firsts,
    tile_of,
    bits,
    columns,
    k_table,
    text_lengths,
    q_index,
    stride_qb,
    stride_qh,
    stride_ql,
    stride_ob,
    stride_oh,
    stride_ol,
    k_row_b,
    k_row_s,
    k_column_s,
    v_row_b,
    v_row_s,
    v_column_s,
    heads,
    length_q,
    num_k,
    parts,
    texts,
    factor,
    DIM: gl.constexpr,
    HALVES: gl.constexpr,
    STAGES: gl.constexpr,
    Q_ORDERED: gl.constexpr,
    LENGTHS: gl.constexpr,
    SPLIT: gl.constexpr,
    TILE: gl.constexpr,
):
    """One program: one work item of one batch item; ``work`` as in ``forward.py``.

    firsts, tile_of int32: for each position in the lists, the first key of the block and its tile
    of ``bits`` int32 ``[U, 128, 2]`` (-1: none). ``text_lengths`` is read only with LENGTHS.
    """
    DTYPE: gl.constexpr = q.dtype.element_ty
    q_tiles = gl.allocate_shared_memory(DTYPE, [2 * HALVES, _ROWS, _WIDTH], TILE)
    k_parts = gl.allocate_shared_memory(DTYPE, [STAGES * HALVES * 2, _BLOCK_K, _WIDTH], TILE)
    v_parts = gl.allocate_shared_memory(DTYPE, [STAGES * HALVES * 2, _BLOCK_K, _WIDTH], TILE)
    k_tiles = k_parts._reinterpret(DTYPE, [STAGES * HALVES, _STEP, _WIDTH], TILE)
    v_tiles = v_parts._reinterpret(DTYPE, [STAGES * HALVES, _STEP, _WIDTH], TILE)
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(k_full.index(i), count=1)
        mbarrier.init(v_full.index(i), count=1)
        mbarrier.init(k_empty.index(i), count=2)
        mbarrier.init(v_empty.index(i), count=2)
    fence_async_shared()
    p_work = work + gl.program_id(0) * _ROW
    i_b = gl.program_id(1)
    i_slot = gl.load(p_work + 1)
    begin = gl.load(p_work + 7)
    end = gl.load(p_work + 11)
    tensors = (q, out, lse, part_out, part_lse, q_index)
    strides = (stride_qb, stride_qh, stride_ql, stride_ob, stride_oh, stride_ol)
    sizes = (heads, length_q, num_k, parts, texts)
    lists = (tile_of, bits, columns, k_table, text_lengths)
    tiles = (k_tiles, v_tiles, k_full, k_empty, v_full, v_empty)
    parts_of = (k_parts, v_parts, k_full, k_empty, v_full, v_empty)
    k_place = (i_b * k_row_b + i_slot * k_row_s, i_slot * k_column_s)
    v_place = (i_b * v_row_b + i_slot * v_row_s, i_slot * v_column_s)
    gl.warp_specialize(
        [
            (
                _attend,
                (
                    tensors,
                    strides,
                    sizes,
                    lists,
                    p_work,
                    q_tiles,
                    tiles,
                    factor,
                    gl.constexpr(0),
                    DIM,
                    HALVES,
                    STAGES,
                    Q_ORDERED,
                    LENGTHS,
                    SPLIT,
                ),
            ),
            (
                _attend,
                (
                    tensors,
                    strides,
                    sizes,
                    lists,
                    p_work,
                    q_tiles,
                    tiles,
                    factor,
                    gl.constexpr(1),
                    DIM,
                    HALVES,
                    STAGES,
                    Q_ORDERED,
                    LENGTHS,
                    SPLIT,
                ),
            ),
            (
                _bring,
                (k_box, v_box, parts_of, firsts, begin, end, k_place, v_place, HALVES, STAGES),
            ),
        ],
        [4, 1],
        [240, 24],
    )


def forward_hopper(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    lists: dict[str, torch.Tensor],
    text_lengths: torch.Tensor | None,
    scale: float,
    *,
    q_ordered: bool,
    num_parts: int,
    stages: int = STAGES,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute ``forward.forward`` for float16 and bfloat16, blocks of 128 queries and 64 keys.

    Args:
        q: ``[B, H, Lq, D]``; the head size is a multiple of 8, at most 128.
        k: ``[B, Hk, Lk, D]``.
        v: ``[B, Hk, Lk, D]``.
        lists: the tensors ``work, rows, firsts, tile_of, bits, columns, k_table, q_index``, on the
            device of q.
        text_lengths: valid tokens of each text, int32 ``[B, text segments]``, or None.
        scale: factor of the logits, above 0.
        q_ordered: whether q is read through ``q_index``.
        num_parts: number of parts of rows that are split; 0 if no row is split.
        stages: number of buffers for keys and for values.

    Returns:
        Output ``[B, H, Lq, D]`` in the dtype of q, and LSE ``[B, H, Lq]`` in float32.
    """
    batch, heads, length_q, dim = q.shape
    out = torch.empty((batch, heads, length_q, dim), dtype=q.dtype, device=q.device)
    lse = torch.empty((batch, heads, length_q), dtype=torch.float32, device=q.device)
    part_out = q.new_empty((batch, num_parts, BLOCK_Q, dim), dtype=torch.float32)
    part_lse = q.new_empty((batch, num_parts, BLOCK_Q), dtype=torch.float32)
    k_box, k_steps = key_descriptor(k, BLOCK_K, WIDTH)
    v_box, v_steps = key_descriptor(v, BLOCK_K, WIDTH)
    _hopper_kernel[(lists["work"].shape[0], batch)](
        q,
        k_box,
        v_box,
        out,
        lse,
        part_out,
        part_lse,
        lists["work"],
        lists["firsts"],
        lists["tile_of"],
        lists["bits"],
        lists["columns"],
        lists["k_table"],
        lists["work"] if text_lengths is None else text_lengths,
        lists["q_index"],
        *q.stride()[:3],
        *out.stride()[:3],
        *k_steps,
        *v_steps,
        heads,
        length_q,
        lists["k_table"].shape[1],
        num_parts,
        0 if text_lengths is None else text_lengths.shape[1],
        scale * 1.4426950408889634,  # log2(e)
        DIM=dim,
        HALVES=-(-dim // WIDTH),
        STAGES=stages,
        Q_ORDERED=q_ordered,
        LENGTHS=text_lengths is not None,
        SPLIT=num_parts > 0,
        TILE=gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2),
        num_warps=4,
    )
    if num_parts:
        merge(out, lse, part_out, part_lse, lists, q_ordered=q_ordered)
    return out, lse
