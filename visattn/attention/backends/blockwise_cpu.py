"""Rows of a block map on a CPU, without gradients, with nothing copied to new memory.

torch's fused attention takes 32 queries of a row at a time where it has fewer than 192, and 64
below 768, and multiplies so few at half the rate of many. Such rows are two batched matrix
products, with the logits written out between them in memory that is used again: of so many rows at
a time that they stay in the cache. Broader rows, and 16-bit types, whose logits would be rounded,
are one fused attention.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch.nn.functional import scaled_dot_product_attention

from visattn.attention.backends.block_rows import (
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
from visattn.attention.backends.workspace import workspace
from visattn.blocks.block_map import BlockMap
from visattn.blocks.cache import grown
from visattn.runtime.torch_settings import lasting

__all__ = ["rows_on_cpu"]

NARROW = 768  # queries of a row below which its logits are written out
LEAST = (1 << 17, 1 << 18)  # of a product, without and with a mask, below which they are not
LOGITS = 1 << 21  # that are written out at a time
MASKS = 1 << 22  # elements of the masks that a map keeps
PLACES = 1 << 22  # places of keys and tokens that a program keeps
STEP_BYTES = 500  # of a step of a program without its places, about


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
        own_q, found = (x[:, step.own].unflatten(1, (len(step.rows), -1)) for x in (q, out))
        if _is_narrow(own_q, step.keys, mask):
            _written_out(own_q, own_k, own_v, mask, scale, found)
        else:
            bias = None if mask is None else mask.bias
            fused = scaled_dot_product_attention(own_q, own_k, own_v, attn_mask=bias, scale=scale)
            found.copy_(fused)
        if mask is not None and mask.blind is not None:
            found.masked_fill_(mask.blind, 0)
    return program.back(out).view(shape)


def _is_narrow(q: torch.Tensor, keys: int, mask: Mask | None) -> bool:
    """Whether the logits of a product are written out; q ``[B, rows, queries, D]``."""
    many, rows, queries, _ = q.shape
    of_row, least = queries * keys, LEAST[mask is not None]
    wide = q.dtype in (torch.float32, torch.float64)
    return wide and queries < NARROW and of_row <= LOGITS and many * rows * of_row >= least


def _written_out(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: Mask | None,
    scale: float,
    out: torch.Tensor,
) -> None:
    """``out = softmax(scale q k^T + bias) v``; a query that sees nothing gets NaN.

    Args:
        q, out: ``[B, rows, queries, D]``; k, v: ``[B, rows, keys, D]``, any strides but 1 along D.
        mask: of ``[1, rows or 1, queries, keys]``, or None.
    """
    many, rows = q.shape[:2]
    if mask is None and k.is_contiguous() and v.is_contiguous():  # copied: one batch of all
        flat = out if out.is_contiguous() else workspace("found", q, *q.shape)
        q, k, v, one = (x.reshape(many * rows, -1, q.shape[3]) for x in (q, k, v, flat))
        _batches(q, k, v, [], scale, one)
        if flat is not out:
            out.copy_(flat)
        return
    biases = [] if mask is None else [(a, b, mask.bias[0, ..., a:b]) for a, b in mask.spans]
    if rows >= many:
        for head in range(many):
            _batches(q[head], k[head], v[head], biases, scale, out[head])
        return
    for row in range(rows):
        own = [(a, b, bias[min(row, len(bias) - 1)][None]) for a, b, bias in biases]
        _batches(q[:, row], k[:, row], v[:, row], own, scale, out[:, row])


def _batches(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    biases: list[tuple[int, int, torch.Tensor]],
    scale: float,
    out: torch.Tensor,
) -> None:
    """The same of ``[n, queries, D]`` and ``[n, keys, D]``; biases: first key, last one and one
    more, and what is added there, ``[n or 1, queries, keys]``."""
    queries, keys = q.shape[1], k.shape[1]
    times = -(-len(q) * queries * keys // LOGITS)
    step = -(-len(q) // times)  # evenly: few rows at a time are slow
    for begin in range(0, len(q), step):
        part = slice(begin, begin + step)
        logits = workspace("logits", q, len(q[part]), queries, keys)
        torch.baddbmm(logits, q[part], k[part].mT, beta=0, alpha=scale, out=logits)
        for first, end, bias in biases:
            logits[..., first:end] += bias if len(bias) == 1 else bias[part]
        torch.softmax(logits, -1, out=logits)
        torch.bmm(logits, v[part], out=out[part])


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
    """What a call by a map does, but for the values: worked out once for a number of heads.

    Attributes:
        orders: of queries and keys, as in the blocks of the map.
        nbytes: that it takes, about.
    """

    def __init__(self, block_map: BlockMap, batch: int, heads: int, dim: int) -> None:
        self.batch, self.heads = batch, heads
        self.orders = {"q": block_map.q_blocks.index, "k": block_map.k_blocks.index}
        self.length = block_map.kv_layout.length
        self.kept = self.nbytes = 0
        self._places: dict[str, torch.Tensor] = {}
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
            self.nbytes += places.nbytes
        self.nbytes += STEP_BYTES + 8 * len(rows)
        return _Step(
            rows,
            slice(rows[0].begin, rows[-1].end),
            rows[0].keys,
            tiles if rows[0].tiles else (),
            places,
            count * dim if copied else 0,
        )

    @lasting
    def ordered(self, side: str, x: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        """As ``rows.ordered``, with places that are worked out once."""
        order, by_token = self.orders[side], x.transpose(1, 2)
        beside = self.heads > 1 and by_token.is_contiguous()
        if not beside or x.numel() // x.shape[3] > PLACES:
            return ordered(x, order, out)
        if side not in self._places:
            index = torch.arange(x.shape[2], device="cpu") if order is None else order
            first = torch.arange(self.batch, device="cpu")[:, None] * x.shape[2] * self.heads
            first = first + torch.arange(self.heads, device="cpu")
            self._keep(side, (first[..., None] + index * self.heads).flatten())
        places = self._places[side]
        found = torch.index_select(by_token.view(-1, x.shape[3]), 0, places, out=out)
        return found.view(-1, x.shape[2], x.shape[3])

    @lasting
    def back(self, out: torch.Tensor) -> torch.Tensor:
        """``[B * H, L, D]`` in token order."""
        order = self.orders["q"]
        if order is None:
            return out
        if out.numel() // out.shape[2] > PLACES:
            return ordered(out[:, None], order.argsort())
        if "out" not in self._places:
            first = torch.arange(len(out), device="cpu")[:, None] * out.shape[1]
            self._keep("out", (first + order.argsort()).flatten())
        places = self._places["out"]
        return torch.index_select(out.view(-1, out.shape[2]), 0, places).view(out.shape)


    def _keep(self, name: str, places: torch.Tensor) -> None:
        self._places[name] = places
        self.nbytes += places.nbytes
        grown()


class _Programs:
    """The last two of a map: a layer runs it on some of its heads, another on all."""

    def __init__(self) -> None:
        self.found: dict[tuple[int, int, int], _Program] = {}

    @property
    def nbytes(self) -> int:
        return sum(program.nbytes for program in tuple(self.found.values()))


@lasting
def _program(block_map: BlockMap, batch: int, heads: int, dim: int) -> _Program:
    """Of a map, made once for a number of heads."""
    own = block_map.of_map("programs", _Programs).found
    if (batch, heads, dim) not in own:
        while len(own) >= 2:
            own.pop(next(iter(own)))
        own[batch, heads, dim] = _Program(block_map, batch, heads, dim)
        grown()
    return own[batch, heads, dim]


class _Masks:
    """The masks of a map's products in a dtype. They are kept while they are few, else only the
    last one, as neighbours often have the same."""

    def __init__(self, tiles: torch.Tensor, dtype: torch.dtype) -> None:
        self.tiles, self.dtype = tiles, dtype
        self.found: dict[tuple[tuple[tuple[int, int, int], ...], ...], Mask] = {}
        self.numel = self.nbytes = 0

    @lasting
    def of(
        self, rows: list[Row], own: tuple[tuple[tuple[int, int, int], ...], ...]
    ) -> Mask | None:
        if not own:
            return None
        if own not in self.found:
            kept = mask_of(rows, self.tiles)
            assert kept is not None
            if self.numel + kept.numel() > MASKS:
                self.found, self.numel, self.nbytes = {}, 0, 0
            mask = self.found[own] = Mask.of(kept, self.dtype)
            self.numel += kept.numel()
            self.nbytes += mask.nbytes
            grown()
        return self.found[own]


def _masks(block_map: BlockMap, dtype: torch.dtype) -> _Masks:
    """Of a map, made once."""
    return block_map.of_map(("masks", dtype), lambda: _Masks(block_map.tiles[0], dtype))
