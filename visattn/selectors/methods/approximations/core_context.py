"""Near blocks in full, far blocks as one core token each."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from visattn._arguments import check_block, check_keep, check_word
from visattn.geometry.layout import TokenLayout
from visattn.selectors.selector import ORDERS, BlockSelector, Stages
from visattn.selectors.stages.always_kept import AlwaysKept
from visattn.selectors.stages.choose import TopK
from visattn.selectors.stages.inputs import Inputs
from visattn.selectors.stages.scores import Pooled
from visattn.selectors.stages.selection import PooledRest, Selection

__all__ = ["CoreContext"]


@dataclass(frozen=True, eq=False)
class CoreContext(BlockSelector):
    """Near blocks token by token, all other blocks as one core token each.

    The query's own block and its neighbours are seen in full. The core token of another block is a
    weighted mean of its tokens; the weights are the softmax of their products with a query of the
    block.

    Args:
        keep: least number of blocks of a row that are seen in full, or the share of them. The own
            and neighbouring blocks count towards it; the best by pooled score are added.
        block: tokens of a block.
        order: order in which tokens are cut into blocks: ``"tiles"``, ``"hilbert"`` or
            ``"raster"``.

    Example:
        >>> import torch
        >>> from visattn import Grid, TokenLayout, sparse_attention
        >>> from visattn.selectors import CoreContext
        >>> layout = TokenLayout(Grid(2, 8, 8))
        >>> q, k, v = torch.randn(3, 1, 2, layout.length, 16)
        >>> sparse_attention(q, k, v, CoreContext(keep=1, block=16), layout).shape
        torch.Size([1, 2, 128, 16])

    Source:
        Chen et al. (2024), "Core Context Aware Transformers for Long Context Language Modeling",
        arXiv 2412.12465.
    Default:
        own. The paper's models are causal and fine-tuned.
    Differences:
        - The weights are those of the block's mean query; the paper's of its last one.
        - The logit of a core token has + the entropy of the weights, with which the mean query
          finds the exact mass of the block.
        - No fine-tuning.
    """

    keep: int | float = 1
    block: int = 64
    order: str = "tiles"
    name: ClassVar[str] = "core_context"
    color: ClassVar[str] = "#6d3a58"
    example: ClassVar[str] = "core_context(1, 8)"

    def __post_init__(self) -> None:
        check_keep("keep", self.keep)
        check_block("block", self.block)
        check_word("order", self.order, ORDERS)

    def stages(self, layout: TokenLayout) -> Stages:
        return Stages(
            score=Pooled(),
            choose=TopK(self.keep),
            always_kept=AlwaysKept(neighbours=True),
            rest=PooledRest(),
            orders=(self.order, self.order),
            blocks=(self.block, self.block),
        )

    def finished(self, selection: Selection, scores: torch.Tensor, inputs: Inputs) -> Selection:
        keys = inputs.for_heads(inputs.k_blocks).to(inputs.q_mean)
        # queries and keys have the same blocks
        logits = torch.einsum("bhnd,bhnsd->bhns", inputs.q_mean, keys) * inputs.scale
        weights = logits.masked_fill(~inputs.k_side.exists, -torch.inf).softmax(-1)
        return replace(selection, weights=weights.nan_to_num(0))
