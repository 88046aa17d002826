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

MAX_BYTES = 64 << 20  # size of the largest temporary tensor of attention_rows


@dataclass(frozen=True, eq=False)
class TileSample:
    """Sampled query tiles of one tiling, ``n`` of them.

    Attributes:
        tiling: how the sequence is cut into tiles.
        blocks: all tiles of the sequence.
        tiles: numbers of the sampled tiles among ``blocks``, int64 ``[n]``, in the order in which
            the curve of ``draw_rows`` passes them.
        members: index in the sample of each row of each tile, int64 ``[n, rows]``.
        exists: which of ``members`` are real rows, bool ``[n, rows]``; tiles cut at a border have
            fewer rows.

    Example:
        >>> from visattn import Grid, TokenLayout
        >>> from visattn.readout import Tiling, draw_rows
        >>> sample = draw_rows(TokenLayout(Grid(2, 4, 4)), [Tiling((1, 2, 2))], tiles=3)
        >>> sample.samples[0].members.shape
        torch.Size([3, 4])
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
        layout: the segments of the sequence.
        number: number of the grid that the queries are in.
        tokens: the rows, ascending int64 ``[R]``; each is read once, whatever tiles it is in.
        samples: the sampled tiles, one entry for each tiling.

    Example:
        >>> from visattn import Grid, TokenLayout
        >>> from visattn.readout import Tiling, draw_rows
        >>> sample = draw_rows(TokenLayout(Grid(2, 4, 4)), [Tiling(16)], tiles=1)
        >>> len(sample), sample.start
        (16, 0)
    """

    layout: TokenLayout
    number: int
    tokens: torch.Tensor
    samples: tuple[TileSample, ...]

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def grid(self) -> Grid:
        """The grid that the queries are in."""
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
        heads: the heads of ``q``.
        rows: the rows of the sample.
        weights: their softmax over all keys, float32 ``[h, r, L]``.
        lse: natural logarithm of the sum of exponentials of the logits, float32 ``[h, r]``.

    Example:
        >>> import torch
        >>> from visattn.readout import attention_rows
        >>> q = k = torch.randn(2, 32, 8)
        >>> [chunk] = attention_rows(q, k, torch.tensor([0, 5, 9]))
        >>> chunk.weights.shape, chunk.lse.shape
        (torch.Size([2, 3, 32]), torch.Size([2, 3]))
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

    For each tiling, the tiles are ordered along a Hilbert curve (runs along their line). The order
    is closed to a ring, rotated by a random number of tiles, and cut into ``tiles`` arcs whose
    lengths differ by at most one tile. One tile is drawn from each arc. Every tile, and so every
    token, is drawn with the same probability.

    Args:
        layout: the segments of the sequence.
        tilings: at least one; the rows are those of the sampled tiles of all of them.
        tiles: query tiles of each tiling, at least 1; if the grid has fewer, all are taken.
        rows_per_tile: random rows of each tile instead of all. Means over a tile's rows are then
            noisier, and look more concentrated than they are.
        seed: seed of the draw; the same arguments give the same rows.
        number: number of the grid that the queries are in. Text queries are not sampled.

    Returns:
        The sampled rows and tiles.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: an argument is out of range, or the layout has no such grid.

    Example:
        >>> from visattn import Grid, TokenLayout
        >>> from visattn.readout import Tiling, draw_rows
        >>> layout = TokenLayout(Grid(2, 4, 4), text_after=8)
        >>> draw_rows(layout, [Tiling((1, 2, 2))], tiles=3).tokens.shape
        torch.Size([12])
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
    """Return up to ``tiles`` numbers of tiles, one from each arc of the curve."""
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
    """Compute the exact softmax of some query rows, in chunks.

    ``weights[h, r] = softmax(scale * q[h, rows[r]] @ k[h'].T)`` in float32, with torch's current
    precision setting for float32 matrix products. ``h'`` is the key head of query head ``h``.

    Args:
        q: queries of one batch item, ``[H, L, D]``, any dtype and device.
        k: keys ``[Hk, L, D]``, ``Hk`` divides ``H``.
        rows: int64 ``[R]``, for example ``RowSample.tokens``.
        scale: factor of the logits; None is ``D ** -0.5``.
        valid: visible keys, bool ``[L]``; the others have weight 0. None: all are visible.
        max_bytes: size limit of temporary tensors in bytes; a single row may exceed it.

    Yields:
        Chunks that cover all heads and rows; rows vary fastest.

    Raises:
        ValueError: the shapes do not match.

    Example:
        >>> import torch
        >>> from visattn.readout import attention_rows
        >>> q, k = torch.randn(4, 32, 8), torch.randn(2, 32, 8)
        >>> chunks = attention_rows(q, k, torch.tensor([0, 5]))
        >>> all(torch.allclose(c.weights.sum(-1), torch.ones(())) for c in chunks)
        True
    """
    if q.ndim != 3 or k.ndim != 3 or q.shape[2] != k.shape[2] or q.shape[0] % k.shape[0]:
        raise ValueError(
            f"q of shape {list(q.shape)} must be [H, L, D], and k of shape {list(k.shape)} "
            "[Hk, L, D] with the same D and an Hk that divides H"
        )
    factor = q.shape[2] ** -0.5 if scale is None else scale
    heads, tokens, group = q.shape[0], k.shape[1], q.shape[0] // k.shape[0]
    count = min(len(rows), max(1, max_bytes // (4 * tokens)))
    heads_per_chunk = max(1, min(max_bytes // (4 * tokens * max(count, q.shape[2])), heads))
    span = max(1, max_bytes // (4 * heads_per_chunk * q.shape[2]))  # of keys converted at a time
    rows = rows.to(q.device)
    unseen = None if valid is None else ~valid.to(q.device)
    for head in range(0, heads, heads_per_chunk):
        chunk_heads = slice(head, min(head + heads_per_chunk, heads))
        shared = torch.arange(chunk_heads.start, chunk_heads.stop, device=q.device) // group
        for row in range(0, len(rows), count):
            part = slice(row, min(row + count, len(rows)))
            queries = q[chunk_heads, rows[part]].float() * factor
            yield RowChunk(chunk_heads, part, *_softmax(queries, k, shared, span, unseen))


@plain_torch()
def _softmax(
    queries: torch.Tensor,
    k: torch.Tensor,
    heads: torch.Tensor,
    span: int,
    unseen: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the weights and LSE of scaled queries ``[h, r, D]`` with the key heads ``heads``.

    Keys are processed ``span`` at a time.
    """
    weights = torch.empty(*queries.shape[:2], k.shape[1], device=k.device)
    for key in range(0, k.shape[1], span):
        near = slice(key, key + span)
        weights[..., near] = queries @ k[heads, near].float().transpose(1, 2)
    if unseen is not None:
        weights.masked_fill_(unseen, -torch.inf)
    top = weights.amax(-1, keepdim=True)
    total = weights.sub_(top).exp_().sum(-1, keepdim=True)
    return weights.div_(total), (top + total.log()).squeeze(-1)
