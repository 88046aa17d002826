"""Block-sparse attention in plain torch, on any device: only visited blocks are computed.

Rows of a block map are the unit (``rows.py``). Here they are computed in a way that autograd can
follow and that gives the LSE; where neither is asked of a CPU, ``cpu_rows.py`` computes them.
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

CHUNK = 1 << 24  # logits that are written out at a time


def _attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float,
    with_lse: bool,
    careful: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attention over the last two axes; a row without a key gives 0."""
    if with_lse or careful:
        out, lse = masked_attention(q, k, v, mask, scale, careful=careful)
        return out, lse if with_lse else None
    out = scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
    return (out if mask is None else out.masked_fill(~mask.any(-1, keepdim=True), 0)), None


def _parts(rows: list[Row], heads: int) -> Iterator[Row]:
    """Rows of which the logits of all heads can be written out."""
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
    """Heads that share a map: ``[B, H, L, D]`` in token order, in and out."""
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
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    rows = rows_of(block_map)
    rows = list(_parts(rows, len(q))) if written_out or valid is not None else rows
    outs: list[torch.Tensor] = []
    lses: list[torch.Tensor] = []
    for group in products_of(rows, len(q), dim, valid is None):
        own_q = q[:, group[0].begin : group[-1].end]
        if group[0].keys:
            mask = mask_of(group, tiles)
            if valid is not None:
                there = keys_of(valid[..., None], group).mT
                mask = there if mask is None else mask & there
            own_q = own_q.unflatten(1, (len(group), -1))
            own = (own_q, keys_of(k, group), keys_of(v, group))
            out, lse = _attend(*own, mask, scale, with_lse, careful)
            outs.append(out.flatten(1, 2))
            lses += [] if lse is None else [lse.flatten(1, 2)]
        else:  # rows of Skip: zero, and zero gradients
            outs.append(torch.where(torch.zeros_like(own_q, dtype=torch.bool), own_q, 0))
            lses.append(own_q.new_full(own_q.shape[:2], -torch.inf, dtype=wide))
    back = None if order is None else copied_to(order, q.device).argsort()
    out = ordered(torch.cat(outs, 1)[:, None], back).view(batch, heads, length, dim)
    if not with_lse:
        return out, None
    lse = ordered(torch.cat(lses, 1)[:, None, :, None], back)
    return out, lse.view(batch, heads, length)


def _valid(
    block_map: BlockMap, valid: torch.Tensor | None, device: torch.device, heads: int
) -> torch.Tensor | None:
    """Valid keys ``[B, Lk]`` in the order of the map, of each head: ``[B * heads, Lk]``."""
    if valid is None:
        return None
    order = block_map.k_blocks.index
    valid = valid if order is None else valid.index_select(1, copied_to(order, valid.device))
    return valid.repeat_interleave(heads, 0).to(device)


def _maps_of(spec: AttentionSpec, block: tuple[int, int] | None = None) -> list[BlockMap]:
    """The block map of each head, at the block sizes of this backend."""
    longest = max(spec.layout.length, spec.key_layout.length)
    return head_maps(spec, *(block or block_sizes(longest)))


