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
    """Blocks scored by sums of logits along antidiagonals, up to a share of the mass.

    The score of a block uses one antidiagonal in each cell of ``stride`` x ``stride`` tokens. The
    smallest set of blocks that holds the share is kept.

    Args:
        mass: the share of the mass.
        stride: sides of a cell in tokens; each block is cut into runs of this length.
        block: tokens of a block.
        sink: keep the first key block for all queries. The authors' code does so for masks that are
            not causal, apparently by accident.
        own: always keep the query's own block.

    Example:
        >>> import torch
        >>> from visattn import Grid, TokenLayout, sparse_attention
        >>> from visattn.selectors import XAttention
        >>> layout = TokenLayout(Grid(2, 8, 8))
        >>> q, k, v = torch.randn(3, 1, 2, layout.length, 16)
        >>> sparse_attention(q, k, v, XAttention(mass=0.6, stride=4, block=16), layout).shape
        torch.Size([1, 2, 128, 16])

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
