"""Rows of a block map for plain torch: queries, and the runs of keys that they see.

Rows that see the same keys, all of them, are one row. Rows of one shape make a product together:
their keys are windows of the sequence where each row sees one run of it and the runs are evenly
apart, else the runs are copied side by side.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

import torch

from visattn.blocks.block_map import BlockMap
from visattn.geometry.layout import copied_to, on_cpu

__all__ = [
    "Mask",
    "Row",
    "alike_masks",
    "keys_of",
    "mask_of",
    "ordered",
    "places_of",
    "products_of",
    "rows_of",
    "take",
    "window_of",
]

WORK = 1 << 20  # logits of a product of several rows, enough that starting it does not count
SPAN = 1 << 24  # the same of rows that have one mask or none
COPIED = 1 << 19  # elements of the keys that several rows copy, so few that they stay in the cache
LISTED = 1 << 22  # positions of keys that a map keeps
ROW_BYTES, PART_BYTES = 300, 130  # of a row, and of each of its runs and tiles, about
EVEN = 16  # keys are cut to multiples of it


class Row(NamedTuple):
    """Queries and what they see, by ordered position.

    Attributes:
        begin, end: the queries.
        runs: the keys, ``(begin, end)`` of each run.
        tiles: what is masked, ``(number of the tile or -1, begin, end)`` in the order of the keys,
            columns of the tile or, of keys that are all seen, their number; empty: nothing.
        keys: how many.
        positions: of the keys, int64 ``[keys]``, where there are several runs and few keys in all;
            else they are made when they are wanted.
    """

    begin: int
    end: int
    runs: tuple[tuple[int, int], ...]
    tiles: tuple[tuple[int, int, int], ...]
    keys: int
    positions: torch.Tensor | None = None

    @property
    def shape(self) -> tuple[int, int]:
        return self.end - self.begin, self.keys


class Rows(NamedTuple):
    """The rows of a map, and how many bytes they take, about."""

    rows: list[Row]
    nbytes: int


def rows_of(block_map: BlockMap) -> list[Row]:
    """The rows of a map, in order, made once."""
    return block_map.of_map("rows", lambda: _sized_rows(block_map)).rows


def _sized_rows(block_map: BlockMap) -> Rows:
    rows = _make_rows(block_map)
    listed = sum(row.keys for row in rows if row.positions is not None)
    parts = sum(len(row.runs) + len(row.tiles) for row in rows)
    return Rows(rows, 8 * listed + ROW_BYTES * len(rows) + PART_BYTES * parts)


@on_cpu
def _make_rows(block_map: BlockMap) -> list[Row]:
    k_first, k_length = block_map.k_blocks.start.tolist(), block_map.k_blocks.length.tolist()
    q_first, q_length = block_map.q_blocks.start.tolist(), block_map.q_blocks.length.tolist()
    tiles, tile_of = block_map.tiles
    seen = tiles.any(1).int()  # columns that any query sees
    first_seen = (seen.argmax(1) // EVEN * EVEN).tolist()
    last = (seen * torch.arange(1, seen.shape[1] + 1)).amax(1)
    last_seen = (-(-last // EVEN) * EVEN).tolist()
    columns, numbers = block_map.columns.tolist(), tile_of.tolist()
    done = 0
    rows: list[Row] = []
    for place, (begin, _, _, whole, end) in enumerate(block_map.bounds.tolist()):
        own = [-1] * (whole - begin) + numbers[done : done + end - whole]
        done += end - whole
        runs: list[tuple[int, int]] = []
        masks: list[tuple[int, int, int]] = []
        for column, tile in sorted(zip(columns[begin:end], own, strict=True)):
            low, high = 0, k_length[column]
            if tile >= 0:
                low, high = first_seen[tile], min(high, last_seen[tile])
            if low >= high:  # a tile of which nothing is kept
                continue
            start, stop = k_first[column] + low, k_first[column] + high
            if runs and runs[-1][1] == start:
                runs[-1] = (runs[-1][0], stop)
            else:
                runs.append((start, stop))
            if tile < 0 and masks and masks[-1][0] < 0:
                masks[-1] = (-1, 0, masks[-1][2] + high)
            else:
                masks.append((tile, low, high))
        keys = sum(b - a for a, b in runs)
        masked = tuple(masks) if any(tile >= 0 for tile, _, _ in masks) else ()
        row = Row(q_first[place], q_first[place] + q_length[place], tuple(runs), masked, keys)
        before = rows[-1] if rows else None
        if before and not (before.tiles or row.tiles) and before.runs == row.runs:
            rows[-1] = before._replace(end=row.end)
        else:
            rows.append(row)
    several = [number for number, row in enumerate(rows) if len(row.runs) > 1]
    if sum(rows[number].keys for number in several) <= LISTED:
        for number in several:
            positions = places_of(rows[number], torch.device("cpu"))
            rows[number] = rows[number]._replace(positions=positions)
    return rows


def products_of(rows: list[Row], heads: int, dim: int, several: bool) -> Iterator[list[Row]]:
    """Rows by product: neighbours of one shape, masked or not, as many as the limits let be."""
    group: list[Row] = []
    alike, step = True, 0  # whether they have one mask; how far their windows are apart, 0: none
    for row in rows:
        if group:
            first = group[0]
            still_alike = alike and row.tiles == first.tiles
            apart = window_of([group[-1], row])
            still = apart[1] if apart and (len(group) == 1 or apart[1] == step) else 0
            many = heads * (len(group) + 1) * row.keys
            if (
                several
                and row.shape == first.shape
                and bool(row.tiles) == bool(first.tiles)
                and many * row.shape[0] <= (SPAN if still_alike and still else WORK)
                and (still or many * dim <= COPIED)
            ):
                group.append(row)
                alike, step = still_alike, still
                continue
            yield group
        group, alike, step = [row], True, 0
    if group:
        yield group


def alike_masks(rows: list[Row]) -> bool:
    """Whether rows of one shape have one mask, or none."""
    return all(row.tiles == rows[0].tiles for row in rows)


def window_of(rows: list[Row]) -> tuple[int, int] | None:
    """First key of the first of some rows and how far the next ones are apart, where each is one
    run; else None."""
    if any(len(row.runs) > 1 for row in rows):
        return None
    first = [row.runs[0][0] for row in rows]
    step = first[1] - first[0] if len(first) > 1 else 1
    even = step > 0 and all(b - a == step for a, b in pairwise(first))
    return (first[0], step) if even else None


def keys_of(
    x: torch.Tensor, rows: list[Row], scratch: torch.Tensor | None = None
) -> torch.Tensor:
    """What rows of one shape see of ``[B, L, D]``: ``[B, rows, keys, D]``, a view of it or of
    ``scratch`` where that is given."""
    window = window_of(rows)
    if window is not None:
        first, step = window
        end = first + (len(rows) - 1) * step + rows[0].keys
        return x[:, first:end].unfold(1, rows[0].keys, step).mT
    shape = (len(x), len(rows), rows[0].keys, x.shape[2])
    index = torch.cat([places_of(row, x.device) for row in rows])
    out = None if scratch is None else scratch[: math.prod(shape)].view(-1, x.shape[2])
    return take(x, index, out).view(shape)


def places_of(row: Row, device: torch.device | str = "cpu") -> torch.Tensor:
    """Ordered positions of the keys of a row."""
    if row.positions is not None:
        return copied_to(row.positions, device)
    return torch.cat([torch.arange(begin, end, device=device) for begin, end in row.runs])


def take(x: torch.Tensor, index: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """``x[:, index]`` of ``[B, L, D]``, ``[B * n, D]``: over all rows at once, which torch copies
    several times as fast as along an inner axis."""
    first = torch.arange(len(x), device=x.device)[:, None] * x.shape[1]
    return torch.index_select(x.reshape(-1, x.shape[2]), 0, (first + index).flatten(), out=out)


def ordered(
    x: torch.Tensor, index: torch.Tensor | None, out: torch.Tensor | None = None
) -> torch.Tensor:
    """``[B, H, L, D]`` as ``[B * H, L, D]``, contiguous, in the order of ``index``; in the memory
    of ``out`` where that is given and something is copied."""
    batch, heads, length, dim = x.shape
    if index is None and x.is_contiguous():
        return x.view(-1, length, dim)
    device = x.device
    index = torch.arange(length, device=device) if index is None else copied_to(index, device)
    by_token = x.transpose(1, 2)
    if heads == 1 or not by_token.is_contiguous():
        rows = take(x.reshape(-1, length, dim), index, out)
    else:  # heads beside each other, as pipelines have them
        first = torch.arange(batch, device=device)[:, None] * length * heads
        first = first + torch.arange(heads, device=device)
        places = (first[..., None] + index * heads).flatten()
        rows = torch.index_select(by_token.view(-1, dim), 0, places, out=out)
    return rows.view(-1, length, dim)


def mask_of(rows: list[Row], tiles: torch.Tensor) -> torch.Tensor | None:
    """The mask of rows of one shape, bool ``[1, rows or 1, queries, keys]``, or None."""
    if not rows[0].tiles:
        return None
    many = rows[0].shape[0]
    whole = torch.ones(1, 1, dtype=torch.bool, device=tiles.device)

    def mask(row: Row) -> torch.Tensor:
        parts = [
            whole.expand(many, end) if tile < 0 else tiles[tile, :many, begin:end]
            for tile, begin, end in row.tiles
        ]
        return torch.cat(parts, 1)

    if alike_masks(rows):
        return mask(rows[0])[None, None]
    return torch.stack([mask(row) for row in rows])[None]


class Mask(NamedTuple):
    """A mask, bool, as what it adds to logits, queries that see nothing, or None, and the keys that
    not all queries see, ``(begin, end)`` of each run."""

    kept: torch.Tensor
    bias: torch.Tensor
    blind: torch.Tensor | None
    spans: tuple[tuple[int, int], ...]

    @property
    def nbytes(self) -> int:
        return sum(x.nbytes for x in (self.kept, self.bias, self.blind) if x is not None)

    @staticmethod
    def of(kept: torch.Tensor, dtype: torch.dtype) -> Mask:
        bias = torch.zeros_like(kept, dtype=dtype).masked_fill_(~kept, -torch.inf)
        blind = ~kept.any(-1, keepdim=True)
        edges = torch.nn.functional.pad((~kept).flatten(0, 2).any(0).int(), (1, 1)).diff()
        begins, ends = ((edges == step).nonzero()[:, 0].tolist() for step in (1, -1))
        spans = tuple(zip(begins, ends, strict=True))
        return Mask(kept, bias, blind if bool(blind.any()) else None, spans)
