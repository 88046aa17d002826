"""Base classes of the dynamic patterns, which choose blocks from the queries and keys of a call.

A selector is a frozen dataclass with a written form, like a static pattern. Most selectors are
built from the stages layout -> summary -> score -> select -> rest.
"""

from __future__ import annotations

import functools
from abc import abstractmethod
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch

from visattn.geometry.layout import Grid, TokenLayout, on_cpu
from visattn.geometry.orders import BoxOrder, HilbertOrder, LineOrder, Order, fitted
from visattn.patterns.base.head_pattern import HeadPattern
from visattn.selectors.stages.always_kept import AlwaysKept, always_kept_blocks
from visattn.selectors.stages.blocks import BlockPartition, partition_by_order
from visattn.selectors.stages.choose import ChoiceRule
from visattn.selectors.stages.history import SelectorState
from visattn.selectors.stages.inputs import Inputs
from visattn.selectors.stages.kernels import kernel_levels
from visattn.selectors.stages.scores import Score
from visattn.selectors.stages.selection import PooledRest, SampledRest, Selection, not_finite

__all__ = [
    "ORDERS",
    "SEARCHED_MASSES",
    "SEARCHED_SHARES",
    "BlockSelector",
    "Selector",
    "Stages",
    "grid_blocks",
    "only_grid",
    "order_of",
    "rounded_down",
]

ORDERS = ("raster", "tiles", "hilbert")
SEARCHED_SHARES = (0.12, 0.25, 0.4)  # budgets that the search tries: shares of blocks
SEARCHED_MASSES = (0.6, 0.8)  # and shares of the attention mass
MAX_BLOCK = 1 << 16
MOST_SCORES = 1 << 22  # most scores in memory at a time, if the selector is row independent


def order_of(name: str | Order, grid: Grid, size: int) -> Order:
    """Return an order by its name: ``"raster"``, ``"tiles"`` or ``"hilbert"``.

    ``"tiles"`` are boxes of about ``size`` tokens, one block each. An Order is returned as it is.

    Raises:
        ValueError: the name is unknown.
    """
    if not isinstance(name, str):
        return name
    if name == "raster":
        return LineOrder()
    if name == "hilbert":
        return HilbertOrder()
    if name == "tiles":
        side = 1 << (size.bit_length() - 1) // 3
        return BoxOrder(fitted((side, side, side), grid, size))
    raise ValueError(f"order={name!r} must be one of {', '.join(ORDERS)}")


@functools.lru_cache(maxsize=256)
@on_cpu
def grid_blocks(layout: TokenLayout, name: str, size: int) -> int:
    """Return how many blocks the grids of a layout have, for an order by its name."""
    return sum(
        len(order_of(name, grid, size).blocks(grid, size).length) for _, grid in layout.grids
    )


def rounded_down(keep: int | float, layout: TokenLayout, name: str, size: int) -> int:
    """Return a number of blocks: an int as it is, a float as that share of the grids' blocks.

    The share is rounded down, to at least 1.
    """
    if isinstance(keep, int):
        return keep
    return max(1, int(keep * grid_blocks(layout, name, size)))


def only_grid(layout: TokenLayout, selector: Selector) -> Grid:
    """Return the one grid of a layout.

    Raises:
        ValueError: the layout has no grid or several.
    """
    if len(layout.grids) != 1:
        raise ValueError(
            f"{selector} needs a layout with one grid, and {layout} has {len(layout.grids)}; use "
            "top_blocks"
        )
    return layout.grids[0][1]


