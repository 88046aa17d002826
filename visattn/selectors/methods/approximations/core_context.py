"""What is near in full, what is far as one core token of each block."""

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
    """The own and the neighbouring blocks token by token, the others by a weighted mean: the tokens
    of a block are pooled into a core token by the softmax of their products with a query of it.

    Args:
        keep: blocks of a row at least, or the share of them: those of highest pooled score beyond
            the neighbours.
        block: tokens of a block; order: ``"tiles"``, ``"hilbert"`` or ``"raster"``.

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
