"""What every static pattern is: a token rule, its exact count of pairs, and a lowering to
blocks."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import ClassVar, TypeAlias

import torch

from visattn._arguments import check_count
from visattn.blocks.block_map import BlockMap, PartialPolicy, build_map
from visattn.blocks.predicates import Places, Predicate
from visattn.geometry.layout import Grid, TokenLayout, on_cpu
from visattn.geometry.orders import LineOrder, Order, OrderedBlocks, sequence_blocks
from visattn.patterns.base.head_pattern import HeadPattern

MAX_BLOCK = 4096
# What the search may choose from: a function of a number from 0 to 1 that keeps more pairs the
# larger the number is or, where sizes come in steps, a list.
SearchMembers: TypeAlias = "Callable[[float], Pattern] | Sequence[Pattern]"


class Pattern(HeadPattern):
    """Base of the static patterns; each is for one head.

    A pattern is a rule about the pairs inside a grid. All other pairs are kept: text and prefix
    keys for every query, all keys for text queries, and pairs of two different grids. With a
    separate key layout, the rule holds between the grids with the same number, which must be equal.

    A subclass defines ``keeps``, ``pairs``, ``predicates`` and ``orders``, and ``covered`` where a
    query can be left without a key. Callers ask ``on(grid)``, which keeps the answers.

    One file adds a pattern: a class that sets ``name`` is registered in ``PATTERNS``, parsed, drawn
    and tested with the others, and the search tries what its ``search_members`` returns.

    Attributes:
        example: the written form of a typical instance, for pictures and tests. It is legal on a
            grid of 6 x 8 x 8 tokens and on every larger one.
        outside: whether pairs that are not inside one grid are kept.

    Example:
        >>> from visattn import Grid, TokenLayout
        >>> from visattn.patterns import Diagonal, Pattern
        >>> pattern = Diagonal(64)
        >>> isinstance(pattern, Pattern)
        True
        >>> round(pattern.density(TokenLayout(Grid(6, 8, 8))), 3)
        0.308
    """

    example: ClassVar[str]
    outside: ClassVar[bool] = True

    @classmethod
    def search_members(cls, grid: Grid, block: int) -> dict[str, SearchMembers]:
        """Return the instances that the search may choose from, by the label of their candidates.

        The search asks only classes that define this method themselves: a subclass does not
        inherit the candidates of its base.

        Args:
            grid: the grid of the tokens.
            block: tokens of a block.

        Returns:
            for each label a function of a number from 0 to 1 that keeps more pairs the larger the
            number is or, where sizes come in steps, a list.
        """
        return {}

    @abstractmethod
    def keeps(self, q: Places, k: Places, grid: Grid) -> torch.Tensor:
        """Return which pairs of one grid are kept: the definition of the pattern.

        Args:
            q: coordinates ``(t, h, w)`` of queries, int64, that broadcast with those of ``k``.
            k: coordinates ``(t, h, w)`` of keys.
            grid: the grid.

        Returns:
            bool, of the broadcast shape.
        """

    @abstractmethod
    def pairs(self, grid: Grid) -> int:
        """Return the exact number of kept pairs inside one grid."""

    @abstractmethod
    def predicates(self, grid: Grid) -> tuple[Predicate, ...]:
        """Return the same rule as a union of predicates, for the block form."""

    @abstractmethod
    def orders(self, grid: Grid, block_q: int, block_k: int) -> tuple[Order, Order]:
        """Return the orders of queries and keys in which the pattern visits few blocks.

        Args:
            grid: the grid.
            block_q: most tokens in a block of queries.
            block_k: most tokens in a block of keys.
        """

    def covered(self, grid: Grid) -> torch.Tensor | bool:
        """Return which queries of a grid see a key of it: one answer for all, or bool ``[n]``."""
        return True

    def on(self, grid: Grid) -> PatternOnGrid:
        """Return the pattern on one grid, which computes each of its forms once.

        Args:
            grid: the grid.

        Example:
            >>> from visattn import Grid
            >>> from visattn.patterns import Diagonal
            >>> Diagonal(1).on(Grid(2, 2, 2)).pairs
            22
        """
        return _on_grid(type(self), self, grid)

    def check(self, grid: Grid) -> None:
        """Raise ValueError when a size does not fit the grid, or a query would see no key of it."""
        self.on(grid).check()

    @on_cpu
    def allows(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        layout: TokenLayout,
        kv_layout: TokenLayout | None = None,
    ) -> torch.Tensor:
        """Return which (query, key) pairs the pattern keeps.

        Args:
            q: token indices of queries, int64. ``[Lq, 1]`` with ``k`` of ``[Lk]`` gives the mask.
            k: token indices of keys, int64, of a shape that broadcasts with that of ``q``.
            layout: the layout of the queries.
            kv_layout: the layout of the keys; default: ``layout``.

        Returns:
            bool of the broadcast shape. Valid text lengths belong to a call and are not considered.

        Raises:
            ValueError: a size does not fit a grid, or the grids of the two layouts differ.
        """
        kv_layout = paired_layouts(layout, kv_layout)
        shape = torch.broadcast_shapes(q.shape, k.shape)
        allowed = torch.full(shape, self.outside, dtype=torch.bool, device=q.device)
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
            allowed = torch.where(inside, rule, allowed)
        return allowed

    @on_cpu
    def density(self, layout: TokenLayout, kv_layout: TokenLayout | None = None) -> float:
        """Return the kept share of all (query, key) pairs of the sequence, by exact count.

        Args:
            layout: the layout of the queries; text counts with its capacity.
            kv_layout: the layout of the keys; default: ``layout``.

        Raises:
            ValueError: as ``allows``.
        """
        kv_layout = paired_layouts(layout, kv_layout)
        total = layout.length * kv_layout.length
        paired = [
            self.on(grid) for (_, grid), _ in zip(layout.grids, kv_layout.grids, strict=False)
        ]
        for on_grid in paired:
            on_grid.check()
        count = sum(on_grid.pairs for on_grid in paired)
        if self.outside:
            count += total - sum(on_grid.grid.numel**2 for on_grid in paired)
        return count / total

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
        """Return the block form of the pattern.

        Args:
            layout: the layout of the queries.
            block_q: most tokens in a block of queries, 1 to 4096.
            block_k: most tokens in a block of keys, 1 to 4096.
            partial: how partly kept blocks are treated: ``exact`` masks them, ``promote`` keeps
                them whole (a superset of the rule), ``drop`` leaves them out (a subset).
            kv_layout: the layout of the keys; default: ``layout``.
            order: token order of every grid, or a pair for queries and keys; default: the
                pattern's own.

        Raises:
            ValueError: a size does not fit, or a query block is left without any key.
        """
        kv_layout = paired_layouts(layout, kv_layout)
        for name, size in (("block_q", block_q), ("block_k", block_k)):
            if check_count(name, size, 1) > MAX_BLOCK:
                raise ValueError(f"{name}={size} must be at most {MAX_BLOCK}")
        q_orders: list[Order] = []
        k_orders: list[Order] = []
        unions: list[tuple[Predicate, ...] | None] = []
        for ordinal in range(max(len(layout.grids), len(kv_layout.grids))):
            both = ordinal < min(len(layout.grids), len(kv_layout.grids))
            grid = (layout if ordinal < len(layout.grids) else kv_layout).grids[ordinal][1]
            on_grid = self.on(grid)
            q_order: Order
            k_order: Order
            if order is not None:
                q_order, k_order = order if isinstance(order, tuple) else (order, order)
            elif both:
                others = layout.length - grid.numel, kv_layout.length - grid.numel
                q_order, k_order = on_grid.best_orders(block_q, block_k, others)
            else:  # a grid without a partner is kept whole
                q_order = k_order = LineOrder()
            if both:
                on_grid.check()
            if ordinal < len(layout.grids):
                q_orders.append(q_order)
                unions.append(on_grid.predicates if both else None)
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


@dataclass(frozen=True, eq=False)
class PatternOnGrid:
    """A pattern on one grid; each form is computed when first asked for, and kept.

    Tensors lie on the CPU and must not be written to.

    Args:
        pattern: the pattern.
        grid: the grid.

    Raises:
        ValueError: on access of a form, when a size does not fit the grid.
    """

    pattern: Pattern
    grid: Grid
    _orders: dict[tuple[int, int], tuple[Order, Order]] = field(
        init=False, repr=False, default_factory=dict
    )

    @cached_property
    @on_cpu
    def predicates(self) -> tuple[Predicate, ...]:
        """The rule as a union of predicates."""
        return self.pattern.predicates(self.grid)

    @cached_property
    @on_cpu
    def pairs(self) -> int:
        """The number of kept pairs."""
        return self.pattern.pairs(self.grid)

    @cached_property
    @on_cpu
    def covered(self) -> torch.Tensor | bool:
        """Which queries see some key of the grid: one answer for all, or bool ``[n]``."""
        return self.pattern.covered(self.grid)

    @on_cpu
    def orders(self, block_q: int, block_k: int) -> tuple[Order, Order]:
        """Return the pattern's own orders of queries and keys, for blocks of these sizes."""
        if (block_q, block_k) not in self._orders:
            orders = self.pattern.orders(self.grid, block_q, block_k)
            self._orders[block_q, block_k] = orders
        return self._orders[block_q, block_k]

    @cached_property
    @on_cpu
    def _num_without_key(self) -> int:
        covered = self.covered
        if self.pattern.outside and isinstance(covered, torch.Tensor):
            return int((~covered).sum())
        return 0

    def check(self) -> None:
        """Raise ValueError when a size does not fit the grid, or a query would see no key of it."""
        _ = self.predicates  # checks the sizes
        if self._num_without_key:
            raise ValueError(
                f"{self.pattern} leaves {self._num_without_key} of the {self.grid.numel} queries "
                f"of grid {self.grid} without any key; add the offset (0, 0, 0), a column, or "
                "Diagonal(0)"
            )

    @on_cpu
    def best_orders(
        self, block_q: int, block_k: int, others: tuple[int, int]
    ) -> tuple[Order, Order]:
        """Return the pattern's own orders, or raster order where that visits fewer blocks.

        Small boxes are many, and each meets all tokens outside the grid.

        Args:
            block_q: most tokens in a block of queries.
            block_k: most tokens in a block of keys.
            others: numbers of queries and of keys outside the grid.
        """
        preferred = self.orders(block_q, block_k)
        raster: tuple[Order, Order] = (LineOrder(), LineOrder())
        if preferred == raster:
            return preferred

        def visited(orders: tuple[Order, Order]) -> int:
            q, k = orders[0].blocks(self.grid, block_q), orders[1].blocks(self.grid, block_k)
            count = visited_blocks(self.predicates, q, k)
            if self.pattern.outside:
                count += len(q.start) * -(-others[1] // block_k)
                count += len(k.start) * -(-others[0] // block_q)
            return count

        return min(preferred, raster, key=visited)


@lru_cache(maxsize=32)
def _on_grid(kind: type[Pattern], pattern: Pattern, grid: Grid) -> PatternOnGrid:
    """``kind`` tells apart two classes that are written alike, as when a notebook redefines one."""
    return PatternOnGrid(pattern, grid)


def visited_blocks(predicates: tuple[Predicate, ...], q: OrderedBlocks, k: OrderedBlocks) -> int:
    """Return the number of block pairs of which some predicate keeps a pair of tokens."""
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
    for number, ((_, q_grid), (_, k_grid)) in enumerate(
        zip(layout.grids, kv_layout.grids, strict=False)
    ):
        if q_grid != k_grid:
            raise ValueError(
                f"kv_layout has grid {k_grid} where layout has {q_grid} (grid {number}); a pattern "
                "relates equal grids, so put keys of another shape into a further grid, which is "
                "kept whole"
            )
    return kv_layout
