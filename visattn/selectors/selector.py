"""Dynamic patterns: a rule by which a head's blocks are chosen from the queries and keys of a call.

A selector is a frozen dataclass like a static pattern, with a written form; it names, or brings,
the stages layout -> summary -> score -> select -> rest.
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
MOST_SCORES = 1 << 22  # of a call that are there at a time, where rows choose for themselves


def order_of(name: str | Order, grid: Grid, size: int) -> Order:
    """The order that a selector names, if it names one: ``"raster"``, ``"tiles"`` (boxes of about
    ``size`` tokens, a block each) or ``"hilbert"``.

    Raises:
        ValueError: another name.
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
    """How many blocks the grids of a layout are cut into, in an order by name."""
    return sum(
        len(order_of(name, grid, size).blocks(grid, size).length) for _, grid in layout.grids
    )


def rounded_down(keep: int | float, layout: TokenLayout, name: str, size: int) -> int:
    """A number of blocks: an int is one, a float the share of the grids' blocks, rounded down, at
    least 1."""
    if isinstance(keep, int):
        return keep
    return max(1, int(keep * grid_blocks(layout, name, size)))


def only_grid(layout: TokenLayout, selector: Selector) -> Grid:
    """The one grid of a layout.

    Raises:
        ValueError: it has none, or several.
    """
    if len(layout.grids) != 1:
        raise ValueError(
            f"{selector} needs a layout with one grid, and {layout} has {len(layout.grids)}; use "
            "top_blocks"
        )
    return layout.grids[0][1]


class Selector(HeadPattern):
    """Base of the dynamic patterns; each subclass is a frozen dataclass.

    One file adds a selector: a class that sets ``name`` is registered in ``SELECTORS``, parsed,
    drawn and tested with the others, and its ``search_budgets`` are tried by the search.

    Attributes:
        name: the name in plans and on the command line.
        family: the group of patterns that share a hue in pictures.
        color: ``"#rrggbb"``, for pictures.
        example: the written form of a small instance that is legal on every grid, for tests and
            demonstrations.
        reusable: whether a selection may serve another call.
    """

    family: ClassVar[str] = "dynamic"
    example: ClassVar[str]
    reusable: ClassVar[bool] = True

    @classmethod
    def search_budgets(cls, block: int) -> dict[str, list[HeadPattern]]:
        """Return the instances that the search tries, by the label of their candidates.

        Args:
            block: tokens of a block.
        """
        return {}

    @property
    def learns(self) -> bool:
        """Whether the LSE of a call is to be kept in ``past``."""
        return False

    def learn(self, past: SelectorState, lse: torch.Tensor, highest: torch.Tensor | None) -> None:
        """After a call: what the next one is to know.

        Args:
            lse: ``[B, H, L]``; highest: with ``records`` the largest logit less the LSE of the call
                before, of each block pair, ``[B, H, Nq, Nk]``; None at the first call.
        """
        past.lse = lse

    @property
    def records(self) -> bool:
        """Whether also the largest logits of its blocks are."""
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
        """What the heads of a call see: q ``[B, H, L, D]``, k and v ``[B, Hk, L, D]``.

        Args:
            kernels: compute what there are kernels for by them.
            past: what is known of the last call of the same generation; it may be written to.

        Raises:
            ValueError: a size does not fit the layout.
        """


@dataclass(frozen=True)
class Stages:
    """What a selector whose blocks are the same for all heads is made of.

    Args:
        score, choose, force, rest: the stages.
        orders: of queries and keys, by name or themselves; blocks: most tokens of their blocks.
    """

    score: Score
    choose: ChoiceRule
    always_kept: AlwaysKept = field(default_factory=AlwaysKept)
    rest: PooledRest | SampledRest | None = None
    orders: tuple[str | Order, str | Order] = ("tiles", "tiles")
    blocks: tuple[int, int] = (64, 64)

    def grid_orders(self, layout: TokenLayout) -> tuple[tuple[Order, ...], tuple[Order, ...]]:
        """The orders of queries and keys, one for each grid."""
        (q_name, k_name), (q_size, k_size) = self.orders, self.blocks
        return (
            tuple(order_of(q_name, grid, q_size) for _, grid in layout.grids),
            tuple(order_of(k_name, grid, k_size) for _, grid in layout.grids),
        )

    def sides(
        self, layout: TokenLayout, device: torch.device
    ) -> tuple[BlockPartition, BlockPartition]:
        """The blocks of queries and keys."""
        q_orders, k_orders = self.grid_orders(layout)
        return (
            partition_by_order(layout, q_orders, self.blocks[0], device),
            partition_by_order(layout, k_orders, self.blocks[1], device),
        )


    def forced(self, layout: TokenLayout, device: torch.device) -> torch.Tensor:
        """Block pairs that are kept whatever their score, bool ``[1, 1, Nq, Nk]``."""
        sides = self.sides(layout, torch.device("cpu"))
        return always_kept_blocks(self.always_kept, layout, self.grid_orders(layout), sides, device)


