"""DFSAttn: blocks scored by the softmax among short runs of their tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from visattn._arguments import check_block, check_flag, check_keep
from visattn.geometry.layout import TokenLayout
from visattn.selectors.selector import BlockSelector, Stages, rounded_down
from visattn.selectors.stages.always_kept import AlwaysKept
from visattn.selectors.stages.choose import TopK
from visattn.selectors.stages.scores import SubTiles

__all__ = ["DFSAttn"]


@dataclass(frozen=True, eq=False)
class DFSAttn(BlockSelector):
    """Blocks along a 3-D Hilbert curve, scored by a softmax among short runs of their tokens.

    The score of a block is the sum over its runs.

    Args:
        keep: share of the blocks of a row, rounded down but at least one, or a number of blocks.
        block: tokens of a block.
        part: tokens of a run; published are 16 and 32.
        own: always keep the query's own block, instead of the last one that would be kept.

    Example:
        >>> import torch
        >>> from visattn import Grid, TokenLayout, sparse_attention
        >>> from visattn.selectors import DFSAttn
        >>> layout = TokenLayout(Grid(2, 8, 8))
        >>> q, k, v = torch.randn(3, 1, 2, layout.length, 16)
        >>> sparse_attention(q, k, v, DFSAttn(keep=0.5, block=16, part=4), layout).shape
        torch.Size([1, 2, 128, 16])

    Source:
        Hu et al. (2026), "DFSAttn: Dynamic Fine-grained Sparse Attention for Efficient Video
        Generation", ICML 2026, arXiv 2605.23445. Code: github.com/jessica-hujie/DFSAttn (commit
        dad4ace).
    Default:
        code
    Differences:
        - The blocks of the text come on top; in the code for HunyuanVideo they count among those
          that are kept.
        - Choices are not kept between steps unless the plan says so (``Reuse``).
    """

    keep: int | float = 0.3
    block: int = 128
    part: int = 16
    own: bool = False
    name: ClassVar[str] = "dfsattn"
    color: ClassVar[str] = "#f2b5d0"
    example: ClassVar[str] = "dfsattn(0.3, 8, 3)"
    row_independent: ClassVar[bool] = True
    before: ClassVar[dict[str, object]] = {"own": True}

    def __post_init__(self) -> None:
        check_keep("keep", self.keep)
        check_block("block", self.block)
        check_block("part", self.part)
        check_flag("own", self.own)

    def stages(self, layout: TokenLayout) -> Stages:
        return Stages(
            score=SubTiles(self.part, log_size=False),
            choose=TopK(rounded_down(self.keep, layout, "hilbert", self.block)),
            always_kept=AlwaysKept(own_block=self.own),
            orders=("hilbert", "hilbert"),
            blocks=(self.block, self.block),
        )
