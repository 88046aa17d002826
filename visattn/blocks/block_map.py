"""BlockMap: the key blocks that each query block visits. Patterns lower to it, kernels read it.

A row of a map lists its key blocks by class, so that a kernel applies only the masks that a class
needs::

    bounds[i] = (begin, full, text, short, partial)      columns[begin:partial]
    [begin, full)     full-length blocks, every pair kept: no mask
    [full, text)      full-length text blocks: no mask, unless text lengths are given at run time
    [text, short)     every pair kept, but the block is shorter than ``block_k``: mask by length
    [short, partial)  mask by predicate (or by bit tile) and by length

Positions are indices into the ordered sequences (``q_blocks.index``, ``k_blocks.index``).
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from functools import cached_property
from typing import Literal, cast

import torch

from visattn.blocks.cache import Item, Sized, grown
from visattn.blocks.predicates import Predicate
from visattn.geometry.layout import TokenLayout, on_cpu
from visattn.geometry.orders import SequenceBlocks
from visattn.runtime.torch_settings import lasting

__all__ = ["BlockMap", "PartialPolicy", "build_map", "pack_rows"]

PartialPolicy = Literal["exact", "promote", "drop"]
NONE, FULL, TEXT, SHORT, PARTIAL = range(5)  # classes of a block pair, in the order of a row's list
MAX_PREDICATES = 2  # a map with more predicates per grid is masked by bit tiles
TILE_CHUNK = 1 << 20  # elements of a temporary tensor when partial blocks are evaluated


@dataclass(frozen=True, eq=False)
class BlockMap:
    """The block form of one head's pattern; all tensors live on the CPU.

    Attributes:
        q_blocks: the blocks of the query sequence, in its order.
        k_blocks: the blocks of the key sequence, in its order.
        bounds: int32 ``[Nq, 5]``, see above.
        columns: key block of each visit, ``[visited]``; int16 if the block numbers fit, else int32.
        predicates: per grid of the layout, the predicates whose union masks its partial blocks.
        given_tiles: (bool ``[U, block_q, block_k]``, int64 ``[partial]``) if the masks of partial
            blocks are given as bits and not as predicates.
        made: the objects that ``of_map`` has created, by key.
    """

    q_blocks: SequenceBlocks
    k_blocks: SequenceBlocks
    bounds: torch.Tensor
    columns: torch.Tensor
    predicates: tuple[tuple[Predicate, ...], ...]
    given_tiles: tuple[torch.Tensor, torch.Tensor] | None = None
    made: dict[Hashable, Sized] = field(default_factory=dict, init=False, repr=False)

    def of_map(self, key: Hashable, make: Callable[[], Item]) -> Item:
        """Return an object that is derived from the map; create it on the first call.

        Its memory counts as part of the map, and it is freed with the map.

        Args:
            key: identifies the object; all objects of a key have one class.
            make: creates the object. The object must not refer to the map.
        """
        if key not in self.made:
            self.made[key] = make()
            grown()
        return cast(Item, self.made[key])

    @property
    def layout(self) -> TokenLayout:
        return self.q_blocks.layout

    @property
    def kv_layout(self) -> TokenLayout:
        return self.k_blocks.layout

    @property
    def block_q(self) -> int:
        return self.q_blocks.size

    @property
    def block_k(self) -> int:
        return self.k_blocks.size

    @cached_property
    @lasting
    def visits(self) -> torch.Tensor:
        """Key blocks visited by each query block, int64 ``[Nq]``."""
        return (self.bounds[:, 4] - self.bounds[:, 0]).long()

    @property
    def num_visited(self) -> int:
        return len(self.columns)

    @cached_property
    def num_partial(self) -> int:
        return int((self.bounds[:, 4] - self.bounds[:, 3]).sum())

    @property
    def block_density(self) -> float:
        """Visited block area divided by that of dense attention, with equal blocks, no segments."""
        rows = -(-self.layout.length // self.block_q)
        return self.num_visited / (rows * -(-self.kv_layout.length // self.block_k))

    @property
    def needs_bits(self) -> bool:
        """Whether partial blocks need bit tiles, because no kernel predicate describes them."""
        return self.given_tiles is not None or any(
            len(union) > MAX_PREDICATES or any(p.kind == "table" for p in union)
            for union in self.predicates
        )

    @cached_property
    def _given_nbytes(self) -> int:
        given = (self.q_blocks, self.k_blocks, self.bounds, self.columns, self.predicates)
        return _nbytes_of((*given, self.given_tiles))

    @property
    def nbytes(self) -> int:
        """Bytes of the map and all objects derived from it; shared tensors count for each map."""
        cached = [self.__dict__.get(name) for name in ("visits", "partial_pairs", "tiles")]
        made = sum(item.nbytes for item in tuple(self.made.values()))
        return self._given_nbytes + _nbytes_of(tuple(cached)) + made

    @on_cpu
    def status(self) -> torch.Tensor:
        """Return the class of each block pair (NONE, FULL, ... PARTIAL), uint8 ``[Nq, Nk]``."""
        out = torch.zeros(len(self.q_blocks), len(self.k_blocks), dtype=torch.uint8)
        rows = torch.repeat_interleave(torch.arange(len(self.q_blocks)), self.visits)
        place = torch.arange(self.num_visited)
        kind = 1 + (place[:, None] >= self.bounds[rows, 1:4]).sum(1)
        out[rows, self.columns.long()] = kind.byte()
        return out

    @cached_property
    @on_cpu
    def partial_pairs(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(query block, key block) of the partial blocks, row by row, int64 ``[partial]`` each."""
        counts = (self.bounds[:, 4] - self.bounds[:, 3]).long()
        rows = torch.repeat_interleave(torch.arange(len(counts)), counts)
        within = torch.arange(len(rows)) - torch.repeat_interleave(
            counts.cumsum(0) - counts, counts
        )
        return rows, self.columns[self.bounds[rows, 3].long() + within].long()

    @cached_property
    @on_cpu
    def tiles(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Masks of the partial blocks: the distinct tiles, bool ``[U, block_q, block_k]``, and the
        tile index of each partial block, int64 ``[partial]``. Pairs outside a short block are
        False.
        """
        if self.given_tiles is not None:
            return self.given_tiles
        rows, columns = self.partial_pairs
        return distinct_tiles(rows, columns, self.block_q, self.block_k, self._evaluate)

    def _evaluate(self, rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
        """Return the token masks of ``n`` partial blocks, bool ``[n, block_q, block_k]``."""
        q, q_exists = self.q_blocks.tokens(rows)
        k, k_exists = self.k_blocks.tokens(columns)
        out = q_exists[:, :, None] & k_exists[:, None, :]
        segment = self.q_blocks.segment[rows]
        ordinal = -1
        for number, (begin, part) in enumerate(
            zip(self.layout.starts, self.layout.segments, strict=True)
        ):
            if part.grid is None:
                continue
            ordinal += 1
            mine = segment == number
            if not bool(mine.any()):
                continue
            key_begin = self.kv_layout.grids[ordinal][0]
            q_place = part.grid.coordinates(q[mine] - begin)
            k_place = part.grid.coordinates(k[mine] - key_begin)
            q_axes = (q_place[0][:, :, None], q_place[1][:, :, None], q_place[2][:, :, None])
            k_axes = (k_place[0][:, None], k_place[1][:, None], k_place[2][:, None])
            kept = torch.zeros((), dtype=torch.bool)
            for predicate in self.predicates[ordinal]:
                kept = kept | predicate.allows(q_axes, k_axes)
            out[mine] &= kept
        return out

    @on_cpu
    def pairs(self) -> int:
        """Return the number of kept (query, key) pairs."""
        areas = self.q_blocks.length[:, None] * self.k_blocks.length
        status = self.status()
        whole = int(areas[(status != NONE) & (status != PARTIAL)].sum())
        tiles, index = self.tiles
        return whole + int(tiles.flatten(1).sum(1)[index].sum())


def _nbytes_of(value: object) -> int:
    """Return the bytes of all tensors in nested tuples and dataclasses."""
    if isinstance(value, torch.Tensor):
        return value.numel() * value.element_size()
    if isinstance(value, tuple):
        return sum(map(_nbytes_of, value))
    if is_dataclass(value):
        return sum(_nbytes_of(getattr(value, field_.name)) for field_ in fields(value))
    return 0


def distinct_tiles(
    rows: torch.Tensor,
    columns: torch.Tensor,
    block_q: int,
    block_k: int,
    evaluate: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Evaluate the masks of block pairs in chunks, and store each distinct mask once."""
    words = -(-block_q * block_k // 63)
    odd = (
        torch.randint(-(2**62), 2**62, (words,), generator=torch.Generator().manual_seed(0)) * 2 + 1
    )
    powers = 1 << torch.arange(63)
    seen: dict[int, list[int]] = {}
    kept: list[torch.Tensor] = []
    index = torch.empty(len(rows), dtype=torch.int64)
    step = max(1, TILE_CHUNK // (block_q * block_k))
    for begin in range(0, len(rows), step):
        part = slice(begin, min(begin + step, len(rows)))
        masks = evaluate(rows[part], columns[part])
        flat = torch.nn.functional.pad(masks.flatten(1), (0, words * 63 - block_q * block_k))
        packed = (flat.view(len(flat), words, 63) * powers).sum(2)
        for place, key in enumerate(((packed * odd).sum(1) ^ packed.sum(1)).tolist(), begin):
            mask = masks[place - begin]
            for number in seen.setdefault(key, []):
                if torch.equal(kept[number], mask):
                    break
            else:
                number = len(kept)
                kept.append(mask.clone())
                seen[key].append(number)
            index[place] = number
    tiles = torch.stack(kept) if kept else torch.zeros(0, block_q, block_k, dtype=torch.bool)
    return tiles, index


def pack_rows(status: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Pack classes uint8 ``[Nq, Nk]`` into bounds int32 ``[Nq, 5]`` and columns. Within a class the
    columns ascend."""
    counts = torch.stack([(status == kind).sum(1) for kind in (FULL, TEXT, SHORT, PARTIAL)], 1)
    ends = counts.flatten().cumsum(0).view_as(counts)
    bounds = torch.cat([(ends[:, :1] - counts[:, :1]), ends], 1).int()
    fits = status.shape[1] <= torch.iinfo(torch.int16).max
    columns = torch.empty(int(counts.sum()), dtype=torch.int16 if fits else torch.int32)
    for place, kind in enumerate((FULL, TEXT, SHORT, PARTIAL)):
        rows, cols = (status == kind).nonzero(as_tuple=True)
        class_counts = counts[:, place]
        within = torch.arange(len(rows)) - (class_counts.cumsum(0) - class_counts)[rows]
        columns[bounds[rows, place].long() + within] = cols.to(columns.dtype)
    return bounds, columns


def build_map(
    q_blocks: SequenceBlocks,
    k_blocks: SequenceBlocks,
    predicates: Sequence[Sequence[Predicate] | None],
    *,
    partial: PartialPolicy,
    outside: bool = True,
    description: str,
) -> BlockMap:
    """Classify every block pair and pack the rows.

    Args:
        q_blocks: the blocks of the query sequence.
        k_blocks: the blocks of the key sequence.
        predicates: per grid of the query layout, the predicates whose union keeps the pairs with
            the key grid of the same number; None if there is no such key grid.
        partial: ``exact`` keeps partial blocks with their mask, ``promote`` makes them full (a
            superset of the rule), ``drop`` leaves them out (a subset).
        outside: whether pairs outside those grids (text, prefix, another grid) are kept.
        description: the pattern, for error messages.

    Raises:
        ValueError: ``partial`` is unknown, or a query block has no key.
    """
    if partial not in ("exact", "promote", "drop"):
        raise ValueError(f"partial={partial!r} must be 'exact', 'promote' or 'drop'")
    is_text = torch.tensor([s.kind == "text" for s in k_blocks.layout.segments])[k_blocks.segment]
    whole = torch.full((len(k_blocks),), FULL, dtype=torch.uint8)
    whole[is_text] = TEXT
    whole[k_blocks.length < k_blocks.size] = SHORT
    status = (
        whole.expand(len(q_blocks), -1).clone()
        if outside
        else torch.zeros(len(q_blocks), len(k_blocks)).byte()
    )
    used: list[tuple[Predicate, ...]] = []
    for ordinal, union in enumerate(predicates):
        if union is None:
            used.append(())
            continue
        q_grid, k_grid = q_blocks.grids[ordinal], k_blocks.grids[ordinal]
        q_part = slice(q_blocks.first[ordinal], q_blocks.first[ordinal] + len(q_grid.start))
        k_part = slice(k_blocks.first[ordinal], k_blocks.first[ordinal] + len(k_grid.start))
        answers = [predicate.classify(q_grid, k_grid) for predicate in union]
        some = torch.zeros(len(q_grid.start), len(k_grid.start), dtype=torch.bool)
        every = some.clone()
        for union_some, union_every in answers:
            some |= union_some
            every |= union_every
        some &= ~every
        used.append(
            tuple(
                predicate
                for predicate, (kept, _) in zip(union, answers, strict=True)
                if bool((kept & some).any())
            )
        )
        if partial == "drop":
            some.zero_()
        part = every * whole[k_part]
        part[some] = PARTIAL
        if partial == "promote":
            part = torch.where(some, whole[k_part], part)
        status[q_part, k_part] = part
    bounds, columns = pack_rows(status)
    if outside:
        check_rows(bounds, partial, description)
    if partial != "exact":
        used = [() for _ in used]
    return BlockMap(q_blocks, k_blocks, bounds, columns, tuple(used))


def check_rows(bounds: torch.Tensor, partial: str, description: str) -> None:
    """Raise a ValueError if a query block has no key."""
    empty = (bounds[:, 4] == bounds[:, 0]).nonzero()
    if len(empty):
        remedy = (
            "; use partial='exact' or 'promote'"
            if partial == "drop"
            else "; only Skip() may leave rows empty: widen the pattern or add Diagonal(0)"
        )
        raise ValueError(
            f"{description} with partial={partial!r} leaves {len(empty)} of {len(bounds)} query "
            f"blocks "
            f"without any key, the first is block {int(empty[0])}{remedy}"
        )
