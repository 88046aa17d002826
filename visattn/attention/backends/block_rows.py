"""Rows of a block map for plain torch: queries, and the runs of keys that they attend to.

Adjacent rows without a mask that attend to the same keys become one row. Rows of equal shape are
computed in one batched matrix product. If each of these rows has one run of keys, and the runs
start at equal distances, the keys are strided windows of the sequence; otherwise the runs are
copied into one tensor.
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

WORK = 1 << 20  # limit of the logits of one product; enough to make its start-up cost negligible
SPAN = 1 << 24  # the same limit, where all rows of the product share one mask or have none
COPIED = 1 << 19  # limit of the key elements copied for one product, so that they fit the cache
LISTED = 1 << 22  # limit of the key positions that are stored with a map
ROW_BYTES, PART_BYTES = 300, 130  # approximate size of a row, and of each of its runs and tiles
EVEN = 16  # key ranges start and end at multiples of it


class Row(NamedTuple):
    """Queries and the keys that they attend to, by position in the ordered sequences.

    Attributes:
        begin: first query.
        end: last query + 1.
        runs: the keys, ``(begin, end)`` of each run.
        tiles: the mask, ``(tile, begin, end)`` in the order of the keys: columns ``begin`` to
            ``end`` of a bit tile, or tile -1 and ``end`` keys that no mask hides. Empty: no mask.
        keys: number of keys.
        positions: positions of the keys, int64 ``[keys]``, if there are several runs and the map
            stores positions; None: ``places_of`` computes them.
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
    """The rows of a map, and their approximate size in bytes."""

    rows: list[Row]
    nbytes: int


def rows_of(block_map: BlockMap) -> list[Row]:
    """Return the rows of a map, in order; they are computed once and stored with the map."""
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
    seen = tiles.any(1).int()  # columns that at least one query attends to
    first_seen = (seen.argmax(1) // EVEN * EVEN).tolist()
    last = (seen * torch.arange(1, seen.shape[1] + 1)).amax(1)
    last_seen = (-(-last // EVEN) * EVEN).tolist()
    columns, numbers = block_map.columns.tolist(), tile_of.tolist()
    done = 0
    rows: list[Row] = []
    for block, (begin, _, _, whole, end) in enumerate(block_map.bounds.tolist()):
        tile_numbers = [-1] * (whole - begin) + numbers[done : done + end - whole]
        done += end - whole
        runs: list[tuple[int, int]] = []
        masks: list[tuple[int, int, int]] = []
        for column, tile in sorted(zip(columns[begin:end], tile_numbers, strict=True)):
            low, high = 0, k_length[column]
            if tile >= 0:
                low, high = first_seen[tile], min(high, last_seen[tile])
            if low >= high:  # a tile that keeps no pair
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
        row = Row(q_first[block], q_first[block] + q_length[block], tuple(runs), masked, keys)
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
    """Group adjacent rows of equal shape into products, as large as the limits allow.

    Rows with a mask and rows without one are not mixed.
    """
    group: list[Row] = []
    # whether the rows share one mask; the distance of their windows, 0: they are not windows
    alike, step = True, 0
    for row in rows:
        if group:
            first = group[0]
            same_masks = alike and row.tiles == first.tiles
            apart = window_of([group[-1], row])
            same_step = apart[1] if apart and (len(group) == 1 or apart[1] == step) else 0
            num_elements = heads * (len(group) + 1) * row.keys
            if (
                several
                and row.shape == first.shape
                and bool(row.tiles) == bool(first.tiles)
                and num_elements * row.shape[0] <= (SPAN if same_masks and same_step else WORK)
                and (same_step or num_elements * dim <= COPIED)
            ):
                group.append(row)
                alike, step = same_masks, same_step
                continue
            yield group
        group, alike, step = [row], True, 0
    if group:
        yield group


def alike_masks(rows: list[Row]) -> bool:
    """Return whether rows of equal shape share one mask, or have none."""
    return all(row.tiles == rows[0].tiles for row in rows)


def window_of(rows: list[Row]) -> tuple[int, int] | None:
    """Return the first key of the first row and the distance between the first keys of adjacent
    rows; None if a row has several runs of keys or the distances differ."""
    if any(len(row.runs) > 1 for row in rows):
        return None
    first = [row.runs[0][0] for row in rows]
    step = first[1] - first[0] if len(first) > 1 else 1
    even = step > 0 and all(b - a == step for a, b in pairwise(first))
    return (first[0], step) if even else None


def keys_of(
    x: torch.Tensor, rows: list[Row], scratch: torch.Tensor | None = None
) -> torch.Tensor:
    """Return the keys of rows of equal shape, ``[B, rows, keys, D]``, from ``x`` ``[B, L, D]``.

    The result is a view of ``x`` if the keys are windows; otherwise a copy, in the memory of
    ``scratch`` if that is given.
    """
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
    """Return the positions of the keys of a row in the ordered sequence, int64 ``[keys]``."""
    if row.positions is not None:
        return copied_to(row.positions, device)
    return torch.cat([torch.arange(begin, end, device=device) for begin, end in row.runs])


def take(x: torch.Tensor, index: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """Return ``x[:, index]`` of ``[B, L, D]`` as ``[B * n, D]``.

    It indexes the outermost axis; torch copies several times faster there than along an inner axis.
    """
    first = torch.arange(len(x), device=x.device)[:, None] * x.shape[1]
    return torch.index_select(x.reshape(-1, x.shape[2]), 0, (first + index).flatten(), out=out)


def ordered(
    x: torch.Tensor, index: torch.Tensor | None, out: torch.Tensor | None = None
) -> torch.Tensor:
    """Return ``[B, H, L, D]`` as contiguous ``[B * H, L, D]``, in the order of ``index``.

    If data is copied and ``out`` is given, the result is in the memory of ``out``.
    """
    batch, heads, length, dim = x.shape
    if index is None and x.is_contiguous():
        return x.view(-1, length, dim)
    device = x.device
    index = torch.arange(length, device=device) if index is None else copied_to(index, device)
    by_token = x.transpose(1, 2)
    if heads == 1 or not by_token.is_contiguous():
        rows = take(x.reshape(-1, length, dim), index, out)
    else:  # memory order [B, L, H, D], as in pipelines
        first = torch.arange(batch, device=device)[:, None] * length * heads
        first = first + torch.arange(heads, device=device)
        places = (first[..., None] + index * heads).flatten()
        rows = torch.index_select(by_token.view(-1, dim), 0, places, out=out)
    return rows.view(-1, length, dim)


def mask_of(rows: list[Row], tiles: torch.Tensor) -> torch.Tensor | None:
    """Return the mask of rows of equal shape, bool ``[1, rows or 1, queries, keys]``, or None."""
    if not rows[0].tiles:
        return None
    num_queries = rows[0].shape[0]
    whole = torch.ones(1, 1, dtype=torch.bool, device=tiles.device)

    def mask(row: Row) -> torch.Tensor:
        parts = [
            whole.expand(num_queries, end) if tile < 0 else tiles[tile, :num_queries, begin:end]
            for tile, begin, end in row.tiles
        ]
        return torch.cat(parts, 1)

    if alike_masks(rows):
        return mask(rows[0])[None, None]
    return torch.stack([mask(row) for row in rows])[None]


class Mask(NamedTuple):
    """A mask and the forms of it that the products need.

    Attributes:
        kept: the mask, bool.
        bias: what is added to the logits: 0 or minus infinity.
        blind: queries without a key, bool; None: there is none.
        spans: runs ``(begin, end)`` of the keys that are masked for at least one query.
    """

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
