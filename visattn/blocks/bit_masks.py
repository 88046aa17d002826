"""The masks of partial and short blocks as packed bits, computed on the device that reads them.
Each distinct tile is stored once.

For a kernel, testing a bit costs less than computing coordinates. So if the distinct tiles of a
launch fit in memory, every predicate is converted to bits. Tiles repeat: the tile of a window
depends on its position relative to the block, not on the block. Tiles are evaluated in chunks and
distinguished by two 63-bit sums of their words. Every tile is then compared with the one that
represents it.
"""

from __future__ import annotations

from dataclasses import fields, is_dataclass, replace
from typing import Any

import torch

from visattn.blocks.bank import MapBank
from visattn.blocks.block_map import BlockMap
from visattn.blocks.transpose import grid_numbers
from visattn.geometry.orders import SequenceBlocks

__all__ = ["packed_words"]

CHUNK = {"cuda": 1 << 23, "cpu": 1 << 20}  # token pairs that are evaluated at a time


def packed_words(
    bank: MapBank, device: torch.device, limit_bytes: int
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Return the bit tiles of all partial and short blocks of a bank, on ``device``.

    Returns:
        tile_of int32 ``[visits + 1]``, the tile of each visit (-1: every pair is kept), and words
        int32 ``[U, block_q, ceil(block_k / 32)]``; bit ``i`` of word ``j`` is key ``32 j + i``.
        None if the distinct tiles need more than ``limit_bytes``.
    """
    numbers, stacks, count = [], [], 0
    for item in bank.maps:
        tiles = _words_of(item, device, limit_bytes)
        if tiles is None:
            return None
        number, words = tiles
        numbers.append(torch.where(number >= 0, number + count, number))
        stacks.append(words)
        count += len(words)
    words = torch.cat(stacks)
    if words.numel() * 4 > limit_bytes:
        return None
    if not len(words):  # a kernel may read one tile
        words = words.new_zeros(1, *words.shape[1:])
    end = torch.full((1,), -1, dtype=torch.int32, device=device)
    return torch.cat([*numbers, end]), words


def _words_of(
    item: BlockMap, device: torch.device, limit_bytes: int
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Return tile_of and words of one map."""
    tile_of = torch.full((item.num_visited,), -1, dtype=torch.int32, device=device)
    row = torch.repeat_interleave(torch.arange(len(item.visits)), item.visits)
    position = torch.arange(item.num_visited)
    bounds = item.bounds.long()[row]
    short = ((position >= bounds[:, 2]) & (position < bounds[:, 3])).nonzero()[:, 0]
    lengths, number = item.k_blocks.length[item.columns[short].long()].unique(return_inverse=True)
    keys = torch.arange(item.block_k) < lengths[:, None]
    words = _pack(keys[:, None].expand(-1, item.block_q, -1).to(device))
    tile_of[short.to(device)] = number.int().to(device)
    partial = (position >= bounds[:, 3]).nonzero()[:, 0]
    if not len(partial):
        return tile_of, words
    if item.given_tiles is not None:
        tiles, tile_index = item.given_tiles
        packed, tile_index = _pack(tiles.to(device)), tile_index.to(device)
    else:
        columns = item.columns[partial].long()
        evaluated = _evaluated(item, row[partial], columns, device, limit_bytes)
        if evaluated is None:
            return None
        packed, tile_index = evaluated
    tile_of[partial.to(device)] = (tile_index + len(words)).int()
    return tile_of, torch.cat([words, packed])


def _pack(kept: torch.Tensor) -> torch.Tensor:
    """Pack bool ``[n, q, k]`` into int32 ``[n, q, ceil(k / 32)]``."""
    words = -(-kept.shape[2] // 32)
    padded = torch.nn.functional.pad(kept, (0, words * 32 - kept.shape[2]))
    shifts = torch.arange(32, dtype=torch.int32, device=kept.device)
    # the sum of distinct powers of two is their bitwise OR, modulo 2^32
    bits = padded.view(*kept.shape[:2], words, 32).int() << shifts
    return bits.sum(3, dtype=torch.int32)


def _evaluated(
    item: BlockMap,
    rows: torch.Tensor,
    columns: torch.Tensor,
    device: torch.device,
    limit_bytes: int,
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Return the distinct tiles of partial blocks, and the tile index of each block."""
    q, k = _Side(item.q_blocks, device), _Side(item.k_blocks, device)
    ordinals = grid_numbers(item.layout)[item.q_blocks.segment[rows]]
    predicates = [[_moved(p, device) for p in union] for union in item.predicates]
    step = max(1, CHUNK["cpu" if device.type == "cpu" else "cuda"] // (item.block_q * item.block_k))
    order = ordinals.argsort(stable=True)  # one grid at a time
    kinds: list[torch.Tensor] = []
    index = torch.empty(len(rows), dtype=torch.int64, device=device)
    count = 0
    for ordinal in ordinals.unique().tolist():
        grid_pairs = order[ordinals[order] == ordinal]
        for begin in range(0, len(grid_pairs), step):
            part = grid_pairs[begin : begin + step]
            q_places, _ = q.places(rows[part].to(device), ordinal)
            k_places, exists = k.places(columns[part].to(device), ordinal)
            queries = tuple(x[:, :, None] for x in q_places)
            keys = tuple(x[:, None] for x in k_places)
            kept = torch.zeros((), dtype=torch.bool, device=device)
            for predicate in predicates[ordinal]:
                kept = kept | predicate.allows(queries, keys)
            words, number = _distinct(_pack(kept & exists[:, None]))
            index[part.to(device)] = number + count
            kinds.append(words)
            count += len(words)
            if count * words[0].numel() * 4 > 4 * limit_bytes:
                return None
    words, number = _distinct(torch.cat(kinds))
    return words, number[index]


def _distinct(words: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the distinct tiles of int32 ``[n, q, w]``, and the index of each tile among them. If
    two different tiles have equal sums, all tiles are returned."""
    flat = words.flatten(1).long()
    generator = torch.Generator().manual_seed(0)
    odd = torch.randint(-(2**62), 2**62, (2, flat.shape[1]), generator=generator) * 2 + 1
    first, second = ((flat * part).sum(1) for part in odd.to(words.device))
    _, number = (first ^ (second << 1)).unique(return_inverse=True)
    position = torch.arange(len(flat), device=words.device)
    first_tile = position.new_full((int(number.max()) + 1,), len(flat))
    first_tile.scatter_reduce_(0, number, position, "amin")
    distinct = words[first_tile]
    if not torch.equal(distinct[number], words):
        return words, position
    return distinct, number


class _Side:
    """The coordinates of the tokens in the blocks of one sequence, on a device."""

    def __init__(self, blocks: SequenceBlocks, device: torch.device) -> None:
        self.size, layout = blocks.size, blocks.layout
        self.start, self.length = blocks.start.to(device), blocks.length.to(device)
        self.offset = torch.arange(self.size, device=device)
        token = torch.arange(layout.length) if blocks.index is None else blocks.index
        self.of_grid = [
            torch.stack(grid.coordinates((token - begin).clamp(0, grid.numel - 1))).to(device)
            for begin, grid in layout.grids
        ]

    def places(
        self, block: torch.Tensor, ordinal: int
    ) -> tuple[tuple[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]:
        """Return the coordinates of the tokens in blocks of a grid, ``[n, size]`` each, and which
        of these tokens exist."""
        length = self.length[block, None]
        position = self.start[block, None] + self.offset.minimum(length - 1)
        t, h, w = self.of_grid[ordinal][:, position]
        return (t, h, w), self.offset < length


def _moved(value: Any, device: torch.device) -> Any:
    """Return a predicate with its tables on a device."""
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if isinstance(value, tuple):
        return tuple(_moved(item, device) for item in value)
    if is_dataclass(value) and not isinstance(value, type):
        moved = {field.name: _moved(getattr(value, field.name), device) for field in fields(value)}
        return replace(value, **moved)
    return value
