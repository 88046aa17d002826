"""Predicates of partial blocks, evaluated from coordinates in registers.

A predicate of a (map, grid) is a row of integers. ``rules`` is int32 ``[M, G, 48]``::

    0..5    stride and extent of coordinates a, b, c:  x = token // stride % extent
            (c is the longest axis of the grid, a and b the others, each below 2^15)
    6, 7    first token of the grid: queries, keys          8    tokens of the grid
    12..    slot A        28..    slot B, 16 integers each; the launch gives the kind of each slot

``tables`` is one int32 buffer, and offsets point into it::

    AXIS      low a, b, c, high a, b, c (offsets)
              low[x_q] <= x_k <= high[x_q] on each axis
    STRIDED   the same, then modulus a, b, c
              and x_q = x_k modulo that
    BAND      weight a, b, c, low, high
              low <= form(k) - form(q) <= high
    RADIAL    weight a, b, c of r, of t, widths (offset)
              |r_q - r_k| <= widths[|t_q - t_k|]
    LABEL     bits of queries (offset, -1: all), of keys (offset)
              q_bits & k_bits != 0, by raster index
    BITS      none: packed bit tiles

The last integer of a slot is 1 if the map uses the slot. An unused slot keeps no pair.
One subtraction compares two 15-bit fields: a guard bit is set above each field, and it is still set
after the subtraction if and only if the field was at least as large as the number subtracted.
"""

import triton
import triton.language as tl

NONE: tl.constexpr = tl.constexpr(0)
AXIS: tl.constexpr = tl.constexpr(1)
STRIDED: tl.constexpr = tl.constexpr(2)
BAND: tl.constexpr = tl.constexpr(3)
RADIAL: tl.constexpr = tl.constexpr(4)
LABEL: tl.constexpr = tl.constexpr(5)
BITS: tl.constexpr = tl.constexpr(6)

USED: tl.constexpr = tl.constexpr(15)
GUARDS: tl.constexpr = tl.constexpr(-2147450880)  # bits 15 and 31


@triton.jit
def _divided(x, divisor):
    """Return the exact quotient and remainder of int32 ``x >= 0`` by a positive scalar.

    ``x`` times the rounded-down inverse is the quotient or one less. A division by a number that is
    not known at compile time takes about four times as many instructions. It also needs more
    registers, with which the loop over partial blocks would spill.
    """
    inverse = 0xFFFFFFFF // divisor.to(tl.uint32)
    below = tl.umulhi(x.to(tl.uint32), inverse + tl.zeros_like(x).to(tl.uint32)).to(tl.int32)
    rest = x - below * divisor
    over = rest >= divisor
    return below + over.to(tl.int32), tl.where(over, rest - divisor, rest)


@triton.jit
def _coordinate(p_radix, token):
    """``token // stride % extent``."""
    quotient, _ = _divided(token, tl.load(p_radix))
    _, rest = _divided(quotient, tl.load(p_radix + 1))
    return rest


@triton.jit
def coordinates(p_params, token):
    """Return the coordinates a, b, c of raster indices."""
    a = _coordinate(p_params, token)
    b = _coordinate(p_params + 2, token)
    c = _coordinate(p_params + 4, token)
    return a, b, c


@triton.jit
def _weighted(p_weights, a, b, c):
    return a * tl.load(p_weights) + b * tl.load(p_weights + 1) + c * tl.load(p_weights + 2)


@triton.jit
def _residues(p_slot, a, b, c):
    """Return the residues of the three coordinates as one number."""
    m_a = tl.load(p_slot + 6)
    m_b = tl.load(p_slot + 7)
    m_c = tl.load(p_slot + 8)
    _, r_a = _divided(a, m_a)
    _, r_b = _divided(b, m_b)
    _, r_c = _divided(c, m_c)
    return (r_a * m_b + r_b) * m_c + r_c


