"""Bi-level routing: all heads share one choice of regions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from visattn._arguments import check_flag, check_keep
from visattn.geometry.layout import TokenLayout
from visattn.geometry.orders import BoxOrder
from visattn.selectors.selector import BlockSelector, Stages
from visattn.selectors.stages.always_kept import AlwaysKept
from visattn.selectors.stages.choose import TopK
from visattn.selectors.stages.inputs import Inputs
from visattn.selectors.stages.scores import Pooled

__all__ = ["BiLevel"]


@dataclass(frozen=True, eq=False)
class BiLevel(BlockSelector):
    """Bi-level routing: all heads see the same regions.

    Regions are scored by the mean query and the mean key over all heads.

    Args:
        keep: number of regions of a row, or the share of them.
        region: sides of a region, (frames, height, width) in tokens.
        own: always keep the query's own region, instead of the last one that would be kept.

    Example:
        >>> import torch
        >>> from visattn import Grid, TokenLayout, sparse_attention
        >>> from visattn.selectors import BiLevel
        >>> layout = TokenLayout(Grid(2, 8, 8))
        >>> q, k, v = torch.randn(3, 1, 2, layout.length, 16)
        >>> sparse_attention(q, k, v, BiLevel(keep=0.5, region=(1, 4, 4)), layout).shape
        torch.Size([1, 2, 128, 16])

    Source:
        Zhu et al. (2023), "BiFormer: Vision Transformer with Bi-Level Routing Attention", CVPR
        2023, arXiv 2303.08810. Code: github.com/rayleizhu/BiFormer (commit 1697bbb).
    Default:
        code
    Differences:
        - Regions are boxes of a given size; theirs a given number of windows.
        - Logits have the scale of the model's attention; theirs that of all heads' channels.
        - The depth-wise convolution of the values is trained, and not here.
        - Heads that do not run this pattern have no part in the choice.
    """

    keep: int | float = 0.25
    region: tuple[int, int, int] = (1, 8, 8)
    own: bool = False
    name: ClassVar[str] = "bi_level"
    color: ClassVar[str] = "#94507e"
    example: ClassVar[str] = "bi_level(0.3, (1, 2, 2))"
    before: ClassVar[dict[str, object]] = {"own": True}

    def __post_init__(self) -> None:
        check_keep("keep", self.keep)
        BoxOrder(self.region)
        check_flag("own", self.own)

    def stages(self, layout: TokenLayout) -> Stages:
        order = BoxOrder(self.region)
        size = self.region[0] * self.region[1] * self.region[2]
        return Stages(
            score=Pooled(log_size=False),
            choose=TopK(self.keep),
            always_kept=AlwaysKept(own_block=self.own),
            orders=(order, order),
            blocks=(size, size),
        )

    def scores(self, stages: Stages, inputs: Inputs) -> torch.Tensor:
        scores = stages.score(inputs).mean(1, keepdim=True).expand(-1, inputs.heads, -1, -1)
        return scores.masked_fill(~inputs.pairs, -torch.inf)
