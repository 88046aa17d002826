"""XAttention: antidiagonals of the logits score a block."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from visattn._arguments import check_block, check_flag, check_share
from visattn.geometry.layout import TokenLayout
from visattn.patterns.base.head_pattern import HeadPattern
from visattn.selectors.selector import SEARCHED_MASSES, BlockSelector, Stages
from visattn.selectors.stages.always_kept import AlwaysKept
from visattn.selectors.stages.choose import TopP
from visattn.selectors.stages.scores import Antidiagonal

__all__ = ["XAttention"]


@dataclass(frozen=True, eq=False)
class XAttention(BlockSelector):
    """Antidiagonals of the logits, one in every cell of ``stride`` x ``stride``, as a measure of a
    block; the smallest set with a share of the mass.

    Args:
        mass: the share; stride: of the antidiagonals, which divides blocks; block: their tokens.
        sink: keep the first block of the keys for all queries, as the code does, though its mask
            that is not causal seems to do so by accident.
        own: keep the query's own block.

    Source:
        Xu et al. (2025), "XAttention: Block Sparse Attention with Antidiagonal Scoring", arXiv
        2503.16428. Code: github.com/mit-han-lab/x-attention (commit e379887).
    Default:
        code. It is that of ``xattn_estimate(causal=False)``.
    Differences:
        - Text is kept and not scored.
        - A sequence with several grids has a first block of keys in each.
    """

    mass: float = 0.9
    stride: int = 8
    block: int = 128
    sink: bool = True
    own: bool = False
    name: ClassVar[str] = "xattention"
    color: ClassVar[str] = "#b0578f"
    example: ClassVar[str] = "xattention(0.6, 3, 8)"
    row_independent: ClassVar[bool] = True
    before: ClassVar[dict[str, object]] = {"sink": False, "own": True}

    def __post_init__(self) -> None:
        check_share("mass", self.mass, above=True)
        check_block("stride", self.stride)
        check_block("block", self.block)
        check_flag("sink", self.sink)
        check_flag("own", self.own)

    @classmethod
    def search_budgets(cls, block: int) -> dict[str, list[HeadPattern]]:
        return {"antidiagonal": [cls(mass, 4, block) for mass in SEARCHED_MASSES]}

    def stages(self, layout: TokenLayout) -> Stages:
        return Stages(
            score=Antidiagonal(self.stride),
            choose=TopP(self.mass),
            always_kept=AlwaysKept(own_block=self.own, sink=self.sink),
            orders=("raster", "raster"),
            blocks=(self.block, self.block),
        )
