"""Rows of a block map on a CPU, without gradients. Copies go into reused memory.

torch's fused attention processes 32 queries of a row at a time if the row has fewer than 192, and
64 if it has fewer than 768. Matrix products with so few queries run at half the rate of larger
ones. Such rows are computed by two batched matrix products. The logits between them are written to
reused memory, for as many rows at a time as fit the cache. Longer rows use the fused attention, as
do 16-bit types, whose logits would be rounded.
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

NARROW = 768  # logits are written to memory for rows with fewer queries
LEAST = (1 << 17, 1 << 18)  # and products with at least this many logits: (without, with) a mask
LOGITS = 1 << 21  # limit of the logits in memory at a time
MASKS = 1 << 22  # limit of the mask elements that are stored with a map
PLACES = 1 << 22  # limit of the positions that a program stores
STEP_BYTES = 500  # approximate size of a step of a program, without its positions


def rows_on_cpu(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, block_map: BlockMap, scale: float
) -> torch.Tensor:
    """Compute heads that share a map; inputs and output ``[B, H, L, D]`` in token order."""
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
            out[:, step.queries] = 0
            continue
        mask = masks.of(step.rows, step.tiles)
        step_k, step_v = step.take("keys", k), step.take("values", v)
        step_q, step_out = (x[:, step.queries].unflatten(1, (len(step.rows), -1)) for x in (q, out))
        if _is_narrow(step_q, step.keys, mask):
            _written_out(step_q, step_k, step_v, mask, scale, step_out)
        else:
            bias = None if mask is None else mask.bias
            fused = scaled_dot_product_attention(
                step_q, step_k, step_v, attn_mask=bias, scale=scale
            )
            step_out.copy_(fused)
        if mask is not None and mask.blind is not None:
            step_out.masked_fill_(mask.blind, 0)
    return program.back(out).view(shape)


def _is_narrow(q: torch.Tensor, keys: int, mask: Mask | None) -> bool:
    """Return whether the logits of a product are written to memory; q ``[B, rows, queries, D]``."""
    batch, rows, queries, _ = q.shape
    row_logits, least = queries * keys, LEAST[mask is not None]
    is_float = q.dtype in (torch.float32, torch.float64)
    fits = queries < NARROW and row_logits <= LOGITS
    return is_float and fits and batch * rows * row_logits >= least


def _written_out(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: Mask | None,
    scale: float,
    out: torch.Tensor,
) -> None:
    """Compute ``out = softmax(scale q k^T + bias) v``; a query without a key gets NaN.

    Args:
        q: ``[B, rows, queries, D]``; all tensors have stride 1 along D and any other strides.
        k: ``[B, rows, keys, D]``.
        v: ``[B, rows, keys, D]``.
        mask: mask of shape ``[1, rows or 1, queries, keys]``, or None.
        scale: factor of the logits.
        out: the result is written here, ``[B, rows, queries, D]``.
    """
    batch, rows = q.shape[:2]
    if mask is None and k.is_contiguous() and v.is_contiguous():  # copied keys: one batch for all
        flat = out if out.is_contiguous() else workspace("flat_out", q, *q.shape)
        q, k, v, flat_out = (x.reshape(batch * rows, -1, q.shape[3]) for x in (q, k, v, flat))
        _batches(q, k, v, [], scale, flat_out)
        if flat is not out:
            out.copy_(flat)
        return
    biases = [] if mask is None else [(a, b, mask.bias[0, ..., a:b]) for a, b in mask.spans]
    if rows >= batch:
        for head in range(batch):
            _batches(q[head], k[head], v[head], biases, scale, out[head])
        return
    for row in range(rows):
        row_biases = [(a, b, bias[min(row, len(bias) - 1)][None]) for a, b, bias in biases]
        _batches(q[:, row], k[:, row], v[:, row], row_biases, scale, out[:, row])


def _batches(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    biases: list[tuple[int, int, torch.Tensor]],
    scale: float,
    out: torch.Tensor,
) -> None:
    """Compute ``_written_out`` for q ``[n, queries, D]`` and k, v ``[n, keys, D]``.

    ``biases`` holds (first key, last key + 1, bias added to these logits ``[n or 1, queries,
    keys]``).
    """
    queries, keys = q.shape[1], k.shape[1]
    num_chunks = -(-len(q) * queries * keys // LOGITS)
    step = -(-len(q) // num_chunks)  # evenly: few rows at a time are slow
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
        rows: the rows.
        queries: their queries.
        keys: number of keys of each row.
        tiles: ``Row.tiles`` of the rows, one entry if all are equal; empty: no mask.
        places: positions of their keys in the keys of all heads, if they are copied and fit the
            limit ``PLACES``; else None.
        copied: number of copied elements; 0 if the keys are windows.
    """

    rows: list[Row]
    queries: slice
    keys: int
    tiles: tuple[tuple[tuple[int, int, int], ...], ...]
    places: torch.Tensor | None
    copied: int

    def take(self, name: str, x: torch.Tensor) -> torch.Tensor:
        """Return the keys of the rows, ``[B, rows, keys, D]``, from ``x`` ``[B, L, D]``."""
        scratch = workspace(name, x, self.copied)
        if self.places is None:
            return keys_of(x, self.rows, scratch)
        shape = (len(x), len(self.rows), self.keys, x.shape[2])
        out = scratch.view(-1, x.shape[2])
        return torch.index_select(x.view(-1, x.shape[2]), 0, self.places, out=out).view(shape)


