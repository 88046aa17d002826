"""Block-sparse attention in plain torch, on any device: only visited blocks are computed.

The unit of work is a row of a block map (``block_rows.py``). This file computes rows with
operations that autograd differentiates and that return the LSE. On a CPU, calls that need neither
are computed by ``blockwise_cpu.py``.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.nn.functional import scaled_dot_product_attention

from visattn.attention.backends.block_rows import (
    Row,
    keys_of,
    mask_of,
    ordered,
    products_of,
    rows_of,
)
from visattn.attention.backends.blockwise_cpu import rows_on_cpu
from visattn.attention.backends.reference import known_finite, masked_attention
from visattn.attention.lowering import block_sizes, head_maps
from visattn.attention.spec import AttentionSpec
from visattn.blocks.block_map import BlockMap
from visattn.geometry.layout import copied_to, index_on, valid_keys
from visattn.geometry.padding import without_padding

__all__ = ["blockwise_attention", "blockwise_backward"]

CHUNK = 1 << 24  # limit of the logits that are in memory at a time


def _attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float,
    with_lse: bool,
    careful: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return the attention over the last two axes; a row without a key has the output 0."""
    if with_lse or careful:
        out, lse = masked_attention(q, k, v, mask, scale, careful=careful)
        return out, lse if with_lse else None
    out = scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
    return (out if mask is None else out.masked_fill(~mask.any(-1, keepdim=True), 0)), None


