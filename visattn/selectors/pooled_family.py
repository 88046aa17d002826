"""Published methods that score blocks by means of their tokens and keep the best ones, as they were
published but for what each says. All choose anew at each call, keep text keys and compute text
queries in full; equal scores go to the lower index, and of a share of the mass the crossing block
is kept."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from visattn.layout import Grid, TokenLayout
from visattn.orders import BoxOrder
from visattn.patterns.sizes import check_flag
from visattn.patterns.sliding_tile import SlidingTile
from visattn.selectors.force import Force
from visattn.selectors.inputs import Inputs
from visattn.selectors.scores import Antidiagonal, Pooled, Sampled, SubTiles
from visattn.selectors.selection import PooledRest
from visattn.selectors.selector import (
    BlockSelector,
    Stages,
    check_block,
    check_keep,
    check_share,
)
from visattn.selectors.selects import TopK, TopP

__all__ = ["ASA", "NABLA", "PISA", "VSA", "DFSAttn", "Draft", "Jenga", "XAttention"]

MEANS = Pooled(log_size=False)


@dataclass(frozen=True, eq=False)
class Jenga(BlockSelector):
    """Attention carving: blocks along a space-filling curve; the smallest set with a share of the
    pooled softmax, at least ``keep``, and the blocks around the query's (Zhang et al. 2025, Jenga,
    NeurIPS 2025, arXiv 2505.16864).

    Args:
        mass: the share; keep: the least, a number of blocks or a share of them.
        block: tokens of a block.

    Differences: a Hilbert curve of the enclosing cube, cut to the grid, in the place of Gilbert's;
    neighbours are blocks whose boxes of coordinates touch; no amplification of text.
    """

    mass: float = 0.5
    keep: int | float = 0.2
    block: int = 128
    name: ClassVar[str] = "jenga"

    def __post_init__(self) -> None:
        check_share("mass", self.mass, above=True)
        check_keep("keep", self.keep)
        check_block("block", self.block)

    def stages(self, layout: TokenLayout) -> Stages:
        return Stages(
            score=MEANS,
            choose=TopP(self.mass, least=self.keep),
            force=Force(neighbours=True),
            orders=("hilbert", "hilbert"),
            blocks=(self.block, self.block),
        )


@dataclass(frozen=True, eq=False)
class Draft(BlockSelector):
    """A draft of the attention at low resolution: tiles within a frame, and of all pairs of a head
    the share with the highest pooled softmax (Shen et al. 2025, DraftAttention, arXiv 2505.14708).

    Args:
        keep: share of the pairs of a head.
        tile: rows and columns of a tile.

    Differences: exactly that share is kept, where a quantile keeps all that are equal to it, and
    every row keeps its own tile; any size, with smaller tiles at the borders.
    """

    keep: float = 0.25
    tile: tuple[int, int] = (8, 16)
    name: ClassVar[str] = "draft"

    def __post_init__(self) -> None:
        check_share("keep", self.keep, above=True)
        if not isinstance(self.tile, tuple) or len(self.tile) != 2:
            raise TypeError(f"tile={self.tile!r} must be two integers, (rows, columns)")
        for side in self.tile:
            check_block("tile", side)

    def stages(self, layout: TokenLayout) -> Stages:
        order = BoxOrder((1, *self.tile))
        size = self.tile[0] * self.tile[1]
        return Stages(
            score=_PerRow(),
            choose=TopK(float(self.keep), scope="head"),
            orders=(order, order),
            blocks=(size, size),
        )


@dataclass(frozen=True)
class _PerRow(Pooled):
    """Pooled, as shares of each row, so that rows can be compared."""

    log_size: bool = False

    def __call__(self, inputs: Inputs) -> torch.Tensor:
        scores = super().__call__(inputs).masked_fill(~inputs.pairs, -torch.inf)
        return scores.log_softmax(-1).masked_fill(~inputs.pairs, -torch.inf)


@dataclass(frozen=True, eq=False)
class DFSAttn(BlockSelector):
    """Blocks along a 3-D Hilbert curve, scored by the softmax among runs of 16 or 32 of their
    tokens, added up (DFSAttn, ICML 2026).

    Args:
        keep: share of the blocks of a row; block: their tokens; part: tokens of a run.

    Differences: choices are not kept between steps unless the plan says so.
    """

    keep: int | float = 0.3
    block: int = 128
    part: int = 16
    name: ClassVar[str] = "dfsattn"

    def __post_init__(self) -> None:
        check_keep("keep", self.keep)
        check_block("block", self.block)
        check_block("part", self.part)

    def stages(self, layout: TokenLayout) -> Stages:
        return Stages(
            score=SubTiles(self.part, log_size=False),
            choose=TopK(self.keep),
            orders=("hilbert", "hilbert"),
            blocks=(self.block, self.block),
        )


@dataclass(frozen=True, eq=False)
class NABLA(BlockSelector):
    """The smallest set with a share of the pooled softmax, and a sliding tile window with it
    (Mikhailov et al. 2025, NABLA, arXiv 2507.13546).

    Args:
        mass: the share that is kept (1 minus the published threshold).
        window: of SlidingTile, in tiles per axis, or None for none.
        tile: of the blocks, per axis.

    Differences: the published order of 8 x 8 patches is that of the tiles here.
    """

    mass: float = 0.9
    window: tuple[int, int, int] | None = None
    tile: tuple[int, int, int] = (1, 8, 8)
    name: ClassVar[str] = "nabla"

    def __post_init__(self) -> None:
        check_share("mass", self.mass, above=True)
        BoxOrder(self.tile)
        if self.window is not None:
            SlidingTile(self.tile, self.window)

    def check(self, grid: Grid) -> None:
        if self.window is not None:
            SlidingTile(self.tile, self.window).check(grid)

    def stages(self, layout: TokenLayout) -> Stages:
        order = BoxOrder(self.tile)
        size = self.tile[0] * self.tile[1] * self.tile[2]
        window = None if self.window is None else SlidingTile(self.tile, self.window)
        return Stages(
            score=MEANS,
            choose=TopP(self.mass),
            force=Force(pattern=window),
            orders=(order, order),
            blocks=(size, size),
        )


@dataclass(frozen=True, eq=False)
class VSA(BlockSelector):
    """Cubes of 4 x 4 x 4 tokens and the best of them by pooled score: video sparse attention
    without its trained gate, which begins at zero (Zhang et al. 2025, VSA, arXiv 2505.13389).

    Args:
        keep: share of the cubes of a row, or a number.
        tile: of a cube, per axis.

    Differences: cubes at the borders are smaller and not padded; the own cube is always kept.
    """

    keep: int | float = 0.125
    tile: tuple[int, int, int] = (4, 4, 4)
    name: ClassVar[str] = "vsa"

    def __post_init__(self) -> None:
        check_keep("keep", self.keep)
        BoxOrder(self.tile)

    def stages(self, layout: TokenLayout) -> Stages:
        order = BoxOrder(self.tile)
        size = self.tile[0] * self.tile[1] * self.tile[2]
        return Stages(
            score=MEANS,
            choose=TopK(self.keep),
            orders=(order, order),
            blocks=(size, size),
        )


@dataclass(frozen=True, eq=False)
class PISA(BlockSelector):
    """The best blocks in full and the others by a Taylor series: their mean key and value with the
    weight of their tokens, and the first order of the values (PISA, arXiv 2602.01077).

    Args:
        keep: share of the blocks of a row, or a number; block: their tokens.
        first_order: with the first-order term.
    """

    keep: int | float = 0.15
    block: int = 64
    first_order: bool = True
    name: ClassVar[str] = "pisa"

    def __post_init__(self) -> None:
        check_keep("keep", self.keep)
        check_block("block", self.block)
        check_flag("first_order", self.first_order)

    def stages(self, layout: TokenLayout) -> Stages:
        return Stages(
            score=MEANS,
            choose=TopK(self.keep),
            rest=PooledRest(first_order=self.first_order),
            blocks=(self.block, self.block),
        )


@dataclass(frozen=True, eq=False)
class ASA(BlockSelector):
    """Adaptive block-sparse attention: 16 drawn tokens of each block stand for it; the smallest set
    with a share of the mass by the largest probability in each block (Gu et al. 2025, BLADE,
    arXiv 2508.10774).

    Args:
        mass: the share; block: tokens of a block; samples: drawn of each, from ``seed``.
        pooled: see the other blocks as their means.

    Differences: the same places are drawn in all blocks, once; a Hilbert curve for Gilbert's.
    """

    mass: float = 0.95
    block: int = 128
    samples: int = 16
    pooled: bool = False
    seed: int = 0
    name: ClassVar[str] = "asa"

    def __post_init__(self) -> None:
        check_share("mass", self.mass, above=True)
        check_block("block", self.block)
        check_block("samples", self.samples)
        check_flag("pooled", self.pooled)

    def stages(self, layout: TokenLayout) -> Stages:
        return Stages(
            score=Sampled(self.samples, self.samples, seed=self.seed),
            choose=TopP(self.mass),
            rest=PooledRest() if self.pooled else None,
            orders=("hilbert", "hilbert"),
            blocks=(self.block, self.block),
        )


@dataclass(frozen=True, eq=False)
class XAttention(BlockSelector):
    """Antidiagonals of the logits, one in every cell of ``stride`` x ``stride``, as a measure of a
    block; the smallest set with a share of the mass (Xu et al. 2025, XAttention, arXiv 2503.16428).

    Args:
        mass: the share; stride: of the antidiagonals, which divides blocks; block: their tokens.

    Differences: nothing is causal, and no first column is forced; thresholds are one for all heads.
    """

    mass: float = 0.9
    stride: int = 8
    block: int = 128
    name: ClassVar[str] = "xattention"

    def __post_init__(self) -> None:
        check_share("mass", self.mass, above=True)
        check_block("stride", self.stride)
        check_block("block", self.block)

    def stages(self, layout: TokenLayout) -> Stages:
        return Stages(
            score=Antidiagonal(self.stride),
            choose=TopP(self.mass),
            orders=("raster", "raster"),
            blocks=(self.block, self.block),
        )
