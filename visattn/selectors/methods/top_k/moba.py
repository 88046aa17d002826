"""Mixture of block attention."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from visattn._arguments import check_block, check_keep, check_word
from visattn.geometry.layout import TokenLayout
from visattn.selectors.selector import ORDERS, BlockSelector, Stages
from visattn.selectors.stages.choose import TopK
from visattn.selectors.stages.scores import Pooled

__all__ = ["MoBA"]


@dataclass(frozen=True, eq=False)
class MoBA(BlockSelector):
    """The key blocks of highest gate for each query, its own block always among them.

    A query token's gate is its product with the mean key of each block, not scaled.

    Args:
        keep: blocks of a query, its own one among them: a number, or a share.
        block: tokens of a key block, 1 to 65536; small ones (16 to 64) find more.
        queries: queries that choose together by their mean; 1 is the published gate of each token.
        order: ``"raster"``, ``"tiles"`` or ``"hilbert"``.

    Source:
        Lu et al. (2025), "MoBA: Mixture of Block Attention for Long-Context LLMs", arXiv
        2502.13189; FlashMoBA (arXiv 2511.11571) for small blocks. Code: github.com/MoonshotAI/MoBA
        (commit 61e456b).
    Default:
        code
    Differences:
        - Nothing is causal here, so that no block lies in the future and none is cut.
        - Equal gates go to the lower index.
    """

    keep: int | float = 0.25
    block: int = 64
    queries: int = 1
    order: str = "raster"
    name: ClassVar[str] = "moba"
    color: ClassVar[str] = "#b9699a"
    example: ClassVar[str] = "moba(0.3, 8)"
    row_independent: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_keep("keep", self.keep)
        check_block("block", self.block)
        check_block("queries", self.queries)
        check_word("order", self.order, ORDERS)

    def stages(self, layout: TokenLayout) -> Stages:
        return Stages(
            score=Pooled(scaled=False, log_size=False),
            choose=TopK(self.keep),
            orders=("raster" if self.queries == 1 else self.order, self.order),
            blocks=(self.queries, self.block),
        )
