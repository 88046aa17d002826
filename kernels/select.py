"""The select stage: from scores to levels, bit-identical to ``visattn.selectors.stages.prefix``.

A row's scores stay on chip. The kept blocks are a prefix in the order of descending scores, with
ascending indices among equal scores. Bisection on the scores, as integers, finds its end; masses
are integers too. Either each row chooses alone, or all rows of a head compete. In the second case
one program per head finds the threshold in the scores of the head, which stay in the cache, and
rows only compare.

Scores float32 ``[B, H, Nq, Nk]``; forced uint8, any strides; levels uint8 ``[B, H, Nq, Nk]``.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from visattn.kernels.pooled import apart

LOWEST: tl.constexpr = tl.constexpr(-(2**31))
ONE: tl.constexpr = tl.constexpr(1 << 24)
LOG2_E: tl.constexpr = tl.constexpr(94548)
COUNT: tl.constexpr = tl.constexpr(0)  # units in which the end of a prefix is measured
MASS: tl.constexpr = tl.constexpr(1)
TOKENS: tl.constexpr = tl.constexpr(2)
MOST_ENDS = 4
MOST_BLOCKS = 1 << 14  # limit of the key blocks of a row


class Rule(NamedTuple):
    """The rule by which a row keeps blocks.

    Attributes:
        by: COUNT, MASS or TOKENS, the unit of the ends.
        ends: the end of the prefix of each level: a share in units of 1/65536, or a number of
            blocks if ``numbers`` is True.
        values: the level of each end, uint8.
        numbers: whether ends are numbers of blocks.
        least: smallest number of blocks at the first level, ``(amount, whether it is a number and
            not a share)``; None: no bound.
        most: largest number of blocks at the first level, in the same form; None: no bound.
        first: whether forced blocks come first in the order, and count.
        some: whether a prefix has at least one block.
        above: keep the blocks with more than the share ``ends[0]``, in units of 1/2^24, instead of
            a prefix.
        head: whether all rows of a head compete; each row has the same total mass.
    """

    by: int
    ends: tuple[int, ...]
    values: tuple[int, ...] = (1,)
    numbers: bool = False
    least: tuple[int, bool] | None = None
    most: tuple[int, bool] | None = None
    first: bool = False
    some: bool = False
    above: bool = False
    head: bool = False


@triton.jit
def _order_keys(x):
    """Return integers with the order of float32 numbers; 0 and -0 are equal."""
    bits = tl.where(x == 0, 0.0, x).to(tl.int32, bitcast=True)
    return tl.where(x == float("-inf"), LOWEST, bits ^ ((bits >> 31) & 0x7FFFFFFF))


@triton.jit
def _mass_weights(x):
    """Return the softmax weights of a row as int64, relative to the largest, which is 2^24."""
    gone = x == float("-inf")
    best = tl.max(x, 1)[:, None]
    apart = tl.maximum(tl.where(gone, 0.0, x - tl.where(gone, 0.0, best)), -30.0)
    twos = (tl.floor(apart * 65536.0).to(tl.int64) * LOG2_E) >> 16
    part = twos & 0xFFFF
    value = 55861315 + ((14546923 * part) >> 16)
    value = 259205647 + ((value * part) >> 16)
    value = 744127939 + ((value * part) >> 16)
    value = 1073741824 + ((value * part) >> 16)
    return tl.where(gone, 0, value >> (6 - (twos >> 16)))


@triton.jit
def _prefix(keys, weights, target):
    """Return the smallest prefix whose weights reach the target, int64 ``[R]``; else all blocks."""
    free = keys > LOWEST
    target = tl.minimum(target, tl.sum(weights, 1))
    low = tl.full(target.shape, LOWEST, tl.int64)
    high = tl.full(target.shape, 2147483647, tl.int64)
    wide = keys.to(tl.int64)
    for _ in range(32):
        middle = low + ((high - low + 1) >> 1)
        reached = tl.sum(tl.where(wide >= middle[:, None], weights, 0), 1) >= target
        low = tl.where(reached, middle, low)
        high = tl.where(reached, high, middle - 1)
    above = wide > low[:, None]
    equal = (wide == low[:, None]) & free
    missing = target - tl.sum(tl.where(above, weights, 0), 1)
    own = tl.where(equal, weights, 0)
    before = tl.cumsum(own, 1) - own
    kept = above | (equal & (before < missing[:, None]))
    return kept & (target > 0)[:, None]


@triton.jit
def _amount(total, amount, NUMBER: tl.constexpr, SOME: tl.constexpr):
    """Return a number, or a share of a total in units of 1/65536, rounded up; with SOME at least
    1."""
    if NUMBER:
        return tl.zeros_like(total) + amount
    elif SOME:
        return tl.maximum((total * amount + 65535) >> 16, 1)
    else:
        return (total * amount + 65535) >> 16


@triton.jit
def _select_kernel(
    scores,
    forced,
    length,
    cuts,
    levels,
    stride_fb,
    stride_fh,
    stride_fq,
    stride_fk,
    stride_nb,
    stride_nh,
    num_q,
    num_k,
    end0,
    end1,
    end2,
    end3,
    value0,
    value1,
    value2,
    value3,
    least,
    most,
    ROWS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BY: tl.constexpr,
    ENDS: tl.constexpr,
    NUMBERS: tl.constexpr,
    LEAST: tl.constexpr,
    MOST: tl.constexpr,
    LEAST_NUMBER: tl.constexpr,
    MOST_NUMBER: tl.constexpr,
    FIRST: tl.constexpr,
    SOME: tl.constexpr,
    ABOVE: tl.constexpr,
    HEAD: tl.constexpr,
):
    """One program: ROWS rows of one head.

    With HEAD, ``cuts`` int64 ``[B, H, 2]`` gives the first end: a key, and the flat index before
    which blocks with an equal key are kept. With ``BY == MASS`` the keys are the relative masses of
    the row.
    """
    i_h = tl.program_id(1)
    i_b = tl.program_id(2)
    o_q = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    o_k = tl.arange(0, BLOCK_K)
    inside = (o_q < num_q)[:, None] & (o_k < num_k)[None, :]
    at = (i_b.to(tl.int64) * tl.num_programs(1) + i_h) * num_q * num_k
    at += o_q.to(tl.int64)[:, None] * num_k + o_k[None, :]
    x = tl.load(scores + at, mask=inside, other=float("-inf"))
    p_forced = forced + i_b.to(tl.int64) * stride_fb + i_h.to(tl.int64) * stride_fh
    p_forced += o_q.to(tl.int64)[:, None] * stride_fq + o_k[None, :] * stride_fk
    kept_anyway = tl.load(p_forced, mask=inside, other=0) != 0
    free = x > float("-inf")
    blocks = tl.sum(free.to(tl.int64), 1)
    ones = free.to(tl.int64)
    if BY == MASS:
        weights = _mass_weights(x)
        if HEAD:
            total = tl.maximum(tl.sum(weights, 1), 1)[:, None]
            x = tl.where(free, ((weights * ONE) // total).to(tl.float32), float("-inf"))
    elif BY == TOKENS:
        p_length = length + i_b.to(tl.int64) * stride_nb + i_h.to(tl.int64) * stride_nh
        own = tl.load(p_length + o_k, mask=o_k < num_k, other=0).to(tl.int64)
        weights = tl.where(free, own[None, :], 0)
    else:
        weights = ones
    if FIRST:
        x = tl.where(kept_anyway & free, float("inf"), x)
    keys = _order_keys(x)
    total = tl.sum(weights, 1)
    level = tl.zeros([ROWS, BLOCK_K], tl.int32)
    for i in tl.static_range(ENDS):
        # from the last end to the first, whose level takes precedence
        if ENDS - 1 - i == 3:
            end, value = end3, value3
        elif ENDS - 1 - i == 2:
            end, value = end2, value2
        elif ENDS - 1 - i == 1:
            end, value = end1, value1
        else:
            end, value = end0, value0
        if HEAD:
            p_cut = cuts + (i_b.to(tl.int64) * tl.num_programs(1) + i_h) * 2
            key = tl.load(p_cut)
            flat = o_q.to(tl.int64)[:, None] * num_k + o_k[None, :]
            wide = keys.to(tl.int64)
            mask = (wide > key) | ((wide == key) & (flat < tl.load(p_cut + 1)) & free)
        elif ABOVE:
            mask = weights * ONE > (total * end)[:, None]
        else:
            mask = _prefix(keys, weights, _amount(total, end, NUMBERS, SOME))
        if ENDS - 1 - i == 0:
            if LEAST:
                mask = mask | _prefix(keys, ones, _amount(blocks, least, LEAST_NUMBER, True))
            if MOST:
                mask = mask & _prefix(keys, ones, _amount(blocks, most, MOST_NUMBER, True))
        level = tl.where(mask, value, level)
    level = tl.where(kept_anyway, 1, level)
    tl.store(levels + at, level.to(tl.uint8), mask=inside)


@triton.jit
def _masses_kernel(scores, masses, num_k, rows, ROWS: tl.constexpr, BLOCK_K: tl.constexpr):
    """Write the masses of each row divided by their sum, int32 in units of 2^-24; -1 for
    excluded blocks."""
    o_r = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    o_k = tl.arange(0, BLOCK_K)
    inside = (o_r < rows)[:, None] & (o_k < num_k)[None, :]
    at = o_r[:, None] * num_k + o_k[None, :]
    x = tl.load(scores + at, mask=inside, other=float("-inf"))
    weights = _mass_weights(x)
    total = tl.maximum(tl.sum(weights, 1), 1)[:, None]
    share = ((weights * ONE) // total).to(tl.int32)
    tl.store(masses + at, tl.where(x > float("-inf"), share, -1), mask=inside)


@triton.jit
def _head_items(
    scores,
    masses,
    forced,
    at,
    flat,
    inside,
    num_k,
    stride_fq,
    stride_fk,
    BY: tl.constexpr,
    FIRST: tl.constexpr,
):
    """Return the sort keys and weights, int64, of the block pairs ``flat`` of a head."""
    if BY == MASS:
        mass = tl.load(masses + at + flat, mask=inside, other=-1)
        free = mass >= 0
        weights = tl.where(free, mass, 0).to(tl.int64)
        x = tl.where(free, mass.to(tl.float32), float("-inf"))
    else:
        x = tl.load(scores + at + flat, mask=inside, other=float("-inf"))
        free = x > float("-inf")
        weights = free.to(tl.int64)
    if FIRST:
        p_forced = forced + (flat // num_k) * stride_fq + (flat % num_k) * stride_fk
        x = tl.where((tl.load(p_forced, mask=inside, other=0) != 0) & free, float("inf"), x)
    return _order_keys(x).to(tl.int64), weights


@triton.jit
def _cut_kernel(
    scores,
    masses,
    forced,
    cuts,
    stride_fb,
    stride_fh,
    stride_fq,
    stride_fk,
    num_q,
    num_k,
    end,
    BLOCK: tl.constexpr,
    BY: tl.constexpr,
    NUMBERS: tl.constexpr,
    FIRST: tl.constexpr,
    SOME: tl.constexpr,
):
    """One program: find the end of the prefix of one head."""
    i_h = tl.program_id(0)
    i_b = tl.program_id(1)
    at = (i_b.to(tl.int64) * tl.num_programs(0) + i_h) * num_q * num_k
    items = num_q * num_k
    p_forced = forced + i_b.to(tl.int64) * stride_fb + i_h.to(tl.int64) * stride_fh
    o_i = tl.arange(0, BLOCK)
    total = tl.zeros([], tl.int64)
    for first in range(0, items, BLOCK):
        flat = (first + o_i).to(tl.int64)
        _, weights = _head_items(
            scores, masses, p_forced, at, flat, flat < items, num_k, stride_fq, stride_fk, BY, FIRST
        )
        total += tl.sum(weights, 0)
    if NUMBERS:  # this number for each row that has a block to choose
        rows = tl.zeros([], tl.int64)
        p_row = scores + at
        for _ in range(0, num_q):
            some = tl.zeros([], tl.int32)
            for first in range(0, num_k, BLOCK):
                column = first + o_i
                x = tl.load(p_row + column, mask=column < num_k, other=float("-inf"))
                some = tl.maximum(some, tl.max((x > float("-inf")).to(tl.int32), 0))
            rows += some
            p_row += num_k
        target = rows * end
    else:
        target = _amount(total, end, False, SOME)
    target = tl.minimum(target, total)
    low = tl.full([], LOWEST, tl.int64)
    high = tl.full([], 2147483647, tl.int64)
    for _ in range(32):
        middle = low + ((high - low + 1) >> 1)
        reached = tl.zeros([], tl.int64)
        for first in range(0, items, BLOCK):
            flat = (first + o_i).to(tl.int64)
            keys, weights = _head_items(
                scores,
                masses,
                p_forced,
                at,
                flat,
                flat < items,
                num_k,
                stride_fq,
                stride_fk,
                BY,
                FIRST,
            )
            reached += tl.sum(tl.where(keys >= middle, weights, 0), 0)
        enough = reached >= target
        low = tl.where(enough, middle, low)
        high = tl.where(enough, high, middle - 1)
    missing = target
    for first in range(0, items, BLOCK):
        flat = (first + o_i).to(tl.int64)
        keys, weights = _head_items(
            scores, masses, p_forced, at, flat, flat < items, num_k, stride_fq, stride_fk, BY, FIRST
        )
        missing -= tl.sum(tl.where(keys > low, weights, 0), 0)
    cut = tl.zeros([], tl.int64)
    running = tl.zeros([], tl.int64)
    for first in range(0, items, BLOCK):
        flat = (first + o_i).to(tl.int64)
        keys, weights = _head_items(
            scores, masses, p_forced, at, flat, flat < items, num_k, stride_fq, stride_fk, BY, FIRST
        )
        own = tl.where(keys == low, weights, 0)
        before = tl.cumsum(own, 0) - own + running
        taken = (keys == low) & (before < missing) & (low > LOWEST)
        cut = tl.maximum(cut, tl.max(tl.where(taken, flat + 1, 0), 0))
        running += tl.sum(own, 0)
    p_cut = cuts + (i_b.to(tl.int64) * tl.num_programs(0) + i_h) * 2
    tl.store(p_cut, tl.where(target > 0, low, 2147483648))
    tl.store(p_cut + 1, cut)


def select(
    scores: torch.Tensor, length: torch.Tensor, forced: torch.Tensor, rule: Rule
) -> torch.Tensor:
    """Return the levels of block pairs, uint8 ``[B, H, Nq, Nk]``.

    Args:
        scores: float32 ``[B, H, Nq, Nk]``, contiguous.
        length: tokens of the key blocks, int32 ``[G, G', Nk]``, stride 1 along the last axis.
        forced: pairs that are always kept, bool or uint8, broadcast to the scores.
        rule: the rule by which rows keep blocks.

    Raises:
        ValueError: there are too many key blocks or ends.
    """
    batch, heads, num_q, num_k = scores.shape
    if num_k > MOST_BLOCKS or len(rule.ends) > MOST_ENDS:
        raise ValueError(
            f"{num_k} blocks with {rule} exceed the kernel's limits: at most {MOST_BLOCKS} blocks "
            f"and {MOST_ENDS} ends"
        )
    levels = torch.empty(scores.shape, dtype=torch.uint8, device=scores.device)
    forced = forced.view(torch.uint8).expand(scores.shape)
    block_k = max(16, triton.next_power_of_2(num_k))
    rows = max(1, min(8, 2048 // block_k))
    cuts = length
    if rule.head:
        cuts = torch.empty(batch, heads, 2, dtype=torch.int64, device=scores.device)
        masses = scores
        if rule.by == MASS.value:
            masses = torch.empty(scores.shape, dtype=torch.int32, device=scores.device)
            all_rows = batch * heads * num_q
            _masses_kernel[(triton.cdiv(all_rows, rows),)](
                scores, masses, num_k, all_rows, ROWS=rows, BLOCK_K=block_k, num_warps=8
            )
        _cut_kernel[(heads, batch)](
            scores,
            masses,
            forced,
            cuts,
            *forced.stride(),
            num_q,
            num_k,
            rule.ends[0],
            BLOCK=4096 if scores.device.type == "cuda" else block_k,
            BY=rule.by,
            NUMBERS=rule.numbers,
            FIRST=rule.first,
            SOME=rule.some,
            num_warps=8,
        )
    ends, values = (
        (*given, *(0,) * (MOST_ENDS - len(given))) for given in (rule.ends, rule.values)
    )
    least, most = rule.least or (0, True), rule.most or (0, True)
    _select_kernel[(triton.cdiv(num_q, rows), heads, batch)](
        scores,
        forced,
        length,
        cuts,
        levels,
        *forced.stride(),
        *apart(length),
        num_q,
        num_k,
        *ends,
        *values,
        least[0],
        most[0],
        ROWS=rows,
        BLOCK_K=block_k,
        BY=rule.by,
        ENDS=len(rule.ends),
        NUMBERS=rule.numbers,
        LEAST=rule.least is not None,
        MOST=rule.most is not None,
        LEAST_NUMBER=least[1],
        MOST_NUMBER=most[1],
        FIRST=rule.first,
        SOME=rule.some,
        ABOVE=rule.above,
        HEAD=rule.head,
        num_warps=8,
    )
    return levels
