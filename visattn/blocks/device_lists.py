"""Conversion of a bank of block maps into the tensors that the kernels read, on one device.

The rows of all heads become one list of work items, the longest first, which balances the load of a
launch. A row that is much longer than the mean is split into parts, whose results are merged by
LSE. Predicates become integer parameters. A bank that needs more than two kinds of predicates is
masked by bit tiles.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import torch

from visattn.blocks.bank import MapBank
from visattn.blocks.bit_masks import packed_words
from visattn.blocks.block_map import BlockMap
from visattn.blocks.predicates import Axis, Band, Label, Predicate, RadialBand
from visattn.blocks.transpose import grid_numbers, key_lists
from visattn.geometry.layout import on_cpu
from visattn.geometry.orders import SequenceBlocks, Triple

__all__ = ["DeviceMaps", "device_maps"]

NONE, AXIS, STRIDED, BAND, RADIAL, LABEL, BITS = range(7)  # as in kernels/masks.py
PARAMS, SLOTS, USED = 48, (12, 28), 15
LEAST_PART = 16  # by default, rows with at most this many blocks are not split
LIMIT = 2**31 - 1
WORDS_LIMIT = 512 << 20  # limit of the bytes of the distinct bit tiles of a launch


@dataclass(frozen=True, eq=False)
class DeviceMaps:
    """The tensors of a bank that one launch reads.

    Attributes:
        lists: tensors by kernel argument: work, rows, columns, k_table, q_index, k_index, rules,
            tables, tile_of, bits.
        key_slots: int32 ``[2, S]``, key head and row of ``k_index`` of each distinct pair; None if
            keys stay in token order, so that the slot is the key head.
        kinds: predicate kinds of the two slots.
        ordered: whether queries, and whether keys, are reordered.
        num_parts: number of parts of split rows.
        block: queries and keys of a block.
    """

    lists: dict[str, torch.Tensor]
    key_slots: torch.Tensor | None
    kinds: tuple[int, int]
    ordered: tuple[bool, bool]
    num_parts: int
    block: tuple[int, int]

    @property
    def by_coordinates(self) -> bool:
        """Whether the kernel evaluates predicates from coordinates."""
        return self.kinds[0] not in (NONE, BITS)

    @property
    def nbytes(self) -> int:
        return sum(x.numel() * x.element_size() for x in self.lists.values())


def _kind_of(predicate: Predicate) -> int:
    if isinstance(predicate, Axis):
        return STRIDED if any(rule.modulus > 1 for rule in predicate.rules) else AXIS
    return {"band": BAND, "radial": RADIAL, "label": LABEL}[predicate.kind]


def _kinds(bank: MapBank) -> tuple[int, int]:
    """Return the two predicate kinds that cover every map of the bank, or (BITS, NONE)."""
    if any(item.needs_bits for item in bank.maps):
        return BITS, NONE
    needed: Counter[int] = Counter()
    for item in bank.maps:
        for union in item.predicates:
            counts = Counter(map(_kind_of, union))
            needed = Counter({kind: max(needed[kind], counts[kind]) for kind in needed | counts})
    ordered_kinds = sorted(needed.elements())
    if len(ordered_kinds) > 2:
        return BITS, NONE
    first, second = [*ordered_kinds, NONE, NONE][:2]
    return first, second


class _Tables:
    """One growing int32 buffer; each table object is stored once."""

    def __init__(self) -> None:
        self.parts: list[torch.Tensor] = []
        self.size = 0
        self.known: dict[int, int] = {}

    def add(self, table: torch.Tensor) -> int:
        if id(table) not in self.known:
            self.known[id(table)] = self.size
            self.parts.append(table)
            self.size += len(table)
        return self.known[id(table)]

    def tensor(self) -> torch.Tensor:
        return torch.cat([part.int() for part in self.parts] or [torch.zeros(1, dtype=torch.int32)])


def _slot(predicate: Predicate, axes: Triple, tables: _Tables) -> list[int]:
    """Return the integers of a used slot, in the format of kernels/masks.py, for coordinates in the
    order ``axes``."""
    values = [0] * (USED + 1)
    if isinstance(predicate, Axis):
        rules = [predicate.rules[axis] for axis in axes]
        values[0:3] = [tables.add(rule.low) for rule in rules]
        values[3:6] = [tables.add(rule.high) for rule in rules]
        values[6:9] = [rule.modulus for rule in rules]
    elif isinstance(predicate, Band):
        values[0:3] = [predicate.weights[axis] for axis in axes]
        values[3] = max(predicate.low, -LIMIT)
        values[4] = min(predicate.high, LIMIT)
    elif isinstance(predicate, RadialBand):
        frame, weights = predicate.forms()
        values[0:3] = [weights[axis] for axis in axes]
        values[3:6] = [int(axis == frame) for axis in axes]
        values[6] = tables.add(predicate.widths)
    else:
        assert isinstance(predicate, Label)
        values[0] = -1 if predicate.q_bits is None else tables.add(predicate.q_bits)
        values[1] = tables.add(predicate.k_bits)
    values[USED] = 1
    return values


def _parameters(bank: MapBank, kinds: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return rules int32 ``[M, G, 48]`` and the tables that their offsets point into."""
    layout, kv_layout = bank.maps[0].layout, bank.maps[0].kv_layout
    rules = torch.ones(len(bank.maps), max(1, len(layout.grids)), PARAMS, dtype=torch.int32)
    for slot in SLOTS:  # values of an unused slot: offsets 0, divisors 1
        rules[:, :, slot : slot + 6] = 0
        rules[:, :, slot + USED] = 0
    longest = max([max(grid.shape) for _, grid in layout.grids] or [1])
    tables = _Tables()
    tables.add(torch.zeros(longest, dtype=torch.int32))  # an unused slot reads this table
    for number, item in enumerate(bank.maps):
        for ordinal, (q_start, grid) in enumerate(layout.grids):
            row = rules[number, ordinal]
            k_start = kv_layout.grids[ordinal][0] if ordinal < len(kv_layout.grids) else 0
            a, b, c = sorted(range(3), key=lambda axis: grid.shape[axis])
            radices = [
                value for axis in (a, b, c) for value in (grid.strides[axis], grid.shape[axis])
            ]
            row[:9] = torch.tensor([*radices, q_start, k_start, grid.numel])
            free = list(zip(kinds, SLOTS, strict=True))
            for predicate in item.predicates[ordinal] if kinds[0] != BITS else ():
                place = next(pair for pair in free if pair[0] == _kind_of(predicate))
                free.remove(place)
                values = _slot(predicate, (a, b, c), tables)
                row[place[1] : place[1] + len(values)] = torch.tensor(values)
    return rules, tables.tensor()


