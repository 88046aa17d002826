"""Draft attention: pairs of tiles chosen at low resolution."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from visattn._arguments import check_block, check_flag, check_share
from visattn.geometry.layout import TokenLayout
from visattn.geometry.orders import BoxOrder
from visattn.selectors.selector import BlockSelector, Stages
from visattn.selectors.stages.always_kept import AlwaysKept
from visattn.selectors.stages.choose import TopK
from visattn.selectors.stages.inputs import Inputs
from visattn.selectors.stages.prefix import top_count
from visattn.selectors.stages.scores import Pooled

__all__ = ["Draft"]


@dataclass(frozen=True, eq=False)
class Draft(BlockSelector):
    """Tiles within a frame, chosen by attention at low resolution.

    Each tile is pooled to one query and one key. Of all pairs of tiles of a head, the share with
    the highest pooled softmax is kept.

    Args:
        keep: share of the pairs of a head.
        tile: rows and columns of a tile.
        own: always keep the query's own tile, instead of the last pairs that would be kept.

    Example:
        >>> import torch
        >>> from visattn import Grid, TokenLayout, sparse_attention
        >>> from visattn.selectors import Draft
        >>> layout = TokenLayout(Grid(2, 8, 8))
        >>> q, k, v = torch.randn(3, 1, 2, layout.length, 16)
        >>> sparse_attention(q, k, v, Draft(keep=0.5, tile=(4, 4)), layout).shape
        torch.Size([1, 2, 128, 16])

    Source:
        Shen et al. (2025), "DraftAttention: Fast Video Diffusion via Low-Resolution Attention
        Guidance", arXiv 2505.14708. Code: github.com/shawnricecake/draft-attention (commit
        f3c81d5).
    Default:
        code
    Differences:
        - Exactly the share is kept, rounded up to pairs; theirs keeps one pair more, and all that
          equal the last one.
        - A row that would keep no tile keeps its best one, instead of the last pair of all; in
          theirs such a row sees no image token.
        - Grids of any size, with smaller tiles at the borders.
    """

    keep: float = 0.25
    tile: tuple[int, int] = (8, 16)
    own: bool = False
    name: ClassVar[str] = "draft"
    color: ClassVar[str] = "#c45f95"
    example: ClassVar[str] = "draft(0.3, (2, 3))"
    before: ClassVar[dict[str, object]] = {"own": True}

    def __post_init__(self) -> None:
        check_share("keep", self.keep, above=True)
        if not isinstance(self.tile, tuple) or len(self.tile) != 2:
            raise TypeError(f"tile={self.tile!r} must be two integers, (rows, columns)")
        for side in self.tile:
            check_block("tile", side)
        check_flag("own", self.own)

    def stages(self, layout: TokenLayout) -> Stages:
        order = BoxOrder((1, *self.tile))
        size = self.tile[0] * self.tile[1]
        return Stages(
            score=_PerRow(),
            choose=TopK(float(self.keep), scope="head"),
            always_kept=AlwaysKept(own_block=self.own),
            orders=(order, order),
            blocks=(size, size),
        )

    def widened(
        self, forced: torch.Tensor, scores: torch.Tensor, inputs: Inputs
    ) -> torch.Tensor:
        # Forced pairs count first. The best pair of a row is kept anyway, unless the row would
        # keep none.
        return forced | top_count(scores, 1)


@dataclass(frozen=True)
class _PerRow(Pooled):
    """Pooled scores, normalised by a softmax over each row so that rows can be compared."""

    log_size: bool = False

    def __call__(self, inputs: Inputs) -> torch.Tensor:
        scores = super().__call__(inputs).masked_fill(~inputs.pairs, -torch.inf)
        return scores.log_softmax(-1).masked_fill(~inputs.pairs, -torch.inf)