class BlockSelector(Selector):
    """A selector whose blocks are the same for all heads; subclasses define its stages.

    Attributes:
        row_independent: whether the blocks of a query block depend on the scores of that block
            alone. True lets long sequences be selected a few query blocks at a time; it requires
            that ``scores``, ``adjusted``, ``finished`` and ``widened`` are those of this class.
    """

    row_independent: ClassVar[bool] = False

    @abstractmethod
    def stages(self, layout: TokenLayout) -> Stages:
        """What it is made of on a layout."""

    def scores(self, own: Stages, inputs: Inputs) -> torch.Tensor:
        """Scores ``[B, H, Nq, Nk]``, minus infinity for pairs that are not chosen among."""
        return own.score(inputs).masked_fill(~inputs.pairs, -torch.inf)

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
        own = self.stages(layout)
        sides = own.sides(layout, q.device)
        lse = past.lse if past is not None and self.learns else None
        inputs = Inputs(q, k, v, layout, scale, *sides, kernels, lse)
        forced = own.forced(layout, q.device)
        many = q.shape[0] * q.shape[1] * forced.shape[2] * forced.shape[3]
        stages = (own.choose, own.score, self)
        if many > MOST_SCORES and all(stage.row_independent for stage in stages):
            step = max(1, forced.shape[2] * MOST_SCORES // many)
            return self._in_parts(own, inputs, forced, step)
        scores = self.scores(own, inputs)
        forced = self.widened(forced, scores, inputs)
        levels = choose(own.choose, scores, sides[1].length, forced, kernels)
        levels = self.adjusted(levels, inputs)
        selection = Selection.of(*sides, levels, own.choose.levels, own.rest)
        return self.finished(selection, scores, inputs).guarded(scores)

    def _in_parts(
        self, own: Stages, inputs: Inputs, forced: torch.Tensor, step: int
    ) -> Selection:
        """The selection, ``step`` query blocks at a time, so that the scores of all of them are
        never there together."""
        sides, found = (inputs.q_side, inputs.k_side), []
        broken = torch.zeros(*inputs.q.shape[:2], 1, 1, dtype=torch.bool, device=forced.device)
        for begin in range(0, len(sides[0]), step):
            rows = slice(begin, begin + step)
            part = replace(inputs, q_side=sides[0].part(rows), whole=inputs)
            scores = self.scores(own, part)
            broken |= not_finite(scores)
            found.append(
                choose(own.choose, scores, sides[1].length, forced[:, :, rows], inputs.kernels)
            )
        levels = torch.cat(found, 2)
        return Selection.of(*sides, levels, own.choose.levels, own.rest).guarded_by(broken)

    def adjusted(self, levels: torch.Tensor, inputs: Inputs) -> torch.Tensor:
        """The levels, with what only the call can tell."""
        return levels

    def finished(self, selection: Selection, scores: torch.Tensor, inputs: Inputs) -> Selection:
        """The selection, with what goes beyond its levels."""
        return selection

    def widened(
        self, forced: torch.Tensor, scores: torch.Tensor, inputs: Inputs
    ) -> torch.Tensor:
        """What is forced, with what only the call can tell; bool, broadcasts to the scores."""
        return forced


def choose(
    select: ChoiceRule,
    scores: torch.Tensor,
    length: torch.Tensor,
    forced: torch.Tensor,
    kernels: bool,
) -> torch.Tensor:
    """``select(scores, length, forced)``, by the kernel where it is asked for and has the rule."""
    if kernels:
        levels = kernel_levels(select, scores, length, forced)
        if levels is not None:
            return levels
    return select(scores, length, forced)
