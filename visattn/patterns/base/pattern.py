"""What every static pattern is: a token rule, its exact count of pairs, and a lowering to
blocks."""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar

import torch

from visattn._arguments import check_count
from visattn.blocks.block_map import BlockMap, PartialPolicy, build_map
from visattn.blocks.predicates import Places, Predicate
from visattn.geometry.layout import Grid, TokenLayout, on_cpu
from visattn.geometry.orders import LineOrder, Order, OrderedBlocks, sequence_blocks
from visattn.patterns.base.head_pattern import HeadPattern

MAX_BLOCK = 4096


class Pattern(HeadPattern):
    """Base of the static patterns; each is for one head.

    A pattern speaks of the pairs inside a grid. Everything else is kept: text and prefix keys for
    every query, text queries in full, and pairs of two different grids. With a separate key layout
    the pattern holds between the grids of the same number, which must be equal.
    """

    outside: ClassVar[bool] = True  # whether pairs that are not inside one grid are kept

    @abstractmethod
    def keeps(self, q: Places, k: Places, grid: Grid) -> torch.Tensor:
        """The definition: which pairs of one grid are kept, by coordinates ``(t, h, w)``, bool,
        broadcast."""

    @abstractmethod
    def pairs(self, grid: Grid) -> int:
        """Exact number of kept pairs inside one grid."""

    @abstractmethod
    def predicates(self, grid: Grid) -> tuple[Predicate, ...]:
        """The same rule as a union of predicates, for the block form."""

    @abstractmethod
    def orders(self, grid: Grid, block_q: int, block_k: int) -> tuple[Order, Order]:
        """The orders of queries and keys in which the pattern visits few blocks."""

    def covered(self, grid: Grid) -> torch.Tensor | bool:
        """Which queries of a grid see some key of it: one answer for all, or bool ``[n]``."""
        return True

    @on_cpu
    def check(self, grid: Grid) -> None:
        """Raise ValueError when a size does not fit the grid, or a query would see no key of it."""
        self.predicates(grid)
        covered = self.covered(grid)
        if self.outside and isinstance(covered, torch.Tensor) and not bool(covered.all()):
            raise ValueError(
                f"{self} leaves {int((~covered).sum())} of the {grid.numel} queries of grid {grid} "
                "without any key; add the offset (0, 0, 0), a column, or Diagonal(0)"
            )

    def _best(
        self, grid: Grid, block_q: int, block_k: int, others: tuple[int, int]
    ) -> tuple[Order, Order]:
        """The pattern's own orders, or raster order where that visits fewer blocks: small boxes are
        many, and with other queries and keys (``others`` tokens) each meets all of those."""
        own, raster = self.orders(grid, block_q, block_k), (LineOrder(), LineOrder())
        if own == raster:
            return own
        predicates = self.predicates(grid)

        def visited(orders: tuple[Order, Order]) -> int:
            q, k = orders[0].blocks(grid, block_q), orders[1].blocks(grid, block_k)
            count = visited_blocks(predicates, q, k)
            if self.outside:
                count += len(q.start) * -(-others[1] // block_k)
                count += len(k.start) * -(-others[0] // block_q)
            return count

        return min(own, raster, key=visited)

    @on_cpu
    def allows(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        layout: TokenLayout,
        kv_layout: TokenLayout | None = None,
    ) -> torch.Tensor:
        """Which (query, key) pairs the pattern keeps.

        Args:
            q, k: token indices, int64, shapes that broadcast (``[Lq, 1]`` and ``[Lk]`` give the
                mask).
            layout: what the queries are; kv_layout: what the keys are, if not the same.

        Returns:
            bool of the broadcast shape. Text lengths are a run-time matter and play no part.

        Raises:
            ValueError: a size does not fit a grid, or the grids of the two layouts differ.
        """
        kv_layout = paired_layouts(layout, kv_layout)
        shape = torch.broadcast_shapes(q.shape, k.shape)
        kept = torch.full(shape, self.outside, dtype=torch.bool, device=q.device)
        for (q_start, grid), (k_start, _) in zip(layout.grids, kv_layout.grids, strict=False):
            inside = ((q >= q_start) & (q < q_start + grid.numel)) & (
                (k >= k_start) & (k < k_start + grid.numel)
            )
            q_index, k_index = (
                (q - q_start).clamp(0, grid.numel - 1),
                (k - k_start).clamp(0, grid.numel - 1),
            )
            self.check(grid)
            rule = self.keeps(grid.coordinates(q_index), grid.coordinates(k_index), grid)
            kept = torch.where(inside, rule, kept)
        return kept

    @on_cpu
    def density(self, layout: TokenLayout, kv_layout: TokenLayout | None = None) -> float:
        """Kept share of all (query, key) pairs of the sequence, text at its capacity, by exact
        count.

        Raises:
            ValueError: as ``allows``.
        """
        kv_layout = paired_layouts(layout, kv_layout)
        total = layout.length * kv_layout.length
        paired = [grid for (_, grid), _ in zip(layout.grids, kv_layout.grids, strict=False)]
        for grid in paired:
            self.check(grid)
        kept = sum(self.pairs(grid) for grid in paired)
        if self.outside:
            kept += total - sum(grid.numel**2 for grid in paired)
        return kept / total

    @on_cpu
    def lower(
        self,
        layout: TokenLayout,
        block_q: int = 128,
        block_k: int = 128,
        *,
        partial: PartialPolicy = "exact",
        kv_layout: TokenLayout | None = None,
        order: Order | tuple[Order, Order] | None = None,
    ) -> BlockMap:
        """The block form of the pattern.

        Args:
            layout, kv_layout: what queries and keys are.
            block_q, block_k: most tokens in a block, 1 to 4096.
            partial: what becomes of partly kept blocks: ``exact`` masks them, ``promote`` keeps
                them whole (superset of the rule), ``drop`` leaves them out (subset).
            order: token order of every grid, or a pair for queries and keys; default: the
                pattern's own.

        Raises:
            ValueError: a size does not fit, or a query block is left without any key.
        """
        kv_layout = paired_layouts(layout, kv_layout)
        for name, size in (("block_q", block_q), ("block_k", block_k)):
            check_count(name, size, 1, MAX_BLOCK)
        q_orders: list[Order] = []
        k_orders: list[Order] = []
        unions: list[tuple[Predicate, ...] | None] = []
        for ordinal in range(max(len(layout.grids), len(kv_layout.grids))):
            both = ordinal < min(len(layout.grids), len(kv_layout.grids))
            grid = (layout if ordinal < len(layout.grids) else kv_layout).grids[ordinal][1]
            q_order: Order
            k_order: Order
            if order is not None:
                q_order, k_order = order if isinstance(order, tuple) else (order, order)
            elif both:
                others = layout.length - grid.numel, kv_layout.length - grid.numel
                q_order, k_order = self._best(grid, block_q, block_k, others)
            else:  # a grid without a partner is kept whole
                q_order = k_order = LineOrder()
            if both:
                self.check(grid)
            if ordinal < len(layout.grids):
                q_orders.append(q_order)
                unions.append(self.predicates(grid) if both else None)
            if ordinal < len(kv_layout.grids):
                k_orders.append(k_order)
        return build_map(
            sequence_blocks(layout, tuple(q_orders), block_q),
            sequence_blocks(kv_layout, tuple(k_orders), block_k),
            unions,
            partial=partial,
            outside=self.outside,
            description=str(self),
        )


def visited_blocks(predicates: tuple[Predicate, ...], q: OrderedBlocks, k: OrderedBlocks) -> int:
    """Block pairs that some predicate keeps a pair of."""
    some = torch.zeros(len(q.start), len(k.start), dtype=torch.bool)
    for predicate in predicates:
        some |= predicate.classify(q, k)[0]
    return int(some.sum())


def paired_layouts(layout: TokenLayout, kv_layout: TokenLayout | None) -> TokenLayout:
    """The key layout; its grids must equal the query grids of the same number."""
    if not isinstance(layout, TokenLayout):
        raise TypeError(
            f"layout={layout!r} must be a TokenLayout, for example TokenLayout(Grid(21, 30, 52))"
        )
    if kv_layout is None:
        return layout
    if not isinstance(kv_layout, TokenLayout):
        raise TypeError(f"kv_layout={kv_layout!r} must be a TokenLayout or None")
    for number, ((_, own), (_, other)) in enumerate(
        zip(layout.grids, kv_layout.grids, strict=False)
    ):
        if own != other:
            raise ValueError(
                f"kv_layout has grid {other} where layout has {own} (grid {number}); a pattern "
                "relates equal grids, so put keys of another shape into a further grid, which is "
                "kept whole"
            )
    return kv_layout
