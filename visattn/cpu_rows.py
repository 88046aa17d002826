"""Rows of a block map on a CPU, without gradients: each product is one scaled dot product attention
of torch, with nothing copied to new memory.

Logits that are written out between two matrix products (``baddbmm``, ``softmax``, ``bmm``, with
masks added only where they are) were tried for narrow rows and are no faster.
"""

from __future__ import annotations

from typing import NamedTuple
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
    places_of,
    products_of,
    rows_of,
    window_of,
)
from visattn.workspace import workspace

__all__ = ["rows_on_cpu"]

MASKS = 1 << 21  # elements of the masks that a map keeps
PLACES = 1 << 22  # places of keys and tokens that a program keeps


def rows_on_cpu(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, block_map: BlockMap, scale: float
) -> torch.Tensor:
    """``[B, H, L, D]`` in token order, in and out, of heads that share a map."""
    shape, order = q.shape, block_map.q_blocks.index
    program = _program(block_map, shape[0], shape[1], shape[3])
    q = program.ordered("q", q, workspace("q", q, q.numel() // shape[3], shape[3]))
    k, v = (
        program.ordered("k", x, workspace(name, x, x.numel() // shape[3], shape[3]))
        for name, x in (("k", k), ("v", v))
    )
    out = torch.empty_like(q) if order is None else workspace("out", q, *q.shape)
    masks = _masks(block_map, q.dtype)
    for step in program.steps:
        if not step.keys:  # rows of Skip
            out[:, step.own] = 0
            continue
        mask = masks.of(step.rows, step.tiles)
        own_k, own_v = step.take("keys", k), step.take("values", v)
        found = scaled_dot_product_attention(
            q[:, step.own].unflatten(1, (len(step.rows), -1)),
            own_k,
            own_v,
            attn_mask=None if mask is None else mask.bias,
            scale=scale,
        )
        if mask is not None and mask.blind is not None:
            found = found.masked_fill(mask.blind, 0)
        out[:, step.own] = found.flatten(1, 2)
    return program.back(out).view(shape)


class _Step(NamedTuple):
    """A product of rows of one shape.

    Attributes:
        rows: the rows; own: their queries; keys: of each.
        tiles: of their masks, once where they are alike; empty: nothing is masked.
        places: of their keys among those of all heads, where they are copied and not too many.
        copied: elements that are; 0 where keys are a window.
    """

    rows: list[Row]
    own: slice
    keys: int
    tiles: tuple[tuple[tuple[int, int, int], ...], ...]
    places: torch.Tensor | None
    copied: int

    def take(self, name: str, x: torch.Tensor) -> torch.Tensor:
        """What the rows see of ``[B, L, D]``, ``[B, rows, keys, D]``."""
        scratch = workspace(name, x, self.copied)
        if self.places is None:
            return keys_of(x, self.rows, scratch)
        shape = (len(x), len(self.rows), self.keys, x.shape[2])
        out = scratch.view(-1, x.shape[2])
        return torch.index_select(x.view(-1, x.shape[2]), 0, self.places, out=out).view(shape)


class _Program:
    """What a call by a map does, but for the values: worked out once for a number of heads."""

    def __init__(self, block_map: BlockMap, batch: int, heads: int, dim: int) -> None:
        self.block_map, self.batch, self.heads = block_map, batch, heads
        self.length = block_map.kv_layout.length
        self.kept = 0
        self._places: dict[tuple[str, bool], torch.Tensor] = {}
        many = batch * heads
        self.steps = [
            self._step(rows, many, dim)
            for rows in products_of(rows_of(block_map), many, dim, True)
        ]

    def _step(self, rows: list[Row], many: int, dim: int) -> _Step:
        tiles = tuple(row.tiles for row in rows)
        tiles = tiles[:1] if alike_masks(rows) else tiles
        count = many * len(rows) * rows[0].keys
        copied = bool(rows[0].keys) and window_of(rows) is None
        places = None
        if copied and self.kept + count <= PLACES:
            self.kept += count
            first = torch.arange(many)[:, None] * self.length
            places = (first + torch.cat([places_of(row) for row in rows])).flatten()
        return _Step(
            rows,
            slice(rows[0].begin, rows[-1].end),
            rows[0].keys,
            tiles if rows[0].tiles else (),
            places,
            count * dim if copied else 0,
        )

    def ordered(self, side: str, x: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        """As ``rows.ordered``, with places that are worked out once."""
        blocks = self.block_map.q_blocks if side == "q" else self.block_map.k_blocks
        by_token = x.transpose(1, 2)
        beside = self.heads > 1 and by_token.is_contiguous()
        if not beside or x.numel() // x.shape[3] > PLACES:
            return ordered(x, blocks.index, out)
        if (side, beside) not in self._places:
            index = torch.arange(x.shape[2]) if blocks.index is None else blocks.index
            first = torch.arange(self.batch)[:, None] * x.shape[2] * self.heads
            first = first + torch.arange(self.heads)
            self._places[side, beside] = (first[..., None] + index * self.heads).flatten()
        places = self._places[side, beside]
        found = torch.index_select(by_token.view(-1, x.shape[3]), 0, places, out=out)
        return found.view(-1, x.shape[2], x.shape[3])

    def back(self, out: torch.Tensor) -> torch.Tensor:
        """``[B * H, L, D]`` in token order."""
        order = self.block_map.q_blocks.index
        if order is None:
            return out
        if out.numel() // out.shape[2] > PLACES:
            return ordered(out[:, None], order.argsort())
        if ("out", False) not in self._places:
            first = torch.arange(len(out))[:, None] * out.shape[1]
            self._places["out", False] = (first + order.argsort()).flatten()
        places = self._places["out", False]
        return torch.index_select(out.view(-1, out.shape[2]), 0, places).view(out.shape)


_PROGRAMS: WeakKeyDictionary[BlockMap, dict[tuple[int, int, int], _Program]] = WeakKeyDictionary()


def _program(block_map: BlockMap, batch: int, heads: int, dim: int) -> _Program:
    """Of a map, made once for a number of heads; that of the last one is kept."""
    own = _PROGRAMS.setdefault(block_map, {})
    if (batch, heads, dim) not in own:
        while len(own) >= 2:  # a layer runs a map on some of its heads, another on all
            own.pop(next(iter(own)))
        own[batch, heads, dim] = _Program(block_map, batch, heads, dim)
    return own[batch, heads, dim]


class _Masks:
    """The masks of a map's products in a dtype. They are kept while they are few, else only the
    last one, as neighbours often have the same."""

    def __init__(self, tiles: torch.Tensor, dtype: torch.dtype) -> None:
        self.tiles, self.dtype = tiles, dtype
        self.found: dict[tuple[tuple[tuple[int, int, int], ...], ...], Mask] = {}
        self.numel = 0

    def of(
        self, rows: list[Row], own: tuple[tuple[tuple[int, int, int], ...], ...]
    ) -> Mask | None:
        if not own:
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