class Selector(HeadPattern):
    """Base class of the dynamic patterns; each subclass is a frozen dataclass.

    A new selector is one file: a class that sets ``name`` is registered in ``SELECTORS``, parsed,
    drawn and tested like the others, and the search tries its ``search_budgets``.

    Attributes:
        name: the name in plans and on the command line.
        family: the group of patterns that share a hue in pictures.
        color: ``"#rrggbb"``, for pictures.
        example: the written form of a small instance that is legal on every grid, for tests and
            demonstrations.
        reusable: whether a later call may reuse a selection.

    Example:
        >>> from visattn.selectors import SELECTORS, Selector
        >>> all(issubclass(kind, Selector) for kind in SELECTORS.values())
        True
        >>> SELECTORS["jenga"].example
        'jenga(0.3, 0.1, 8)'
    """

    family: ClassVar[str] = "dynamic"
    example: ClassVar[str]
    reusable: ClassVar[bool] = True

    @classmethod
    def search_budgets(cls, block: int) -> dict[str, list[HeadPattern]]:
        """Return the instances that the search tries, by label.

        Args:
            block: tokens of a block.
        """
        return {}

    @property
    def learns(self) -> bool:
        """Whether ``learn`` is called after each call, to keep its LSE in ``past``."""
        return False

    def learn(self, past: SelectorState, lse: torch.Tensor, highest: torch.Tensor | None) -> None:
        """Store in ``past`` what the next call needs.

        Args:
            past: the state of this pattern in this generation.
            lse: LSE of the call, ``[B, H, L]``.
            highest: with ``records``, for each block pair the largest logit minus the LSE of the
                previous call, ``[B, H, Nq, Nk]``; None at the first call.
        """
        past.lse = lse

    @property
    def records(self) -> bool:
        """Whether attention records the largest logit of each block pair for ``learn``."""
        return False

    @abstractmethod
    def select(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        layout: TokenLayout,
        scale: float,
        *,
        kernels: bool = False,
        past: SelectorState | None = None,
    ) -> Selection:
        """Choose what the heads of a call see.

        Args:
            q: queries ``[B, H, L, D]``.
            k: keys ``[B, Hk, L, D]``.
            v: values ``[B, Hk, L, D]``.
            layout: the segments of the sequence.
            scale: factor of the logits.
            kernels: use the Triton kernels where there are any.
            past: state after the last call of the same generation; the method may change it.

        Returns:
            The selection for these heads.

        Raises:
            ValueError: a size does not fit the layout.
        """


@dataclass(frozen=True)
class Stages:
    """The stages of a selector whose blocks are the same for all heads.

    Args:
        score: scores the block pairs.
        choose: turns scores into levels.
        always_kept: block pairs that are kept whatever their score.
        rest: treatment of the unselected blocks; None drops them.
        orders: orders of queries and of keys, each an Order or its name.
        blocks: most tokens of a query block and of a key block.
    """

    score: Score
    choose: ChoiceRule
    always_kept: AlwaysKept = field(default_factory=AlwaysKept)
    rest: PooledRest | SampledRest | None = None
    orders: tuple[str | Order, str | Order] = ("tiles", "tiles")
    blocks: tuple[int, int] = (64, 64)

    def grid_orders(self, layout: TokenLayout) -> tuple[tuple[Order, ...], tuple[Order, ...]]:
        """Return the orders of queries and of keys, one for each grid."""
        (q_name, k_name), (q_size, k_size) = self.orders, self.blocks
        return (
            tuple(order_of(q_name, grid, q_size) for _, grid in layout.grids),
            tuple(order_of(k_name, grid, k_size) for _, grid in layout.grids),
        )

    def sides(
        self, layout: TokenLayout, device: torch.device
    ) -> tuple[BlockPartition, BlockPartition]:
        """Return the blocks of queries and of keys."""
        q_orders, k_orders = self.grid_orders(layout)
        return (
            partition_by_order(layout, q_orders, self.blocks[0], device),
            partition_by_order(layout, k_orders, self.blocks[1], device),
        )


    def forced(self, layout: TokenLayout, device: torch.device) -> torch.Tensor:
        """Return the block pairs that are kept whatever their score, bool ``[1, 1, Nq, Nk]``."""
        sides = self.sides(layout, torch.device("cpu"))
        return always_kept_blocks(self.always_kept, layout, self.grid_orders(layout), sides, device)


