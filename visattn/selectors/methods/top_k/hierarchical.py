"""Two levels of choice: first regions, then blocks within the chosen regions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from visattn._arguments import check_block, check_flag, check_keep, check_word
from visattn.geometry.layout import TokenLayout
from visattn.selectors.selector import ORDERS, BlockSelector, Stages
from visattn.selectors.stages.always_kept import AlwaysKept
from visattn.selectors.stages.choose import TopK, candidates
from visattn.selectors.stages.inputs import Inputs
from visattn.selectors.stages.prefix import count_of, top_count
from visattn.selectors.stages.scores import Pooled

__all__ = ["Hierarchical"]


@dataclass(frozen=True, eq=False)
class Hierarchical(BlockSelector):
    """The best blocks of the best regions, and the query's own block.

    Args:
        keep: number of blocks of a row, or the share of all blocks.
        regions: number of regions of a row whose blocks are candidates, or the share of them.
        region: blocks of a region, which are consecutive in the order.
        block: tokens of a block.
        order: order in which tokens are cut into blocks: ``"hilbert"``, ``"tiles"`` or
            ``"raster"``.
        neighbours: always keep the blocks next to the query's own.
        first_frame: always keep the blocks of the first frame.

    Example:
        >>> import torch
        >>> from visattn import Grid, TokenLayout, sparse_attention
        >>> from visattn.selectors import Hierarchical
        >>> layout = TokenLayout(Grid(2, 8, 8))
        >>> q, k, v = torch.randn(3, 1, 2, layout.length, 16)
        >>> sparse_attention(q, k, v, Hierarchical(keep=0.5, region=2, block=16), layout).shape
        torch.Size([1, 2, 128, 16])

    Source:
        Lee et al. (2024), "A Training-free Sub-quadratic Cost Transformer Model Serving Framework
        With Hierarchically Pruned Attention" (HiP), arXiv 2406.09827.
    Default:
        own. Chunks of keys are scored by one key each there, split and scored again down to blocks,
        which a video's few blocks do not need.
    Differences:
        - Two levels.
        - A region and a block are scored by their means.
        - The own block is always kept; other local keys and the first ones only with ``neighbours``
          and ``first_frame``.
    """

    keep: int | float = 0.2
    regions: int | float = 0.5
    region: int = 8
    block: int = 64
    order: str = "hilbert"
    neighbours: bool = False
    first_frame: bool = False
    name: ClassVar[str] = "hierarchical"
    color: ClassVar[str] = "#c88fb0"
    example: ClassVar[str] = "hierarchical(0.2, 0.5, 3, 4)"

    def __post_init__(self) -> None:
        check_keep("keep", self.keep)
        check_keep("regions", self.regions)
        check_block("region", self.region)
        check_block("block", self.block)
        check_word("order", self.order, ORDERS)
        check_flag("neighbours", self.neighbours)
        check_flag("first_frame", self.first_frame)

    def stages(self, layout: TokenLayout) -> Stages:
        return Stages(
            score=Pooled(),
            choose=TopK(1.0, inside=False),  # only kept blocks have a finite score
            always_kept=AlwaysKept(neighbours=self.neighbours, first_frame=self.first_frame),
            orders=(self.order, self.order),
            blocks=(self.block, self.block),
        )

    def scores(self, stages: Stages, inputs: Inputs) -> torch.Tensor:
        scores = super().scores(stages, inputs)
        coarse = self._regions(inputs)
        kept = top_count(coarse, count_of(self.regions, candidates(coarse)))
        owner = torch.arange(scores.shape[-1], device=scores.device) // self.region
        looked = kept.index_select(-1, owner)
        wanted = count_of(self.keep, candidates(scores))
        scores = scores.masked_fill(~looked, -torch.inf)
        return torch.where(top_count(scores, wanted), scores, -torch.inf)

    def _regions(self, inputs: Inputs) -> torch.Tensor:
        """Return the scores of the regions, by the mean key of their grid tokens."""
        side = inputs.k_side
        length = (side.length * side.grid).expand(*inputs.k_mean.shape[:3])
        pad = -len(side) % self.region
        weight = torch.nn.functional.pad(length, (0, pad)).unflatten(-1, (-1, self.region))
        sums = torch.nn.functional.pad(inputs.k_mean * length[..., None], (0, 0, 0, pad))
        total = weight.sum(-1)
        means = sums.unflatten(2, (-1, self.region)).sum(3) / total.clamp(min=1)[..., None]
        scores = inputs.q_mean @ means.mT * inputs.scale + total.clamp(min=1).log()[..., None, :]
        chooses = inputs.pairs.any(-1)[..., None]
        gone = (total == 0)[..., None, :] | ~chooses
        out: torch.Tensor = scores.float().masked_fill(gone, -torch.inf)
        return out
