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
    """The smallest set with a share of the pooled softmax, and a window of tiles with it.

    Args:
        mass: the share that is kept: ``P`` in the authors' configurations (0.9, 0.8 or 0.7), and
            ``thr`` in their function.
        window: tiles per axis, or None for none: along each axis those within ``window // 2`` of
            the query's tile are kept too. Published: ``(11, 3, 3)``.
        tile: of the blocks, per axis.
        clamped: move the window inward at the borders, as SlidingTile does; else what lies outside
            the grid is lost.
        own: keep the query's own tile, which every window does.

    Source:
        Mikhailov et al. (2025), "NABLA: Neighborhood Adaptive Block-Level Attention", arXiv
        2507.13546. Code: github.com/kandinskylab/kandinsky-5 (commit 6e2a805).
    Default:
        code
    Differences:
        - The tiles stand in raster order in place of a fractal one, which changes nothing.
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
        force = AlwaysKept(own_block=self.own)
        if self.window is not None and self.clamped:
            force = AlwaysKept(own_block=self.own, pattern=SlidingTile(self.tile, self.window))
        elif self.window is not None:
            force = AlwaysKept(own_block=self.own, window=(self.tile, self.window))
        return Stages(
            score=Pooled(log_size=False),
            choose=TopP(self.mass),
            always_kept=force,
            orders=(order, order),
            blocks=(size, size),
        )