def blockwise_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    spec: AttentionSpec,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attention that computes the visited blocks; shapes and results as ``reference_attention``.

    A NaN or infinite number reaches the queries that see it and no other. On devices other than the
    CPU a search for such numbers would synchronize, so there only those past the end of a text are
    removed.

    Args:
        q: ``[B, H, Lq, D]``.
        k: ``[B, Hk, Lk, D]``.
        v: ``[B, Hk, Lk, D]``.
        spec: static patterns only; heads with equal patterns run together. ``return_lse`` is slower
            on a CPU, as torch's fused attention there returns no LSE.

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
    share = q.shape[1] // k.shape[1]
    outs: list[torch.Tensor] = []
    lses: list[torch.Tensor] = []
    heads: list[int] = []
    for block_map in distinct:
        own = [head for head, item in enumerate(maps) if item is block_map]
        heads += own
        if len(own) == len(maps) and share == 1:
            own_q, own_k, own_v = q, k, v
        else:
            at = index_on(tuple(own), q.device)
            keys = index_on(tuple(head // share for head in own), q.device)
            own_q, own_k, own_v = (x.index_select(1, i) for x, i in ((q, at), (k, keys), (v, keys)))
        out, lse = _one_map(own_q, own_k, own_v, block_map, valid, scale, with_lse, careful)
        outs.append(out)
        if lse is not None:
            lses.append(lse)
    if len(distinct) == 1:
        return outs[0], lses[0] if with_lse else None
    back = index_on(tuple(heads.index(head) for head in range(len(heads))), q.device)
    out = torch.cat(outs, 1).index_select(1, back)
    return out, torch.cat(lses, 1).index_select(1, back) if with_lse else None


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

    NaN and infinite numbers are left out of the products; they enter by p and delta of the queries
    that see them, if those have a gradient.

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
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    used = (grad_out != 0).any(-1)
    used = used if grad_lse is None else used | (grad_lse != 0)
    delta = (grad_out.to(wide) * out.to(wide)).sum(-1)
    delta = delta if grad_lse is None else delta - grad_lse.to(wide)
    delta = torch.where(used, delta, 0)
    dq, dk, dv = (torch.zeros_like(x, dtype=wide) for x in (q, k, v))
    valid = None if text_lengths is None else valid_keys(text_lengths, spec.key_layout)
    share = q.shape[1] // k.shape[1]
    for head, block_map in enumerate(maps):
        own, key = slice(head, head + 1), slice(head // share, head // share + 1)
        q_index, k_index = block_map.q_blocks.index, block_map.k_blocks.index
        b_q, b_do = (ordered(x[:, own].to(wide), q_index) for x in (q, grad_out))
        b_k, b_v = (ordered(x[:, key].to(wide), k_index) for x in (k, v))
        b_lse, b_delta, b_used = (ordered(x[:, own, :, None], q_index) for x in (lse, delta, used))
        own_q, own_k, own_v = (torch.where(x.isfinite(), x, 0) for x in (b_q, b_k, b_v))
        own_valid = _valid(block_map, valid, q.device, 1)
        tiles = copied_to(block_map.tiles[0], q.device)
        sum_q, sum_k, sum_v = (torch.zeros_like(x) for x in (b_q, b_k, b_v))
        for row in _parts(rows_of(block_map), len(b_q)):
            if not row.keys:
                continue
            place = slice(row.begin, row.end)
            all_k, row_k, row_v = (keys_of(x, [row])[:, 0] for x in (b_k, own_k, own_v))
            p = (b_q[:, place] @ all_k.mT * scale - b_lse[:, place]).exp()
            p = torch.where(b_used[:, place], p, 0)
            mask = mask_of([row], tiles)
            if mask is not None:  # a row without a key is masked whole
                p = torch.where(mask[:, 0], p, 0)
            if own_valid is not None:
                p = torch.where(keys_of(own_valid[..., None], [row])[:, 0].mT, p, 0)
            ds = p * (b_do[:, place] @ row_v.mT - b_delta[:, place]) * scale
            sum_q[:, place] = ds @ row_k
            for total, part in ((sum_k, ds.mT @ own_q[:, place]), (sum_v, p.mT @ b_do[:, place])):
                done = 0
                for begin, end in row.runs:
                    total[:, begin:end] += part[:, done : done + end - begin]
                    done += end - begin
        for total, part, place_of, index in (
            (dq, sum_q, own, q_index),
            (dk, sum_k, key, k_index),
            (dv, sum_v, key, k_index),
        ):
            back = None if index is None else copied_to(index, q.device).argsort()
            total[:, place_of] += ordered(part[:, None], back)[:, None]
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)