def _parts(rows: list[Row], heads: int) -> Iterator[Row]:
    """Split rows without a mask, so that the logits of all heads fit ``CHUNK``."""
    for row in rows:
        step = max(1, CHUNK // max(1, heads * row.keys))
        if row.tiles or row.shape[0] <= step:
            yield row
        else:
            for begin in range(row.begin, row.end, step):
                yield row._replace(begin=begin, end=min(row.end, begin + step))


def _one_map(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    block_map: BlockMap,
    valid: torch.Tensor | None,
    scale: float,
    with_lse: bool,
    careful: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Compute heads that share a map; inputs and outputs ``[B, H, L, D]`` in token order."""
    batch, heads, length, dim = q.shape
    needs_grad = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    written_out = with_lse or careful
    if q.device.type == "cpu" and not (written_out or valid is not None or needs_grad):
        return rows_on_cpu(q, k, v, block_map, scale), None
    order = block_map.q_blocks.index
    q = ordered(q, order)
    k, v = (ordered(x, block_map.k_blocks.index) for x in (k, v))
    valid = _valid(block_map, valid, q.device, heads)
    tiles = copied_to(block_map.tiles[0], q.device)
    acc_dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    rows = rows_of(block_map)
    rows = list(_parts(rows, len(q))) if written_out or valid is not None else rows
    outs: list[torch.Tensor] = []
    lses: list[torch.Tensor] = []
    for group in products_of(rows, len(q), dim, valid is None):
        group_q = q[:, group[0].begin : group[-1].end]
        if group[0].keys:
            mask = mask_of(group, tiles)
            if valid is not None:
                visible = keys_of(valid[..., None], group).mT
                mask = visible if mask is None else mask & visible
            group_q = group_q.unflatten(1, (len(group), -1))
            operands = (group_q, keys_of(k, group), keys_of(v, group))
            out, lse = _attend(*operands, mask, scale, with_lse, careful)
            outs.append(out.flatten(1, 2))
            lses += [] if lse is None else [lse.flatten(1, 2)]
        else:  # rows of Skip: output 0 and gradients 0
            outs.append(torch.where(torch.zeros_like(group_q, dtype=torch.bool), group_q, 0))
            lses.append(group_q.new_full(group_q.shape[:2], -torch.inf, dtype=acc_dtype))
    inverse = None if order is None else copied_to(order, q.device).argsort()
    out = ordered(torch.cat(outs, 1)[:, None], inverse).view(batch, heads, length, dim)
    if not with_lse:
        return out, None
    lse = ordered(torch.cat(lses, 1)[:, None, :, None], inverse)
    return out, lse.view(batch, heads, length)


def _valid(
    block_map: BlockMap, valid: torch.Tensor | None, device: torch.device, heads: int
) -> torch.Tensor | None:
    """Return the valid keys ``[B, Lk]`` in the order of the map, per head: ``[B * heads, Lk]``."""
    if valid is None:
        return None
    order = block_map.k_blocks.index
    valid = valid if order is None else valid.index_select(1, copied_to(order, valid.device))
    return valid.repeat_interleave(heads, 0).to(device)


def _maps_of(spec: AttentionSpec, block: tuple[int, int] | None = None) -> list[BlockMap]:
    """Return the block map of each head, at the block sizes of this backend."""
    longest = max(spec.layout.length, spec.key_layout.length)
    return head_maps(spec, *(block or block_sizes(longest)))


def blockwise_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    spec: AttentionSpec,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Compute attention from the visited blocks; shapes and results as ``reference_attention``.

    On a CPU, a NaN or infinite number affects only the queries that attend to it. On other devices
    the check for such numbers would synchronize, so only those after the end of a text are removed.

    Args:
        q: ``[B, H, Lq, D]``.
        k: ``[B, Hk, Lk, D]``.
        v: ``[B, Hk, Lk, D]``.
        spec: static patterns only; heads with equal patterns run together. ``return_lse`` is slower
            on a CPU, because torch's fused attention returns no LSE there.

    Returns:
        Output ``[B, H, Lq, D]``, and the LSE ``[B, H, Lq]`` where the spec asks for it.
    """
    maps, lengths, layout = _maps_of(spec), spec.text_lengths, spec.key_layout
    scale, with_lse = spec.factor, spec.return_lse
    distinct = tuple(dict.fromkeys(maps))
    valid = None if lengths is None else valid_keys(lengths, layout)
    careful = q.device.type == "cpu" and not known_finite(q, k, v)
    if lengths is not None and q.device.type != "cpu":
        k, v = (without_padding(x, layout, lengths) for x in (k, v))
    queries_per_key = q.shape[1] // k.shape[1]
    outs: list[torch.Tensor] = []
    lses: list[torch.Tensor] = []
    heads: list[int] = []
    for block_map in distinct:
        map_heads = [head for head, item in enumerate(maps) if item is block_map]
        heads += map_heads
        if len(map_heads) == len(maps) and queries_per_key == 1:
            map_q, map_k, map_v = q, k, v
        else:
            q_heads = index_on(tuple(map_heads), q.device)
            k_heads = index_on(tuple(head // queries_per_key for head in map_heads), q.device)
            map_q = q.index_select(1, q_heads)
            map_k, map_v = (x.index_select(1, k_heads) for x in (k, v))
        out, lse = _one_map(map_q, map_k, map_v, block_map, valid, scale, with_lse, careful)
        outs.append(out)
        if lse is not None:
            lses.append(lse)
    if len(distinct) == 1:
        return outs[0], lses[0] if with_lse else None
    inverse = index_on(tuple(heads.index(head) for head in range(len(heads))), q.device)
    out = torch.cat(outs, 1).index_select(1, inverse)
    return out, torch.cat(lses, 1).index_select(1, inverse) if with_lse else None


def blockwise_backward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    grad_out: torch.Tensor,
    grad_lse: torch.Tensor | None,
    spec: AttentionSpec,
    *,
    block: tuple[int, int] | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of q, k, v, computed from the visited blocks.

    With ``p = exp(s - lse)`` and ``delta = sum_d grad_out out - grad_lse``::

        ds = p (grad_out v^T - delta)    dq = scale ds k    dk = scale ds^T q    dv = p^T grad_out

    NaN and infinite inputs are replaced by 0 in the products. They reach the gradients through p
    and delta of the queries that attend to them, if those queries have a gradient.

    Args:
        q: ``[B, H, Lq, D]``.
        k: ``[B, Hk, Lk, D]``.
        v: ``[B, Hk, Lk, D]``.
        out: output of the forward pass, ``[B, H, Lq, D]``.
        lse: LSE of the forward pass, ``[B, H, Lq]``.
        grad_out: gradient of ``out``.
        grad_lse: gradient of ``lse``; None: zero.
        spec: that of the forward pass.
        block: queries and keys of a block; default: ``block_sizes``.

    Returns:
        Gradients in the dtypes of q, k and v.
    """
    maps, text_lengths, scale = _maps_of(spec, block), spec.text_lengths, spec.factor
    acc_dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    has_gradient = (grad_out != 0).any(-1)
    has_gradient = has_gradient if grad_lse is None else has_gradient | (grad_lse != 0)
    delta = (grad_out.to(acc_dtype) * out.to(acc_dtype)).sum(-1)
    delta = delta if grad_lse is None else delta - grad_lse.to(acc_dtype)
    delta = torch.where(has_gradient, delta, 0)
    dq, dk, dv = (torch.zeros_like(x, dtype=acc_dtype) for x in (q, k, v))
    valid = None if text_lengths is None else valid_keys(text_lengths, spec.key_layout)
    queries_per_key = q.shape[1] // k.shape[1]
    for head, block_map in enumerate(maps):
        key_head = head // queries_per_key
        q_head, k_head = slice(head, head + 1), slice(key_head, key_head + 1)
        q_index, k_index = block_map.q_blocks.index, block_map.k_blocks.index
        b_q, b_do = (ordered(x[:, q_head].to(acc_dtype), q_index) for x in (q, grad_out))
        b_k, b_v = (ordered(x[:, k_head].to(acc_dtype), k_index) for x in (k, v))
        b_lse, b_delta, b_has_gradient = (
            ordered(x[:, q_head, :, None], q_index) for x in (lse, delta, has_gradient)
        )
        finite_q, finite_k, finite_v = (torch.where(x.isfinite(), x, 0) for x in (b_q, b_k, b_v))
        head_valid = _valid(block_map, valid, q.device, 1)
        tiles = copied_to(block_map.tiles[0], q.device)
        sum_q, sum_k, sum_v = (torch.zeros_like(x) for x in (b_q, b_k, b_v))
        for row in _parts(rows_of(block_map), len(b_q)):
            if not row.keys:
                continue
            queries = slice(row.begin, row.end)
            all_k, row_k, row_v = (keys_of(x, [row])[:, 0] for x in (b_k, finite_k, finite_v))
            p = (b_q[:, queries] @ all_k.mT * scale - b_lse[:, queries]).exp()
            p = torch.where(b_has_gradient[:, queries], p, 0)
            mask = mask_of([row], tiles)
            if mask is not None:  # it masks all keys of a query without a key
                p = torch.where(mask[:, 0], p, 0)
            if head_valid is not None:
                p = torch.where(keys_of(head_valid[..., None], [row])[:, 0].mT, p, 0)
            ds = p * (b_do[:, queries] @ row_v.mT - b_delta[:, queries]) * scale
            sum_q[:, queries] = ds @ row_k
            part_k, part_v = ds.mT @ finite_q[:, queries], p.mT @ b_do[:, queries]
            for total, part in ((sum_k, part_k), (sum_v, part_v)):
                done = 0
                for begin, end in row.runs:
                    total[:, begin:end] += part[:, done : done + end - begin]
                    done += end - begin
        for total, part, head_slice, index in (
            (dq, sum_q, q_head, q_index),
            (dk, sum_k, k_head, k_index),
            (dv, sum_v, k_head, k_index),
        ):
            inverse = None if index is None else copied_to(index, q.device).argsort()
            total[:, head_slice] += ordered(part[:, None], inverse)[:, None]
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)
