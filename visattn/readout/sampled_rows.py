"""A stratified sample of query rows and their exact softmax, never a whole attention map.

Rows are drawn as whole tiles of queries, or some rows of each, because a block-sparse kernel keeps
key tiles for a whole query tile. ``R`` sampled rows, ``L`` tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import NamedTuple

import torch

from visattn._arguments import check_count
from visattn.geometry.layout import Grid, TokenLayout, on_cpu
from visattn.geometry.orders import HilbertOrder, SequenceBlocks
from visattn.readout.tiles import Tiling
from visattn.runtime.torch_settings import lasting, plain_torch

__all__ = ["MAX_BYTES", "RowChunk", "RowSample", "TileSample", "attention_rows", "draw_rows"]

MAX_BYTES = 64 << 20  # of the largest tensor that reading rows makes


@dataclass(frozen=True, eq=False)
class TileSample:
    """Sampled query tiles of one tiling, ``n`` of them.

    Attributes:
        tiling, blocks: how the sequence is cut, and its tiles.
        tiles: numbers of the sampled tiles among ``blocks``, int64 ``[n]``, in the order in which
            the curve of ``draw_rows`` passes them.
        members: where the rows of each tile stand in the sample, int64 ``[n, rows]``.
        exists: which of ``members`` are there, bool ``[n, rows]``; a cut tile has fewer.
    """

    tiling: Tiling
    blocks: SequenceBlocks
    tiles: torch.Tensor
    members: torch.Tensor
    exists: torch.Tensor


@dataclass(frozen=True, eq=False)
class RowSample:
    """Sampled query rows of one grid of a layout.

    Attributes:
        layout: of the sequence.
        number: which of its grids the queries are in.
        tokens: the rows, ascending int64 ``[R]``; each is read once, whatever tiles it is in.
        samples: the tiles that they make up, one entry for each tiling.
    """

    layout: TokenLayout
    number: int
    tokens: torch.Tensor
    samples: tuple[TileSample, ...]

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def grid(self) -> Grid:
        return self.layout.grids[self.number][1]

    @property
    def start(self) -> int:
        """First token of the grid."""
        return self.layout.grids[self.number][0]

    @cached_property
    @lasting
    def places(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """``(t, h, w)`` of the rows, int64 ``[R]`` each."""
        return self.grid.coordinates(self.tokens - self.start)


class RowChunk(NamedTuple):
    """Some rows of some heads.

    Attributes:
        heads, rows: which heads of ``q``, which rows of the sample.
        weights: their softmax over all keys, float32 ``[h, r, L]``.
        lse: log of the sum of the exponentials of the logits, natural, float32 ``[h, r]``.
    """

    heads: slice
    rows: slice
    weights: torch.Tensor
    lse: torch.Tensor


def draw_rows(
    layout: TokenLayout,
    tilings: Sequence[Tiling],
    *,
    tiles: int = 6,
    rows_per_tile: int | None = None,
    seed: int = 0,
    number: int = 0,
) -> RowSample:
    """Draw query tiles that are spread over a grid.

    For each tiling, the tiles are strung on a Hilbert curve through the grid of tiles (runs on
    their line), the curve is closed to a ring and turned by a random number of tiles, cut into
    ``tiles`` arcs that are equal within one tile, and one tile is drawn from each arc. Every tile,
    and so every token, is drawn with the same probability.

    Args:
        layout: what the tokens are.
        tilings: at least one; the rows are those of the sampled tiles of all of them.
        tiles: query tiles of each tiling, at least 1; where a grid has no more, all are taken.
        rows_per_tile: random rows of each tile instead of all. Means over a tile's rows are then
            noisier, and look more concentrated than they are.
        seed: of the draw; the same arguments give the same rows.
        number: which grid of the layout the queries are in. Text queries are not sampled.

    Raises:
        TypeError, ValueError: an argument is wrong, or the layout has no such grid.
    """
    check_count("tiles", tiles, 1)
    check_count("seed", seed, 0)
    if rows_per_tile is not None:
        check_count("rows_per_tile", rows_per_tile, 1)
    if check_count("number", number, 0) >= len(layout.grids):
        raise ValueError(f"number={number} must be below the {len(layout.grids)} grids of {layout}")
    if not tilings or not all(isinstance(tiling, Tiling) for tiling in tilings):
        raise TypeError(f"tilings={tilings!r} must be a sequence of at least one Tiling")
    return _draw(layout, tuple(tilings), tiles, rows_per_tile, seed, number)


@lru_cache(maxsize=16)
@on_cpu
def _draw(
    layout: TokenLayout,
    tilings: tuple[Tiling, ...],
    tiles: int,
    rows_per_tile: int | None,
    seed: int,
    number: int,
) -> RowSample:
    generator = torch.Generator().manual_seed(seed)
    grid = layout.grids[number][1]
    drawn = []
    for tiling in tilings:
        blocks, count = tiling.blocks(layout), tiling.count(grid)
        first = blocks.first[number]
        chosen = first + _along_curve(count, tiles, generator)
        tokens, exists = blocks.tokens(chosen)
        if rows_per_tile is not None and rows_per_tile < tokens.shape[1]:
            luck = torch.rand(tokens.shape, generator=generator).masked_fill(~exists, 2.0)
            kept = luck.argsort(1)[:, :rows_per_tile].sort(1).values
            tokens, exists = tokens.gather(1, kept), exists.gather(1, kept)
        drawn.append((tiling, blocks, chosen, tokens, exists))
    rows = torch.cat([tokens[exists] for *_, tokens, exists in drawn]).unique()
    samples = tuple(
        TileSample(
            tiling,
            blocks,
            chosen,
            torch.searchsorted(rows, tokens).clamp(max=len(rows) - 1),
            exists,
        )
        for tiling, blocks, chosen, tokens, exists in drawn
    )
    return RowSample(layout, number, rows, samples)


def _along_curve(count: Grid, tiles: int, generator: torch.Generator) -> torch.Tensor:
    """Up to ``tiles`` numbers of tiles of a grid of tiles, one from each arc of the curve."""
    curve = HilbertOrder().index(count)
    if tiles >= len(curve):
        return curve
    turn = int(torch.randint(len(curve), (), generator=generator))
    edges = torch.arange(tiles + 1) * len(curve) // tiles
    luck = torch.rand(tiles, generator=generator, dtype=torch.float64)
    places = edges[:-1] + (luck * (edges[1:] - edges[:-1])).long()
    return curve[(places + turn) % len(curve)]


def attention_rows(
    q: torch.Tensor,
    k: torch.Tensor,
    rows: torch.Tensor,
    *,
    scale: float | None = None,
    valid: torch.Tensor | None = None,
    max_bytes: int = MAX_BYTES,
) -> Iterator[RowChunk]:
    """The exact softmax of some query rows, in chunks.

    ``weights[h, r] = softmax(scale * q[h, rows[r]] @ k[h'].T)`` in float32, multiplied as torch is
    set to multiply float32 matrices; ``h'`` is the key head that query head ``h`` shares with its
    neighbours.

    Args:
        q: ``[H, L, D]`` of one sample, any dtype and device; k: ``[Hk, L, D]``, ``Hk`` divides
            ``H``.
        rows: int64 ``[R]``, for example ``RowSample.tokens``.
        scale: of the logits; None is ``D ** -0.5``.
        valid: keys that are seen, bool ``[L]``; the others have weight 0. None: all are.
        max_bytes: no tensor is made that is larger, unless one row is.

    Yields:
        Chunks that cover all heads and rows, heads outermost.

    Raises:
        ValueError: the tensors do not fit each other.
    """
    if q.ndim != 3 or k.ndim != 3 or q.shape[2] != k.shape[2] or q.shape[0] % k.shape[0]:
        raise ValueError(
            f"q of shape {list(q.shape)} must be [H, L, D], and k of shape {list(k.shape)} "
            "[Hk, L, D] with the same D and an Hk that divides H"
        )
    factor = q.shape[2] ** -0.5 if scale is None else scale
    heads, tokens, group = q.shape[0], k.shape[1], q.shape[0] // k.shape[0]
    count = min(len(rows), max(1, max_bytes // (4 * tokens)))
    wide = max(1, min(max_bytes // (4 * tokens * max(count, q.shape[2])), heads))
    span = max(1, max_bytes // (4 * wide * q.shape[2]))  # of keys converted at a time
    rows = rows.to(q.device)
    unseen = None if valid is None else ~valid.to(q.device)
    for head in range(0, heads, wide):
        own = slice(head, min(head + wide, heads))
        shared = torch.arange(own.start, own.stop, device=q.device) // group
        for row in range(0, len(rows), count):
            part = slice(row, min(row + count, len(rows)))
            queries = q[own, rows[part]].float() * factor
            yield RowChunk(own, part, *_softmax(queries, k, shared, span, unseen))


@plain_torch()
def _softmax(
    queries: torch.Tensor,
    k: torch.Tensor,
    heads: torch.Tensor,
    span: int,
    unseen: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights and LSE of queries ``[h, r, D]`` that are multiplied by the factor already, by the
    key heads ``heads``, ``span`` keys at a time."""
    weights = torch.empty(*queries.shape[:2], k.shape[1], device=k.device)
    for key in range(0, k.shape[1], span):
        near = slice(key, key + span)
        weights[..., near] = queries @ k[heads, near].float().transpose(1, 2)
    if unseen is not None:
        weights.masked_fill_(unseen, -torch.inf)
    top = weights.amax(-1, keepdim=True)
    total = weights.sub_(top).exp_().sum(-1, keepdim=True)
    return weights.div_(total), (top + total.log()).squeeze(-1)
