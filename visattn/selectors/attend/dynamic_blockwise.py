"""Attention over a selection in plain torch; only selected key blocks are computed.

Rows (batch item, head, query block) that see about the same number of blocks at a level are
processed together. The levels of a row are disjoint key sets, whose results are merged by LSE.
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
    """Accumulated results of the rows: output ``[R, block_q, D]`` and LSE ``[R, block_q]``."""

    def __init__(self, q: torch.Tensor, dtype: torch.dtype) -> None:
        self.out = torch.zeros(q.shape, dtype=dtype, device=q.device)
        self.lse = torch.full(q.shape[:-1], -torch.inf, dtype=dtype, device=q.device)

    def add(
        self, rows: torch.Tensor, logits: torch.Tensor, v: torch.Tensor, shift: torch.Tensor | None
    ) -> None:
        """Merge in the attention of rows over one key set, after adding ``shift`` to its output."""
        best = logits.amax(-1, keepdim=True)
        weights = (logits - best.masked_fill(best == -torch.inf, 0)).exp()
        total = weights.sum(-1)
        # rows without a key in the set get gradient 0 instead of the gradient of log(0)
        nothing = total == 0
        safe = total.masked_fill(nothing, 1)
        out = weights @ v / safe[..., None]
        if shift is not None:
            out = out + shift
        lse = (best[..., 0] + safe.log()).masked_fill(nothing, -torch.inf)
        before = self.lse[rows]
        gone = nothing & (before == -torch.inf)
        finite = torch.logaddexp(before.masked_fill(gone, 0), lse.masked_fill(gone, 0))
        merged = finite.masked_fill(gone, -torch.inf)
        new_share, old_share = (lse - finite).exp(), (before - finite).exp()
        self.out[rows] = self.out[rows] * old_share[..., None] + out * new_share[..., None]
        self.lse[rows] = merged


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    selection: Selection,
    layout: TokenLayout,
    text_lengths: torch.Tensor | None,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute attention over a selection.

    Args:
        q: queries ``[B, H, L, D]``.
        k: keys ``[B, Hk, L, D]``.
        v: values ``[B, Hk, L, D]``.
        selection: the blocks that these heads see.
        layout: the segments of the sequence.
        text_lengths: valid text tokens, int64 ``[B, text segments]``, or None.
        scale: factor of the logits.

    Returns:
        The output in the dtype of q, and the LSE over the visible keys with their weights, float32
        (float64 for float64 inputs) ``[B, H, L]``.
    """
    acc_dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    batch, heads, _, dim = q.shape
    q_side, k_side = selection.q_side, selection.k_side
    q, wrong = set_aside(q)
    q_blocks = q_side.take(q).to(acc_dtype)
    num_q, num_k = q_blocks.shape[2], len(k_side)
    rows_q = q_blocks.reshape(batch * heads * num_q, q_side.size, dim)
    keys, values = k_side.take(k).to(acc_dtype), k_side.take(v).to(acc_dtype)
    key_heads = keys.shape[1]
    exists = valid_block_tokens(k_side, layout, text_lengths)
    results = _Rows(rows_q, acc_dtype)
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
            row_queries = rows_q[rows]
            block = columns + first[rows][:, None]
            logits = row_queries @ flat_k[block].flatten(1, 2).mT * scale
            if means.spread is not None:
                spread = means.spread.flatten(0, 2)[block].flatten(1, 2)
                logits += (row_queries * scale).square() @ spread.mT / 2
            bias = flat_bias[block].masked_fill(~seen[..., None], -torch.inf)
            logits += bias.flatten(1, 2)[:, None]
            moved = None if shift is None else row_queries @ shift[rows // num_q]
            results.add(rows, logits, flat_v[block].flatten(1, 2), moved)
    if isinstance(selection.rest, SampledRest):
        _add_sample(results, rows_q, k, v, selection, layout, scale)
    out = results.out.view(batch, heads, num_q, q_side.size, dim)
    lse = results.lse.view(batch, heads, num_q, q_side.size)
    if selection.correction is not None:
        factor, extra = selection.correction
        out = out * factor[..., None, None] + extra[..., None, :]
    length = q.shape[2]
    token_lse = to_tokens(lse[..., None], q_side, length)[..., 0]
    token_out = to_tokens(out, q_side, length) + wrong[..., None]
    return token_out.to(q.dtype), token_lse + wrong


def _by_columns(
    results: _Rows,
    rows_q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    bias: torch.Tensor,
    levels: torch.Tensor,
    scale: float,
) -> None:
    """Compute rows of one query each, one key block at a time.

    This gathers the queries that see a block, instead of the keys that each query sees.
    """
    batch, heads, num_q, num_k = levels.shape
    share = heads // keys.shape[1]
    for b in range(batch):
        for h in range(heads):
            key_head = h // share
            first = (b * heads + h) * num_q
            for column in range(num_k):
                rows = first + levels[b, h, :, column].nonzero()[:, 0]
                if len(rows):
                    logits = rows_q[rows] @ keys[b, key_head, column].mT * scale
                    bias_row = bias[b, key_head, column]
                    results.add(rows, logits + bias_row, values[b, key_head, column], None)


class Means(NamedTuple):
    """The key blocks at one level; ``h`` is the number of key heads, or of query heads.

    Attributes:
        keys: keys or mean keys, ``[B, h, Nk, m, D]``.
        values: values or mean values, ``[B, h, Nk, m, D]``.
        bias: logarithms of their weights, ``[B, h, Nk, m]``; minus infinity for absent ones.
        spread: variances of the keys, in the shape of ``keys``, or None.
    """

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
    """Return the keys and values that rows see of each key block at a level.

    Args:
        selection: the selection, for its blocks, weights and variance term.
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
        mean_k, mean_v, bias = weighted_means(selection, keys, values)
        return Means(mean_k[..., None, :], mean_v[..., None, :], bias[..., None], None)
    mean_k, number = block_parts(keys, there, pool)
    mean_v, _ = block_parts(values, there, pool)
    bias = number.expand(mean_k.shape[:4]).to(keys).log()
    if not selection.variance:
        return Means(mean_k, mean_v, bias, None)
    squares, _ = block_parts(keys.square(), there, pool)
    return Means(mean_k, mean_v, bias, (squares - mean_k.square()).clamp(min=0))


def _gathers(
    seen: torch.Tensor, per_block: int, queries: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Group the rows of ``seen`` ``[R, N]`` that see about the same number of blocks.

    Yields:
        For each group of bounded size: row numbers ``[r]``, block numbers ``[r, n]``, and which of
        these the row really sees, bool ``[r, n]``.
    """
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
        # padding repeats a block that the row sees: a weight of 0 would not mask a NaN elsewhere
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
    """Merge in the sampled keys of a SampledRest."""
    assert isinstance(selection.rest, SampledRest)
    heads, num_q = selection.levels.shape[1:3]
    acc_dtype = rows_q.dtype
    tokens = sampled_tokens(selection.rest, layout, k.device)
    bias = sampled_bias(selection, tokens, layout, acc_dtype)
    share = heads // k.shape[1]
    keys, values = (
        x.index_select(2, tokens).to(acc_dtype).repeat_interleave(share, 1).flatten(0, 1)
        for x in (k, v)
    )
    flat = bias.reshape(-1, len(tokens))
    step = max(1, CHUNK // (len(tokens) * max(rows_q.shape[1], k.shape[3])))
    for begin in range(0, len(rows_q), step):
        rows = torch.arange(begin, min(begin + step, len(rows_q)), device=k.device)
        logits = rows_q[rows] @ keys[rows // num_q].mT * scale + flat[rows][:, None]
        results.add(rows, logits, values[rows // num_q], None)
