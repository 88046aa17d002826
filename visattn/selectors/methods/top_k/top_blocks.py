"""Top blocks: a general selector whose stages are parameters."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from visattn._arguments import check_block, check_flag, check_keep, check_share, check_word
from visattn.geometry.layout import TokenLayout
from visattn.patterns.base.head_pattern import HeadPattern
from visattn.selectors.selector import (
    ORDERS,
    SEARCHED_MASSES,
    SEARCHED_SHARES,
    BlockSelector,
    Stages,
)
from visattn.selectors.stages.always_kept import AlwaysKept
from visattn.selectors.stages.choose import ChoiceRule, TopK, TopP
from visattn.selectors.stages.scores import (
    Antidiagonal,
    Bounds,
    ExactMass,
    Gate,
    Pooled,
    Representative,
    Sampled,
    Score,
    SubTiles,
)
from visattn.selectors.stages.selection import PooledRest, SampledRest

__all__ = ["RESTS", "SCORES", "TopBlocks"]

SCORES: dict[str, Score] = {
    "pooled": Pooled(),
    "sub_tiles": SubTiles(),
    "representative": Representative(),
    "exact": ExactMass(),
    "bounds": Bounds(),
    "sampled": Sampled(),
    "antidiagonal": Antidiagonal(),
}
GATE = "gate:"
RESTS: dict[str, PooledRest | SampledRest | None] = {
    "drop": None,
    "pooled": PooledRest(),
    "variance": PooledRest(variance=True),
    "first_order": PooledRest(first_order=True),
    "sample": SampledRest(),
}


@dataclass(frozen=True, eq=False)
class TopBlocks(BlockSelector):
    """The key blocks with the highest scores for each query block; every stage is a parameter.

    Args:
        keep: an int is a number of blocks of each row, a float the share of them. The query's own
            block and the other blocks that are always kept count towards it. With ``mass``, it is
            the least number.
        mass: if given, keep the smallest set of blocks that holds this share of the mass.
        score: one of ``pooled``, ``sub_tiles``, ``representative``, ``exact``, ``bounds``,
            ``sampled`` and ``antidiagonal``, or ``"gate:NAME"`` of a gate that ``register_gate``
            registered.
        rest: treatment of the unselected blocks: ``drop``, ``pooled``, ``variance``,
            ``first_order`` or ``sample``.
        order: order in which tokens are cut into blocks: ``"tiles"``, ``"hilbert"`` or
            ``"raster"``.
        block: most tokens of a query block and of a key block, 1 to 65536.
        first_frame: always keep the blocks of the first frame.
        sink: always keep the first block of each grid.
        neighbours: always keep the blocks next to the query's own.

    Example:
        >>> import torch
        >>> from visattn import Grid, TokenLayout, sparse_attention
        >>> from visattn.selectors import TopBlocks
        >>> layout = TokenLayout(Grid(2, 8, 8))
        >>> q, k, v = torch.randn(3, 1, 2, layout.length, 16)
        >>> sparse_attention(q, k, v, TopBlocks(keep=0.5, block=16, rest="pooled"), layout).shape
        torch.Size([1, 2, 128, 16])

    Source:
        This project: the common form of the methods that pool and choose; Jenga, Draft and the
        others are patterns of their own.
    Default:
        own
    Differences:
        none
    """

    keep: int | float = 0.25
    mass: float | None = None
    score: str = "pooled"
    rest: str = "drop"
    order: str = "tiles"
    block: int = 64
    first_frame: bool = False
    sink: bool = False
    neighbours: bool = False

    name: ClassVar[str] = "top_blocks"
    color: ClassVar[str] = "#cc79a7"
    example: ClassVar[str] = "top_blocks(0.3, block=8, rest='variance')"
    row_independent: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_keep("keep", self.keep)
        if self.mass is not None:
            check_share("mass", self.mass, above=True)
        if not (isinstance(self.score, str) and self.score.startswith(GATE)):
            check_word("score", self.score, (*SCORES, f"{GATE}NAME"))
        check_word("rest", self.rest, RESTS)
        check_word("order", self.order, ORDERS)
        check_block("block", self.block)
        for field in ("first_frame", "sink", "neighbours"):
            check_flag(field, getattr(self, field))

    @property
    def learns(self) -> bool:
        return self.score == "exact"

    @classmethod
    def search_budgets(cls, block: int) -> dict[str, list[HeadPattern]]:
        return {
            "pooled top-k": [cls(keep, block=block) for keep in SEARCHED_SHARES],
            "pooled top-k + means": [
                cls(keep, rest="pooled", block=block) for keep in SEARCHED_SHARES
            ],
            "pooled top-k + first order": [
                cls(keep, rest="first_order", block=block) for keep in SEARCHED_SHARES
            ],
            "pooled top-p": [cls(0.01, mass=mass, block=block) for mass in SEARCHED_MASSES],
        }

    def stages(self, layout: TokenLayout) -> Stages:
        choose: ChoiceRule = TopK(self.keep)
        if self.mass is not None:
            choose = TopP(self.mass, least=self.keep, counted=True)
        gated = self.score.startswith(GATE)
        return Stages(
            score=Gate(self.score.removeprefix(GATE)) if gated else SCORES[self.score],
            choose=choose,
            always_kept=AlwaysKept(
                first_frame=self.first_frame, sink=self.sink, neighbours=self.neighbours
            ),
            rest=RESTS[self.rest],
            orders=(self.order, self.order),
            blocks=(self.block, self.block),
        )
