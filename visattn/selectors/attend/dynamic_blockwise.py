"""Attention by a selection, in plain torch: only what is seen is computed.

Rows (batch item, head, query block) that see equally many blocks of a level are gathered together;
the levels of a row are disjoint key sets, whose results are merged by LSE.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch

from visattn.geometry.layout import TokenLayout
from visattn.geometry.padding import set_aside
from visattn.selectors.attend.rest import (
    first_order,
    sampled_bias,
    sampled_tokens,
    to_tokens,
    valid_block_tokens,
    value_slope,
    weighted_means,
)
from visattn.selectors.stages.blocks import block_parts
from visattn.selectors.stages.choose import BLOCK
from visattn.selectors.stages.selection import SampledRest, Selection

__all__ = ["Means", "attend", "means_of"]

CHUNK = 1 << 22  # gathered key elements, or logits, of one product


class _Rows:
    """Results of the rows so far: output ``[R, block_q, D]`` and LSE ``[R, block_q]``."""

    def __init__(self, q: torch.Tensor, dtype: torch.dtype) -> None:
        self.out = torch.zeros(q.shape, dtype=dtype, device=q.device)
        self.lse = torch.full(q.shape[:-1], -torch.inf, dtype=dtype, device=q.device)

    def add(
        self, rows: torch.Tensor, logits: torch.Tensor, v: torch.Tensor, shift: torch.Tensor | None
    ) -> None:
        """Merge the attention of rows over one key set; ``shift`` is added to its output."""
        best = logits.amax(-1, keepdim=True)
        weights = (logits - best.masked_fill(best == -torch.inf, 0)).exp()
        total = weights.sum(-1)
        # rows without a key of the set have gradients of 0, not of a logarithm of 0
        nothing = total == 0
        safe = total.masked_fill(nothing, 1)
        out = weights @ v / safe[..., None]
        if shift is not None:
            out = out + shift
        lse = (best[..., 0] + safe.log()).masked_fill(nothing, -torch.inf)
        before = self.lse[rows]
        gone = nothing & (before == -torch.inf)
        finite = torch.logaddexp(before.masked_fill(gone, 0), lse.masked_fill(gone, 0))
        both = finite.masked_fill(gone, -torch.inf)
        own, other = (lse - finite).exp(), (before - finite).exp()
        self.out[rows] = self.out[rows] * other[..., None] + out * own[..., None]
        self.lse[rows] = both


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    selection: Selection,
    layout: TokenLayout,
    text_lengths: torch.Tensor | None,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention by a selection.

    Args:
        q: ``[B, H, L, D]``; k, v: ``[B, Hk, L, D]``; selection: of these heads.
        text_lengths: int64 ``[B, text segments]`` or None.

    Returns:
        Output in the dtype of q, and LSE float32 (float64 for float64) ``[B, H, L]``, of the keys
        that are seen with the weights that they have.
    """
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    batch, heads, _, dim = q.shape
    q_side, k_side = selection.q_side, selection.k_side
    q, wrong = set_aside(q)
    own = q_side.take(q).to(wide)
    num_q, num_k = own.shape[2], len(k_side)
    rows_q = own.reshape(batch * heads * num_q, q_side.size, dim)
    keys, values = k_side.take(k).to(wide), k_side.take(v).to(wide)
    key_heads = keys.shape[1]
    exists = valid_block_tokens(k_side, layout, text_lengths)
    results = _Rows(rows_q, wide)
    levels = selection.levels.reshape(-1, num_k)
    share = heads // key_heads
    alone = q_side.size == 1 and selection.values == (1,)
    if alone:
        bias = exists.expand(keys.shape[:4]).to(keys).log()
        _by_columns(results, rows_q, keys, values, bias, selection.levels, scale)
    for value in () if alone else selection.values:
        means = means_of(selection, value, keys, values, exists)
        group = share if means.keys.shape[1] == key_heads else 1
        # the first key block of each row's batch item and head, in the flat list of blocks
        first = torch.arange(batch * means.keys.shape[1], device=q.device) * num_k
        first = first.view(batch, -1).repeat_interleave(group, 1)[..., None]
        first = first.expand(-1, -1, num_q).reshape(-1)
        flat_k, flat_v = means.keys.flatten(0, 2), means.values.flatten(0, 2)
        flat_bias = means.bias.flatten(0, 2)
        shift = None
        if value == BLOCK and first_order(selection):
            shift = value_slope(keys, values, means.keys, k_side, scale)
            shift = shift.repeat_interleave(share, 1).flatten(0, 1)
        for rows, columns, seen in _gathers(levels == value, flat_k.shape[1] * dim, q_side.size):
            own_q = rows_q[rows]
            block = columns + first[rows][:, None]
            logits = own_q @ flat_k[block].flatten(1, 2).mT * scale
            if means.spread is not None:
                spread = means.spread.flatten(0, 2)[block].flatten(1, 2)
                logits += (own_q * scale).square() @ spread.mT / 2
            bias = flat_bias[block].masked_fill(~seen[..., None], -torch.inf)
            logits += bias.flatten(1, 2)[:, None]
            moved = None if shift is None else own_q @ shift[rows // num_q]
            results.add(rows, logits, flat_v[block].flatten(1, 2), moved)
    if isinstance(selection.rest, SampledRest):
        _add_sample(results, rows_q, k, v, selection, layout, scale)
    out = results.out.view(batch, heads, num_q, q_side.size, dim)
    lse = results.lse.view(batch, heads, num_q, q_side.size)
    if selection.correction is not None:
        factor, extra = selection.correction
        out = out * factor[..., None, None] + extra[..., None, :]
    length = q.shape[2]
    own_lse = to_tokens(lse[..., None], q_side, length)[..., 0]
    own_out = to_tokens(out, q_side, length) + wrong[..., None]
    return own_out.to(q.dtype), own_lse + wrong


def _by_columns(
    results: _Rows,
    rows_q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    bias: torch.Tensor,
    levels: torch.Tensor,
    scale: float,
) -> None:
    """Rows of one query each, key block by key block: the queries that see a block are gathered,
    and not the keys of each query."""
    batch, heads, num_q, num_k = levels.shape
    share = heads // keys.shape[1]
    for b in range(batch):
        for h in range(heads):
            own = h // share
            first = (b * heads + h) * num_q
            for column in range(num_k):
                rows = first + levels[b, h, :, column].nonzero()[:, 0]
                if len(rows):
                    logits = rows_q[rows] @ keys[b, own, column].mT * scale
                    results.add(rows, logits + bias[b, own, column], values[b, own, column], None)


class Means(NamedTuple):
    """What the rows see of a key block at a level: keys and values ``[B, h, Nk, m, D]``, the
    logarithm of their weights ``[B, h, Nk, m]``, minus infinity where nothing is, and the variances
    of the keys, or None. ``h`` is the heads of the keys, or of the queries."""

    keys: torch.Tensor
    values: torch.Tensor
    bias: torch.Tensor
    spread: torch.Tensor | None


def means_of(
    selection: Selection,
    value: int,
    keys: torch.Tensor,
    values: torch.Tensor,
    exists: torch.Tensor,
) -> Means:
    """The means of key blocks at a level.

    Args:
        value: the level.
        keys: ``[B, Hk, Nk, size, D]``.
        values: ``[B, Hk, Nk, size, D]``.
        exists: valid tokens, from ``valid_block_tokens``.
    """
    pool, there = min(value, selection.k_side.size), selection.k_side.exists
    if value == 1:
        count = exists.expand(keys.shape[:4]).to(keys)
        return Means(keys, values, count.log(), None)
    if value == BLOCK and selection.weights is not None:
        own_k, own_v, bias = weighted_means(selection, keys, values)
        return Means(own_k[..., None, :], own_v[..., None, :], bias[..., None], None)
    own_k, number = block_parts(keys, there, pool)
    own_v, _ = block_parts(values, there, pool)
    bias = number.expand(own_k.shape[:4]).to(keys).log()
    if not selection.variance:
        return Means(own_k, own_v, bias, None)
    squares, _ = block_parts(keys.square(), there, pool)
    return Means(own_k, own_v, bias, (squares - own_k.square()).clamp(min=0))


def _gathers(
    seen: torch.Tensor, per_block: int, queries: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Rows of ``seen`` ``[R, N]`` that see something, in parts of bounded size and of about equal
    number: row numbers ``[r]``, the blocks that each sees ``[r, n]``, and which of them count."""
    counts = seen.sum(1)
    order = counts.argsort(descending=True, stable=True)
    sizes = counts[order].tolist()
    begin = 0
    while begin < len(sizes) and sizes[begin] > 0:
        widest = sizes[begin]
        most = max(1, CHUNK // (widest * max(per_block, queries)))
        end = begin
        while end < len(sizes) and end - begin < most and sizes[end] > 0.75 * widest:
            end += 1
        rows = order[begin:end]
        columns = seen[rows].byte().argsort(dim=1, descending=True, stable=True)[:, :widest]
        counted = seen[rows].gather(1, columns)
        # what does not count is a block that the row sees: a weight of 0 does not mask a NaN
        yield rows, torch.where(counted, columns, columns[:, :1]), counted
        begin = end


def _add_sample(
    results: _Rows,
    rows_q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    selection: Selection,
    layout: TokenLayout,
    scale: float,
) -> None:
    assert isinstance(selection.rest, SampledRest)
    heads, num_q = selection.levels.shape[1:3]
    wide = rows_q.dtype
    tokens = sampled_tokens(selection.rest, layout, k.device)
    bias = sampled_bias(selection, tokens, layout, wide)
    share = heads // k.shape[1]
    keys, values = (
        x.index_select(2, tokens).to(wide).repeat_interleave(share, 1).flatten(0, 1) for x in (k, v)
    )
    flat = bias.reshape(-1, len(tokens))
    step = max(1, CHUNK // (len(tokens) * max(rows_q.shape[1], k.shape[3])))
    for begin in range(0, len(rows_q), step):
        rows = torch.arange(begin, min(begin + step, len(rows_q)), device=k.device)
        logits = rows_q[rows] @ keys[rows // num_q].mT * scale + flat[rows][:, None]
        results.add(rows, logits, values[rows // num_q], None)
