"""Rows of a block map on a CPU, without gradients: each product is one scaled dot product attention
of torch, with nothing copied to new memory.

Logits that are written out between two matrix products (``baddbmm``, ``softmax``, ``bmm``, with
masks added only where they are) were tried for narrow rows and are no faster.
"""

from __future__ import annotations

from weakref import WeakKeyDictionary

import torch
from torch.nn.functional import scaled_dot_product_attention

from visattn.blockmap import BlockMap
from visattn.rows import (
    Mask,
    Row,
    alike_masks,
    keys_of,
    mask_of,
    ordered,
    products_of,
    rows_of,
    window_of,
)
from visattn.workspace import workspace

__all__ = ["rows_on_cpu"]

MASKS = 1 << 21  # elements of the masks that a map keeps


def rows_on_cpu(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, block_map: BlockMap, scale: float
) -> torch.Tensor:
    """``[B, H, L, D]`` in token order, in and out, of heads that share a map."""
    shape, order = q.shape, block_map.q_blocks.index
    q = ordered(q, order, workspace("q", q, q.numel() // shape[3], shape[3]))
    k, v = (
        ordered(x, block_map.k_blocks.index, workspace(name, x, x.numel() // shape[3], shape[3]))
        for name, x in (("k", k), ("v", v))
    )
    out = torch.empty_like(q) if order is None else workspace("out", q, *q.shape)
    masks = _masks(block_map, q.dtype)
    for group in products_of(rows_of(block_map), len(q), shape[3], True):
        own = slice(group[0].begin, group[-1].end)
        if not group[0].keys:  # rows of Skip
            out[:, own] = 0
        else:
            mask = masks.of(group)
            own_k, own_v = _keys(k, v, group)
            found = scaled_dot_product_attention(
                q[:, own].unflatten(1, (len(group), -1)),
                own_k,
                own_v,
                attn_mask=None if mask is None else mask.bias,
                scale=scale,
            )
            if mask is not None and mask.blind is not None:
                found = found.masked_fill(mask.blind, 0)
            out[:, own] = found.flatten(1, 2)
    back = None if order is None else order.argsort()
    return ordered(out[:, None], back).view(shape)


def _keys(k: torch.Tensor, v: torch.Tensor, rows: list[Row]) -> tuple[torch.Tensor, torch.Tensor]:
    """What rows of one shape see, ``[B, rows, keys, D]``."""
    copied = 0 if window_of(rows) else len(k) * len(rows) * rows[0].keys * k.shape[2]
    keys, values = (workspace(name, k, copied) for name in ("keys", "values"))
    return keys_of(k, rows, keys), keys_of(v, rows, values)


class _Masks:
    """The masks of a map's products in a dtype. They are kept while they are few, else only the
    last one, as neighbours often have the same."""

    def __init__(self, tiles: torch.Tensor, dtype: torch.dtype) -> None:
        self.tiles, self.dtype = tiles, dtype
        self.found: dict[tuple[tuple[tuple[int, int, int], ...], ...], Mask] = {}
        self.numel = 0

    def of(self, rows: list[Row]) -> Mask | None:
        own = tuple(row.tiles for row in rows)
        own = own[:1] if alike_masks(rows) else own
        if not own[0]:
            return None
        if own not in self.found:
            kept = mask_of(rows, self.tiles)
            assert kept is not None
            if self.numel + kept.numel() > MASKS:
                self.found, self.numel = {}, 0
            self.found[own] = Mask.of(kept, self.dtype)
            self.numel += kept.numel()
        return self.found[own]


_MASKS: WeakKeyDictionary[BlockMap, dict[torch.dtype, _Masks]] = WeakKeyDictionary()


def _masks(block_map: BlockMap, dtype: torch.dtype) -> _Masks:
    """Of a map, made once."""
    own = _MASKS.setdefault(block_map, {})
    return own.setdefault(dtype, _Masks(block_map.tiles[0], dtype))
