"""VSA: cubes of tokens, scored by their means."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from visattn._arguments import check_flag, check_keep
from visattn.geometry.layout import TokenLayout
from visattn.geometry.orders import BoxOrder
from visattn.selectors.selector import BlockSelector, Stages
from visattn.selectors.stages.always_kept import AlwaysKept
from visattn.selectors.stages.choose import TopK
from visattn.selectors.stages.scores import Pooled

__all__ = ["VSA"]


@dataclass(frozen=True, eq=False)
class VSA(BlockSelector):
    """Cubes of tokens, of which the best by pooled score are kept.

    This is video sparse attention without its trained gate, whose initial value is zero.

    Args:
        keep: share of the cubes of a row, rounded up, or a number of cubes.
        tile: sides of a cube, (frames, height, width) in tokens.
        own: always keep the query's own cube, instead of the last one that would be kept.

    Example:
        >>> import torch
        >>> from visattn import Grid, TokenLayout, sparse_attention
        >>> from visattn.selectors import VSA
        >>> layout = TokenLayout(Grid(2, 8, 8))
        >>> q, k, v = torch.randn(3, 1, 2, layout.length, 16)
        >>> sparse_attention(q, k, v, VSA(keep=0.5, tile=(2, 4, 4)), layout).shape
        torch.Size([1, 2, 128, 16])

    Source:
        Zhang et al. (2025), "VSA: Faster Video Diffusion with Trainable Sparse Attention", arXiv
        2505.13389. Code: github.com/hao-ai-lab/FastVideo (commit 2f3d407).
    Default:
        code
    Differences:
        - The coarse branch, whose output a trained gate weighs, is not here.
        - Cubes at the borders are smaller; theirs are padded.
    """

    keep: int | float = 0.125
    tile: tuple[int, int, int] = (4, 4, 4)
    own: bool = False
    name: ClassVar[str] = "vsa"
    color: ClassVar[str] = "#e08fc0"
    example: ClassVar[str] = "vsa(0.3, (2, 2, 2))"
    row_independent: ClassVar[bool] = True
    before: ClassVar[dict[str, object]] = {"own": True}

    def __post_init__(self) -> None:
        check_keep("keep", self.keep)
        BoxOrder(self.tile)
        check_flag("own", self.own)

    def stages(self, layout: TokenLayout) -> Stages:
        order = BoxOrder(self.tile)
        size = self.tile[0] * self.tile[1] * self.tile[2]
        return Stages(
            score=Pooled(log_size=False),
            choose=TopK(self.keep),
            always_kept=AlwaysKept(own_block=self.own),
            orders=(order, order),
            blocks=(size, size),
        )
