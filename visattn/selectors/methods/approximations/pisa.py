"""PISA: the best blocks in full, the others by a Taylor series."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from visattn._arguments import check_block, check_flag, check_keep
from visattn.geometry.layout import TokenLayout
from visattn.patterns.base.head_pattern import HeadPattern
from visattn.selectors.selector import (
    SEARCHED_SHARES,
    BlockSelector,
    Stages,
    rounded_down,
)
from visattn.selectors.stages.always_kept import AlwaysKept
from visattn.selectors.stages.choose import TopK
from visattn.selectors.stages.scores import Pooled
from visattn.selectors.stages.selection import PooledRest

__all__ = ["PISA"]


@dataclass(frozen=True, eq=False)
class PISA(BlockSelector):
    """The best blocks in full, the other blocks by a Taylor series.

    A block of the series is seen as its mean key and value, with the weight of its tokens, plus the
    first-order term of the values.

    Args:
        keep: share of the blocks of a row, rounded down but at least one, or a number of blocks.
        block: tokens of a block.
        first_order: include the first-order term.
        own: always keep the query's own block, instead of the last one that would be kept.

    Example:
        >>> import torch
        >>> from visattn import Grid, TokenLayout, sparse_attention
        >>> from visattn.selectors import PISA
        >>> layout = TokenLayout(Grid(2, 8, 8))
        >>> q, k, v = torch.randn(3, 1, 2, layout.length, 16)
        >>> sparse_attention(q, k, v, PISA(keep=0.25, block=16), layout).shape
        torch.Size([1, 2, 128, 16])

    Source:
        Li et al. (2026), "PISA: Piecewise Sparse Attention Is Wiser for Efficient Diffusion
        Transformers", arXiv 2602.01077. Code: github.com/xie-lab-ml/piecewise-sparse-attention
        (commit 8604494).
    Default:
        code
    Differences:
        - Blocks are boxes of tokens in videos too; the code has square tiles of images only.
        - Text is seen in full and is no part of the series; the code scores it with the rest.
    """

    keep: int | float = 0.15
    block: int = 64
    first_order: bool = True
    own: bool = False
    name: ClassVar[str] = "pisa"
    color: ClassVar[str] = "#e3a8c8"
    example: ClassVar[str] = "pisa(0.3, 8)"
    row_independent: ClassVar[bool] = True
    before: ClassVar[dict[str, object]] = {"own": True}

    def __post_init__(self) -> None:
        check_keep("keep", self.keep)
        check_block("block", self.block)
        check_flag("first_order", self.first_order)
        check_flag("own", self.own)

    @classmethod
    def search_budgets(cls, block: int) -> dict[str, list[HeadPattern]]:
        return {"piecewise sparse": [cls(keep, block) for keep in SEARCHED_SHARES[:2]]}

    def stages(self, layout: TokenLayout) -> Stages:
        return Stages(
            score=Pooled(log_size=False),
            choose=TopK(rounded_down(self.keep, layout, "tiles", self.block)),
            always_kept=AlwaysKept(own_block=self.own),
            rest=PooledRest(first_order=self.first_order),
            blocks=(self.block, self.block),
        )