@triton.jit
def query_side(p_params, p_slot, p_tables, token, KIND: tl.constexpr):
    """Return the query values that a kind needs, five vectors [M]. The compiler removes unused
    ones."""
    a, b, c = coordinates(p_params, token)
    q0 = token
    q1 = token
    q2 = token
    q3 = token
    q4 = token
    if KIND == AXIS or KIND == STRIDED:  # noqa: SIM109
        low_c = tl.load(p_tables + tl.load(p_slot + 2) + c)
        q0 = tl.load(p_tables + tl.load(p_slot) + a)
        q0 += tl.load(p_tables + tl.load(p_slot + 1) + b) << 16
        q1 = tl.load(p_tables + tl.load(p_slot + 3) + a)
        q1 += tl.load(p_tables + tl.load(p_slot + 4) + b) << 16
        q1 = q1 | GUARDS
        q2 = low_c
        q3 = tl.load(p_tables + tl.load(p_slot + 5) + c)
        if KIND == STRIDED:
            q4 = _residues(p_slot, a, b, c)
        q3 = tl.where(tl.load(p_slot + USED) != 0, q3, -1)  # an empty interval
    elif KIND == BAND:
        q0 = _weighted(p_slot, a, b, c)
    elif KIND == RADIAL:
        q0 = _weighted(p_slot, a, b, c)
        q0 = tl.where(tl.load(p_slot + USED) != 0, q0, 1 << 30)  # further than any width
        q1 = _weighted(p_slot + 3, a, b, c)
    elif KIND == LABEL:
        offset = tl.load(p_slot)
        q0 = tl.load(p_tables + offset + token, mask=token * 0 + offset >= 0, other=-1)
    return q0, q1, q2, q3, q4


@triton.jit
def keeps(p_params, p_slot, p_tables, q0, q1, q2, q3, q4, token, KIND: tl.constexpr):
    """Return which pairs of a block are kept, [M, N], for keys of raster index ``token`` [N]."""
    a, b, c = coordinates(p_params, token)
    if KIND == AXIS or KIND == STRIDED:  # noqa: SIM109
        pair = a + (b << 16)
        stands = ((pair | GUARDS)[None, :] - q0[:, None]) & (q1[:, None] - pair[None, :])
        kept = (stands & GUARDS) == GUARDS
        kept = kept & (c[None, :] >= q2[:, None]) & (c[None, :] <= q3[:, None])
        if KIND == STRIDED:
            kept = kept & (_residues(p_slot, a, b, c)[None, :] == q4[:, None])
    elif KIND == BAND:
        apart = _weighted(p_slot, a, b, c)[None, :] - q0[:, None]
        low = tl.load(p_slot + 3)
        high = tl.where(tl.load(p_slot + USED) != 0, tl.load(p_slot + 4), low - 1)
        kept = (apart >= low) & (apart <= high)
    elif KIND == RADIAL:
        distance = tl.abs(_weighted(p_slot + 3, a, b, c)[None, :] - q1[:, None])
        width = tl.load(p_tables + tl.load(p_slot + 6) + distance)
        apart = tl.abs(_weighted(p_slot, a, b, c)[None, :] - q0[:, None])
        kept = apart <= width
    else:
        tl.static_assert(KIND == LABEL)
        used = tl.load(p_slot + USED)
        labels = tl.load(p_tables + tl.load(p_slot + 1) + token, mask=token * 0 + used > 0, other=0)
        kept = (q0[:, None] & labels[None, :]) != 0
    return kept


@triton.jit
def bit_tile(p_bits, number, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Return a tile of packed bits as a mask, [M, N]; ``p_bits`` int32 ``[U, BLOCK_M, ceil(BLOCK_N
    / 32)]``. Each row loads its words once. The shift uses only the bits of the column index that
    differ between threads, so that few values are shifted."""
    WORDS: tl.constexpr = (BLOCK_N + 31) // 32
    o_m = tl.arange(0, BLOCK_M)
    o_n = tl.arange(0, BLOCK_N)[None, :]
    p_word = p_bits + (number.to(tl.int64) * BLOCK_M + o_m) * WORDS
    word = tl.load(p_word)[:, None]
    for i in tl.static_range(1, WORDS):
        word = tl.where(o_n >= 32 * i, tl.load(p_word + i)[:, None], word)
    return ((word >> (o_n & 6)) & (1 << (o_n & 25))) != 0
