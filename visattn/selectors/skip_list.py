"""Blocks that once had little mass are not looked at again.

Source: LiteAttention (2025, a fork of FlashAttention 3): attention itself notes the
largest logit of each tile; a tile none of whose queries came near its row's largest is left out at
all later steps, so that the list of what is skipped only grows and costs nothing to make.

Differences: the largest logit is compared with the LSE that the queries had one step before, and
not with the running maximum, which depends on the order of the tiles; ``least`` is thus a
probability. What is forced is never skipped. ``every`` begins a new list.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch

from visattn.layout import TokenLayout, check_count
from visattn.selectors.force import Force, forced_blocks
from visattn.selectors.past import Past
from visattn.selectors.scores import Pooled
from visattn.selectors.selection import Selection
from visattn.selectors.selector import (
    ORDERS,
    Selector,
    Stages,
    check_block,
    check_share,
    check_word,
)
from visattn.selectors.selects import TopK

__all__ = ["SkipList"]


@dataclass(frozen=True, eq=False)
class SkipList(Selector):
    """All blocks at the first two steps; then those in which some query had a key of some mass.

    Args:
        least: the share of a query's mass that no key of a skipped block had.
        every: steps after which a new list begins.
        block: tokens of a block; order: ``"hilbert"``, ``"tiles"`` or ``"raster"``.

    It needs the steps of a pipeline with a plan; elsewhere it is dense.
    """

    least: float = 1e-3
    every: int = 1000
    block: int = 64
    order: str = "hilbert"
    name: ClassVar[str] = "skip_list"
    keeps: ClassVar[bool] = False  # each call adds to the list

    def __post_init__(self) -> None:
        check_share("least", self.least, above=True)
        check_count("every", self.every, 1)
        check_block("block", self.block)
        check_word("order", self.order, ORDERS)

    @property
    def learns(self) -> bool:
        return True

    @property
    def records(self) -> bool:
        return True

    def select(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        layout: TokenLayout,
        scale: float,
        *,
        kernels: bool = False,
        past: Past | None = None,
    ) -> Selection:
        stages = Stages(
            Pooled(), TopK(), orders=(self.order, self.order), blocks=(self.block, self.block)
        )
        sides = stages.sides(layout, q.device)
        forced = forced_blocks(Force(), layout, stages.grid_orders(layout), sides)
        shape = (*q.shape[:2], len(sides[0]), len(sides[1]))
        past = Past() if past is None else past
        if past.calls % self.every == 0:
            past.skipped = past.highest = None
        if past.highest is not None:
            quiet = (past.highest < math.log(self.least)) & ~forced
            past.skipped = quiet if past.skipped is None else past.skipped | quiet
        past.calls += 1
        kept = torch.ones(shape, dtype=torch.bool, device=q.device)
        if past.skipped is not None:
            kept = ~past.skipped
        return Selection.of(*sides, kept.to(torch.uint8))