class _Program:
    """The steps of a call with a block map: all that does not depend on the values of q, k and v.
    It is computed once per batch size, number of heads and head size.

    Attributes:
        orders: token orders of the queries ("q") and keys ("k") in the blocks of the map.
        nbytes: its approximate size in bytes.
    """

    def __init__(self, block_map: BlockMap, batch: int, heads: int, dim: int) -> None:
        self.batch, self.heads = batch, heads
        self.orders = {"q": block_map.q_blocks.index, "k": block_map.k_blocks.index}
        self.length = block_map.kv_layout.length
        self.kept = self.nbytes = 0
        self._places: dict[str, torch.Tensor] = {}
        num_heads = batch * heads
        self.steps = [
            self._step(rows, num_heads, dim)
            for rows in products_of(rows_of(block_map), num_heads, dim, True)
        ]

    def _step(self, rows: list[Row], num_heads: int, dim: int) -> _Step:
        tiles = tuple(row.tiles for row in rows)
        tiles = tiles[:1] if alike_masks(rows) else tiles
        count = num_heads * len(rows) * rows[0].keys
        copied = bool(rows[0].keys) and window_of(rows) is None
        places = None
        if copied and self.kept + count <= PLACES:
            self.kept += count
            first = torch.arange(num_heads)[:, None] * self.length
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
        """Return ``block_rows.ordered``, with positions that are computed once."""
        order, by_token = self.orders[side], x.transpose(1, 2)
        token_major = self.heads > 1 and by_token.is_contiguous()
        if not token_major or x.numel() // x.shape[3] > PLACES:
            return ordered(x, order, out)
        if side not in self._places:
            index = torch.arange(x.shape[2], device="cpu") if order is None else order
            first = torch.arange(self.batch, device="cpu")[:, None] * x.shape[2] * self.heads
            first = first + torch.arange(self.heads, device="cpu")
            self._keep(side, (first[..., None] + index * self.heads).flatten())
        places = self._places[side]
        rows = torch.index_select(by_token.view(-1, x.shape[3]), 0, places, out=out)
        return rows.view(-1, x.shape[2], x.shape[3])

    @lasting
    def back(self, out: torch.Tensor) -> torch.Tensor:
        """Return ``[B * H, L, D]`` in token order."""
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
    """The last two programs of a map: one layer may use the map for some heads, another for all."""

    def __init__(self) -> None:
        self.by_shape: dict[tuple[int, int, int], _Program] = {}

    @property
    def nbytes(self) -> int:
        return sum(program.nbytes for program in tuple(self.by_shape.values()))


@lasting
def _program(block_map: BlockMap, batch: int, heads: int, dim: int) -> _Program:
    """Return the program of a map for a batch size, number of heads and head size."""
    programs = block_map.of_map("programs", _Programs).by_shape
    if (batch, heads, dim) not in programs:
        while len(programs) >= 2:
            programs.pop(next(iter(programs)))
        programs[batch, heads, dim] = _Program(block_map, batch, heads, dim)
        grown()
    return programs[batch, heads, dim]


class _Masks:
    """The masks of a map's products in a dtype. All are stored while they fit ``MASKS``; after
    that the store restarts with the newest one, because adjacent products often share a mask."""

    def __init__(self, tiles: torch.Tensor, dtype: torch.dtype) -> None:
        self.tiles, self.dtype = tiles, dtype
        self.by_tiles: dict[tuple[tuple[tuple[int, int, int], ...], ...], Mask] = {}
        self.numel = self.nbytes = 0

    @lasting
    def of(
        self, rows: list[Row], tiles: tuple[tuple[tuple[int, int, int], ...], ...]
    ) -> Mask | None:
        if not tiles:
            return None
        if tiles not in self.by_tiles:
            kept = mask_of(rows, self.tiles)
            assert kept is not None
            if self.numel + kept.numel() > MASKS:
                self.by_tiles, self.numel, self.nbytes = {}, 0, 0
            mask = self.by_tiles[tiles] = Mask.of(kept, self.dtype)
            self.numel += kept.numel()
            self.nbytes += mask.nbytes
            grown()
        return self.by_tiles[tiles]


def _masks(block_map: BlockMap, dtype: torch.dtype) -> _Masks:
    """Return the masks of a map in a dtype; the object is created once per map."""
    return block_map.of_map(("masks", dtype), lambda: _Masks(block_map.tiles[0], dtype))