def _bits(bank: MapBank, kinds: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return tile_of int32 ``[columns]`` and bits int32 ``[U, block_q, ceil(block_k / 32)]``."""
    if kinds[0] != BITS:
        return torch.zeros(1, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    tile_of = torch.zeros(len(bank.columns), dtype=torch.int32)
    stacks, count, offset = [], 0, 0
    for item in bank.maps:
        tiles, index = item.tiles
        counts = (item.bounds[:, 4] - item.bounds[:, 3]).long()
        within = torch.arange(len(index)) - torch.repeat_interleave(
            counts.cumsum(0) - counts, counts
        )
        first = torch.repeat_interleave(item.bounds[:, 3].long(), counts) + offset
        tile_of[first + within] = (index + count).int()
        stacks.append(tiles)
        count, offset = count + len(tiles), offset + item.num_visited
    tiles = torch.cat(stacks)
    words = -(-tiles.shape[2] // 32)
    padded = torch.nn.functional.pad(tiles, (0, words * 32 - tiles.shape[2])).long()
    packed = (padded.view(*tiles.shape[:2], words, 32) << torch.arange(32)).sum(3)
    packed = torch.where(packed > LIMIT, packed - 2**32, packed).int()
    return tile_of, packed if len(packed) else torch.zeros(1, dtype=torch.int32)


def _order_rows(blocks: list[SequenceBlocks]) -> tuple[torch.Tensor, list[int], bool]:
    """Return the distinct token orders, int32 ``[orders, L]``, the row of each map in it, and
    whether any map reorders tokens."""
    row_of_order: dict[tuple[object, ...], int] = {}
    rows = [row_of_order.setdefault(item.orders, len(row_of_order)) for item in blocks]
    if all(item.index is None for item in blocks):
        return torch.zeros(1, 1, dtype=torch.int32), [0] * len(blocks), False
    index = torch.empty(len(row_of_order), blocks[0].layout.length, dtype=torch.int32)
    for item, row in zip(blocks, rows, strict=True):
        index[row] = (torch.arange(item.layout.length) if item.index is None else item.index).int()
    return index, rows, True


def _k_table(bank: MapBank) -> torch.Tensor:
    """Return int32 ``[M, Nk, 4]``: first position, length, text segment or -1, offset in it."""
    table = torch.zeros(len(bank.maps), bank.k_table.shape[1], 4, dtype=torch.int32)
    table[:, :, :2] = bank.k_table
    table[:, :, 2] = -1
    layout = bank.maps[0].kv_layout
    texts = [n for n, segment in enumerate(layout.segments) if segment.kind == "text"]
    for number, item in enumerate(bank.maps):
        blocks = item.k_blocks
        for ordinal, segment in enumerate(texts):
            index = (blocks.segment == segment).nonzero()[:, 0]
            table[number, index, 2] = ordinal
            table[number, index, 3] = (blocks.start[index] - layout.starts[segment]).int()
    return table


def _firsts(bank: MapBank) -> torch.Tensor:
    """Return the first key of the block of each visit, int32 ``[columns + 1]``; the last is 0."""
    parts = [
        bank.k_table[number, item.columns.long(), 0] for number, item in enumerate(bank.maps)
    ]
    return torch.cat([*parts, torch.zeros(1, dtype=torch.int32)])


def _work(
    bank: MapBank, slots: list[int], q_rows: list[int], k_rows: list[int], split: int | None
) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Return the work items int32 ``[W, 16]``, longest first, the split rows int32 ``[R, 6]``, and
    the number of parts."""
    items: list[torch.Tensor] = []
    rows: list[torch.Tensor] = []
    heads = len(bank.head_map)
    total = sum(bank.maps[int(m)].num_visited for m in bank.head_map)
    count = sum(len(bank.maps[int(m)].q_blocks) for m in bank.head_map)
    most = split if split is not None else max(LEAST_PART, 4 * -(-total // max(1, count)))
    parts = 0
    grid_of_segment = grid_numbers(bank.maps[0].layout)
    for head in range(heads):
        number = int(bank.head_map[head])
        item = bank.maps[number]
        bounds = bank.bounds[number, : len(item.q_blocks)].long()
        visits = bounds[:, 4] - bounds[:, 0]
        pieces = (-(-visits // most)).clamp(min=1)
        row = torch.repeat_interleave(torch.arange(len(visits)), pieces)
        piece = torch.arange(len(row)) - torch.repeat_interleave(pieces.cumsum(0) - pieces, pieces)
        share = -(-visits // pieces)[row]
        low = bounds[row, 0] + piece * share
        high = torch.minimum(low + share, bounds[row, 4])
        is_part = pieces[row] > 1
        part = torch.where(is_part, parts + is_part.long().cumsum(0) - 1, -1)
        work = torch.zeros(len(row), 16, dtype=torch.int64)
        work[:, 0], work[:, 1], work[:, 2] = head, slots[head], number
        work[:, 3] = grid_of_segment[item.q_blocks.segment[row]]
        work[:, 4], work[:, 5] = item.q_blocks.start[row], item.q_blocks.length[row]
        work[:, 6] = part
        work[:, 7:12] = torch.minimum(torch.maximum(bounds[row], low[:, None]), high[:, None])
        work[:, 12], work[:, 13] = q_rows[number], k_rows[number]
        items.append(work)
        split_blocks = (pieces > 1).nonzero()[:, 0]
        if len(split_blocks):
            split_rows = torch.zeros(len(split_blocks), 6, dtype=torch.int64)
            split_rows[:, 0], split_rows[:, 1] = head, q_rows[number]
            split_rows[:, 2] = item.q_blocks.start[split_blocks]
            split_rows[:, 3] = item.q_blocks.length[split_blocks]
            split_rows[:, 4] = parts + pieces[split_blocks].cumsum(0) - pieces[split_blocks]
            split_rows[:, 5] = pieces[split_blocks]
            rows.append(split_rows)
            parts += int(pieces[split_blocks].sum())
    work = torch.cat(items)
    heaviest = (work[:, 11] - work[:, 7]).argsort(descending=True, stable=True)
    all_rows = torch.cat(rows) if rows else torch.zeros(0, 6)
    return work[heaviest].int(), all_rows.int(), parts


@on_cpu
def device_maps(
    heads: list[BlockMap],
    key_heads: int,
    device: torch.device,
    split: int | None = None,
    backward: bool = False,
    words: bool = False,
) -> DeviceMaps:
    """Pack one map per query head for a launch.

    Args:
        heads: one map per query head.
        key_heads: number of key heads; it divides the number of query heads.
        device: device of the tensors.
        split: rows with more blocks are split; default: four times the mean, at least 16.
        backward: prepare the gradients: no row is split, and ``lists`` includes ``key_lists``.
        words: mask partial and short blocks by bit tiles, also where predicates exist, if the tiles
            need at most ``WORDS_LIMIT`` bytes. ``lists`` then includes ``firsts``, the first key of
            each visit.
    """
    bank = MapBank.of(heads)
    packed = packed_words(bank, device, WORDS_LIMIT) if words else None
    kinds = (BITS, NONE) if packed else _kinds(bank)
    q_index, q_rows, q_ordered = _order_rows([item.q_blocks for item in bank.maps])
    k_index, k_rows, k_ordered = _order_rows([item.k_blocks for item in bank.maps])
    share = len(heads) // key_heads
    key_slots = None
    slots = [head // share for head in range(len(heads))]
    if k_ordered:
        wanted = [(head // share, k_rows[int(bank.head_map[head])]) for head in range(len(heads))]
        distinct = list(dict.fromkeys(wanted))
        slots = [distinct.index(pair) for pair in wanted]
        key_slots = torch.tensor(distinct, dtype=torch.int32).T.contiguous().to(device)
    rules, tables = _parameters(bank, kinds)
    tile_of, bits = packed or _bits(bank, kinds)
    work, rows, parts = _work(bank, slots, q_rows, k_rows, LIMIT if backward else split)
    lists = {
        "work": work,
        "rows": rows,
        "columns": bank.columns,
        "k_table": _k_table(bank),
        "q_index": q_index,
        "k_index": k_index,
        "rules": rules,
        "tables": tables,
        "tile_of": tile_of,
        "bits": bits,
    }
    if packed:  # a row without a visit reads the element after the last one
        lists["columns"] = torch.nn.functional.pad(bank.columns, (0, 1))
        lists["firsts"] = _firsts(bank)
    if backward:
        lists |= key_lists(bank, slots, q_rows, k_rows, tile_of.cpu())
    return DeviceMaps(
        lists={name: tensor.contiguous().to(device) for name, tensor in lists.items()},
        key_slots=key_slots,
        kinds=kinds,
        ordered=(q_ordered, k_ordered),
        num_parts=parts,
        block=(bank.maps[0].block_q, bank.maps[0].block_k),
    )