class BlockSelector(Selector):
    """A selector whose blocks are the same for all heads; subclasses define its stages.

    Attributes:
        row_independent: whether the selection for a query block depends on the scores of that
            block alone. If True, long sequences are processed a few query blocks at a time, to save
            memory. A subclass may set it only if it does not override ``scores``, ``adjusted``,
            ``finished`` or ``widened``.

    Example:
        >>> import torch
        >>> from visattn import Grid, TokenLayout
        >>> from visattn.selectors import BlockSelector, TopBlocks
        >>> issubclass(TopBlocks, BlockSelector)
        True
        >>> layout = TokenLayout(Grid(2, 4, 4))
        >>> stages = TopBlocks(keep=0.5, block=8).stages(layout)
        >>> [len(side) for side in stages.sides(layout, torch.device("cpu"))]
        [4, 4]
    """

    row_independent: ClassVar[bool] = False

    @abstractmethod
    def stages(self, layout: TokenLayout) -> Stages:
        """Return the stages for a layout."""

    def scores(self, stages: Stages, inputs: Inputs) -> torch.Tensor:
        """Return scores ``[B, H, Nq, Nk]``, minus infinity for pairs that cannot be chosen."""
        return stages.score(inputs).masked_fill(~inputs.pairs, -torch.inf)

    def select(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        layout: TokenLayout,
        scale: float,
        *,
        kernels: bool = False,
        past: SelectorState | None = None,
    ) -> Selection:
        stages = self.stages(layout)
        sides = stages.sides(layout, q.device)
        lse = past.lse if past is not None and self.learns else None
        inputs = Inputs(q, k, v, layout, scale, *sides, kernels, lse)
        forced = stages.forced(layout, q.device)
        many = q.shape[0] * q.shape[1] * forced.shape[2] * forced.shape[3]
        parts = (stages.choose, stages.score, self)
        if many > MOST_SCORES and all(part.row_independent for part in parts):
            step = max(1, forced.shape[2] * MOST_SCORES // many)
            return self._in_parts(stages, inputs, forced, step)
        scores = self.scores(stages, inputs)
        forced = self.widened(forced, scores, inputs)
        levels = choose(stages.choose, scores, sides[1].length, forced, kernels)
        levels = self.adjusted(levels, inputs)
        selection = Selection.of(*sides, levels, stages.choose.levels, stages.rest)
        return self.finished(selection, scores, inputs).guarded(scores)

    def _in_parts(
        self, stages: Stages, inputs: Inputs, forced: torch.Tensor, step: int
    ) -> Selection:
        """Compute the selection ``step`` query blocks at a time, to limit the memory of scores."""
        sides, levels_of_rows = (inputs.q_side, inputs.k_side), []
        broken = torch.zeros(*inputs.q.shape[:2], 1, 1, dtype=torch.bool, device=forced.device)
        for begin in range(0, len(sides[0]), step):
            rows = slice(begin, begin + step)
            part = replace(inputs, q_side=sides[0].part(rows), whole=inputs)
            scores = self.scores(stages, part)
            broken |= not_finite(scores)
            levels_of_rows.append(
                choose(stages.choose, scores, sides[1].length, forced[:, :, rows], inputs.kernels)
            )
        levels = torch.cat(levels_of_rows, 2)
        return Selection.of(*sides, levels, stages.choose.levels, stages.rest).guarded_by(broken)

    def adjusted(self, levels: torch.Tensor, inputs: Inputs) -> torch.Tensor:
        """Return the levels, changed by properties of the call; by default unchanged."""
        return levels

    def finished(self, selection: Selection, scores: torch.Tensor, inputs: Inputs) -> Selection:
        """Return the selection with additions besides the levels, such as weights."""
        return selection

    def widened(
        self, forced: torch.Tensor, scores: torch.Tensor, inputs: Inputs
    ) -> torch.Tensor:
        """Return the pairs to keep in any case, bool; broadcasts to the scores.

        Subclasses add pairs that depend on the call.
        """
        return forced


def choose(
    select: ChoiceRule,
    scores: torch.Tensor,
    length: torch.Tensor,
    forced: torch.Tensor,
    kernels: bool,
) -> torch.Tensor:
    """Return ``select(scores, length, forced)``; ``kernels``: by the kernel if it has the rule."""
    if kernels:
        levels = kernel_levels(select, scores, length, forced)
        if levels is not None:
            return levels
    return select(scores, length, forced)
