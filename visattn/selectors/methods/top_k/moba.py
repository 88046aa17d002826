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
    """The key blocks with the highest gates for each query, always including its own block.

    The gate of a query for a block is its product with the mean key of the block, without scale.

    Args:
        keep: number of blocks of a query, including its own, or the share of them.
        block: tokens of a key block, 1 to 65536; small ones (16 to 64) select more precisely.
        queries: queries that choose together by their mean; 1 is the published gate of each token.
        order: order in which tokens are cut into blocks: ``"raster"``, ``"tiles"`` or
            ``"hilbert"``.

    Example:
        >>> import torch
        >>> from visattn import Grid, TokenLayout, sparse_attention
        >>> from visattn.selectors import MoBA
        >>> layout = TokenLayout(Grid(2, 8, 8))
        >>> q, k, v = torch.randn(3, 1, 2, layout.length, 16)
        >>> sparse_attention(q, k, v, MoBA(keep=0.5, block=16), layout).shape
        torch.Size([1, 2, 128, 16])

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
