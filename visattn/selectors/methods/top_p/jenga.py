"""Jenga: attention carving along a space-filling curve."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from visattn._arguments import check_block, check_keep, check_share
from visattn.geometry.layout import TokenLayout
from visattn.selectors.selector import BlockSelector, Stages
from visattn.selectors.stages.always_kept import AlwaysKept
from visattn.selectors.stages.choose import TopP
from visattn.selectors.stages.scores import Pooled

__all__ = ["Jenga"]


@dataclass(frozen=True, eq=False)
class Jenga(BlockSelector):
    """Attention carving: blocks along a space-filling curve, up to a share of the pooled softmax.

    The smallest set of blocks that holds the share is kept, at least ``keep`` blocks, and the
    blocks next to the query's own.

    Args:
        mass: the share of the pooled softmax.
        keep: least number of blocks, or the share of them.
        block: tokens of a block.

    Example:
        >>> import torch
        >>> from visattn import Grid, TokenLayout, sparse_attention
        >>> from visattn.selectors import Jenga
        >>> layout = TokenLayout(Grid(2, 8, 8))
        >>> q, k, v = torch.randn(3, 1, 2, layout.length, 16)
        >>> sparse_attention(q, k, v, Jenga(mass=0.3, keep=0.25, block=16), layout).shape
        torch.Size([1, 2, 128, 16])

    Source:
        Zhang et al. (2025), "Training-Free Efficient Video Generation via Dynamic Token Carving",
        NeurIPS 2025, arXiv 2505.16864. Code: github.com/dvlab-research/Jenga (commit 6905150).
    Default:
        code
    Differences:
        - The curve is Hilbert's in the enclosing cube, cut to the grid; theirs is Gilbert's.
        - Logits of text keys are not amplified.
    """

    mass: float = 0.5
    keep: int | float = 0.2
    block: int = 128
    name: ClassVar[str] = "jenga"
    color: ClassVar[str] = "#d98cb3"
    example: ClassVar[str] = "jenga(0.3, 0.1, 8)"
    row_independent: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_share("mass", self.mass, above=True)
        check_keep("keep", self.keep)
        check_block("block", self.block)

    def stages(self, layout: TokenLayout) -> Stages:
        return Stages(
            score=Pooled(log_size=False),
            choose=TopP(self.mass, least=self.keep),
            always_kept=AlwaysKept(neighbours=True),
            orders=("hilbert", "hilbert"),
            blocks=(self.block, self.block),
        )
