"""NABLA: a share of the pooled softmax and a window of tiles."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from visattn._arguments import check_flag, check_share
from visattn.geometry.layout import Grid, TokenLayout
from visattn.geometry.orders import BoxOrder
from visattn.patterns.sliding_tile import SlidingTile
from visattn.selectors.selector import BlockSelector, Stages
from visattn.selectors.stages.always_kept import AlwaysKept
from visattn.selectors.stages.choose import TopP
from visattn.selectors.stages.scores import Pooled

__all__ = ["NABLA"]


@dataclass(frozen=True, eq=False)
class NABLA(BlockSelector):
    """The smallest set of blocks that holds a share of the pooled softmax, and a window of tiles.

    Args:
        mass: the share that is kept: ``P`` in the authors' configurations (0.9, 0.8 or 0.7), and
            ``thr`` in their function.
        window: sides of the window in tiles, or None for no window: tiles within ``window // 2`` of
            the query's tile along each axis are kept too. Published: ``(11, 3, 3)``.
        tile: sides of a tile, (frames, height, width) in tokens; each tile is a block.
        clamped: move the window inward at the borders, as SlidingTile does. Otherwise the part
            outside the grid is cut off.
        own: always keep the query's own tile, which every window includes.

    Example:
        >>> import torch
        >>> from visattn import Grid, TokenLayout, sparse_attention
        >>> from visattn.selectors import NABLA
        >>> layout = TokenLayout(Grid(2, 8, 8))
        >>> q, k, v = torch.randn(3, 1, 2, layout.length, 16)
        >>> sparse_attention(q, k, v, NABLA(mass=0.6, window=None, tile=(1, 4, 4)), layout).shape
        torch.Size([1, 2, 128, 16])

    Source:
        Mikhailov et al. (2025), "NABLA: Neighborhood Adaptive Block-Level Attention", arXiv
        2507.13546. Code: github.com/kandinskylab/kandinsky-5 (commit 6e2a805).
    Default:
        code
    Differences:
        - The tiles are in raster order instead of a fractal one, which does not change the result.
        - Grids of any size, with smaller tiles at the borders.
    """

    mass: float = 0.9
    window: tuple[int, int, int] | None = (11, 3, 3)
    tile: tuple[int, int, int] = (1, 8, 8)
    clamped: bool = False
    own: bool = False
    name: ClassVar[str] = "nabla"
    color: ClassVar[str] = "#9c4a7c"
    example: ClassVar[str] = "nabla(0.6, None, (1, 2, 3))"
    row_independent: ClassVar[bool] = True
    before: ClassVar[dict[str, object]] = {"clamped": True, "own": True}

    def __post_init__(self) -> None:
        check_share("mass", self.mass, above=True)
        BoxOrder(self.tile)
        if self.window is not None:
            SlidingTile(self.tile, self.window)
        check_flag("clamped", self.clamped)
        check_flag("own", self.own)

    def check(self, grid: Grid) -> None:
        if self.window is not None and self.clamped:
            SlidingTile(self.tile, self.window).check(grid)

    def stages(self, layout: TokenLayout) -> Stages:
        order = BoxOrder(self.tile)
        size = self.tile[0] * self.tile[1] * self.tile[2]
        always_kept = AlwaysKept(own_block=self.own)
        if self.window is not None and self.clamped:
            pattern = SlidingTile(self.tile, self.window)
            always_kept = AlwaysKept(own_block=self.own, pattern=pattern)
        elif self.window is not None:
            always_kept = AlwaysKept(own_block=self.own, window=(self.tile, self.window))
        return Stages(
            score=Pooled(log_size=False),
            choose=TopP(self.mass),
            always_kept=always_kept,
            orders=(order, order),
            blocks=(size, size),
        )
