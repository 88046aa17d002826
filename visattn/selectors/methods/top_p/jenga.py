"""Published methods that score blocks by means of their tokens and keep the best ones.

All choose anew at each call, keep text keys and compute text queries in full, where some authors'
code scores text with the rest; equal scores go to the lower index. With ``own`` the query's own
block is kept in any case; without it, the default, only where its score keeps it, as in the
authors' code. A row always keeps at least one block.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from visattn.geometry.layout import Grid, TokenLayout
from visattn.geometry.orders import BoxOrder
from visattn.patterns.base.sizes import check_flag
from visattn.patterns.sliding_tile import SlidingTile
from visattn.selectors.selector import (
    BlockSelector,
    Stages,
    check_block,
    check_keep,
    check_share,
    rounded_down,
)
from visattn.selectors.stages.always_kept import Force
from visattn.selectors.stages.choose import TopK, TopP
from visattn.selectors.stages.inputs import Inputs
from visattn.selectors.stages.prefix import top_count
from visattn.selectors.stages.scores import Antidiagonal, Pooled, Sampled, SubTiles
from visattn.selectors.stages.selection import PooledRest

__all__ = ["ASA", "NABLA", "PISA", "VSA", "DFSAttn", "Draft", "Jenga", "XAttention"]

MEANS = Pooled(log_size=False)


@dataclass(frozen=True, eq=False)
class Jenga(BlockSelector):
    """Attention carving: blocks along a space-filling curve; the smallest set with a share of the
    pooled softmax, at least ``keep``, and the blocks around the query's.

    Args:
        mass: the share; keep: the least, a number of blocks or a share of them.
        block: tokens of a block.

    Source:
        Zhang et al. (2025), "Training-Free Efficient Video Generation via Dynamic Token Carving",
        NeurIPS 2025, arXiv 2505.16864. Code: github.com/dvlab-research/Jenga (commit 6905150).
    Default:
        code
    Differences:
        - The curve is Hilbert's in the enclosing cube, cut to the grid; theirs is Gilbert's.
        - Logits of text keys are not amplified.
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
    the share with the highest pooled softmax.

    Args:
        keep: share of the pairs of a head.
        tile: rows and columns of a tile.
        own: keep each row's own tile, in place of the last ones that would be kept.

    Source:
        Shen et al. (2025), "DraftAttention: Fast Video Diffusion via Low-Resolution Attention
        Guidance", arXiv 2505.14708. Code: github.com/shawnricecake/draft-attention (commit
        f3c81d5).
    Default:
        code
    Differences:
        - Exactly the share is kept, rounded up to pairs; theirs keeps one pair more, and all that
          equal the last one.
        - A row that would keep no tile keeps its best one, in place of the last pair of all; in
          theirs such a row sees no image token.
        - Grids of any size, with smaller tiles at the borders.
    """

    keep: float = 0.25
    tile: tuple[int, int] = (8, 16)
    own: bool = False
    name: ClassVar[str] = "draft"
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
            force=Force(own=self.own),
            orders=(order, order),
            blocks=(size, size),
        )

    def widened(
        self, forced: torch.Tensor, scores: torch.Tensor, inputs: Inputs
    ) -> torch.Tensor:
        # forced pairs come first in the count, and a best pair is among the kept ones anyway
        # unless its row would keep none
        return forced | top_count(scores, 1)


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
    tokens, added up.

    Args:
        keep: share of the blocks of a row, rounded down but at least one, or a number; block: their
            tokens; part: tokens of a run.
        own: keep the query's own block, in place of the last one.

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
            force=Force(own=self.own),
            orders=("hilbert", "hilbert"),
            blocks=(self.block, self.block),
        )


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
        force = Force(own=self.own)
        if self.window is not None and self.clamped:
            force = Force(own=self.own, pattern=SlidingTile(self.tile, self.window))
        elif self.window is not None:
            force = Force(own=self.own, window=(self.tile, self.window))
        return Stages(
            score=MEANS,
            choose=TopP(self.mass),
            force=force,
            orders=(order, order),
            blocks=(size, size),
        )


@dataclass(frozen=True, eq=False)
class VSA(BlockSelector):
    """Cubes of 4 x 4 x 4 tokens and the best of them by pooled score: video sparse attention
    without its trained gate, which begins at zero.

    Args:
        keep: share of the cubes of a row, rounded up, or a number.
        tile: of a cube, per axis.
        own: keep the query's own cube, in place of the last one.

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
    before: ClassVar[dict[str, object]] = {"own": True}

    def __post_init__(self) -> None:
        check_keep("keep", self.keep)
        BoxOrder(self.tile)
        check_flag("own", self.own)

    def stages(self, layout: TokenLayout) -> Stages:
        order = BoxOrder(self.tile)
        size = self.tile[0] * self.tile[1] * self.tile[2]
        return Stages(
            score=MEANS,
            choose=TopK(self.keep),
            force=Force(own=self.own),
            orders=(order, order),
            blocks=(size, size),
        )


@dataclass(frozen=True, eq=False)
class PISA(BlockSelector):
    """The best blocks in full and the others by a Taylor series: their mean key and value with the
    weight of their tokens, and the first order of the values.

    Args:
        keep: share of the blocks of a row, rounded down but at least one, or a number; block: their
            tokens.
        first_order: with the first-order term.
        own: keep the query's own block, in place of the last one.

    Source:
        Li et al. (2026), "PISA: Piecewise Sparse Attention Is Wiser for Efficient Diffusion
        Transformers", arXiv 2602.01077. Code: github.com/xie-lab-ml/piecewise-sparse-attention
        (commit 8604494).
    Default:
        code
    Differences:
        - Blocks are boxes of tokens in videos too; the code has square tiles of images only.
        - Text is seen in full and is no part of the series; the code scores it with the rest.
    """

    keep: int | float = 0.15
    block: int = 64
    first_order: bool = True
    own: bool = False
    name: ClassVar[str] = "pisa"
    before: ClassVar[dict[str, object]] = {"own": True}

    def __post_init__(self) -> None:
        check_keep("keep", self.keep)
        check_block("block", self.block)
        check_flag("first_order", self.first_order)
        check_flag("own", self.own)

    def stages(self, layout: TokenLayout) -> Stages:
        return Stages(
            score=MEANS,
            choose=TopK(rounded_down(self.keep, layout, "tiles", self.block)),
            force=Force(own=self.own),
            rest=PooledRest(first_order=self.first_order),
            blocks=(self.block, self.block),
        )


@dataclass(frozen=True, eq=False)
class ASA(BlockSelector):
    """Adaptive block-sparse attention: 16 drawn tokens of each block stand for it; the smallest set
    with a share of the mass by the largest probability in each block.

    Args:
        mass: the share; block: tokens of a block; samples: drawn of each, from ``seed``.
        pooled: see the other blocks as their means.
        own: keep the query's own block.

    Source:
        Gu et al. (2025), "BLADE: Block-Sparse Attention Meets Step Distillation for Efficient
        Video Generation", arXiv 2508.10774. Code: github.com/xiaolong-li1/VIDEO-BLADE (commit
        9d5680e).
    Default:
        paper. The released code keeps fixed shares of the blocks at several levels, as Pyramid
        does, and not a share of the mass.
    Differences:
        - The same places are drawn in all blocks, once.
        - A Hilbert curve in place of Gilbert's.
    """

    mass: float = 0.95
    block: int = 128
    samples: int = 16
    pooled: bool = False
    seed: int = 0
    own: bool = False
    name: ClassVar[str] = "asa"
    before: ClassVar[dict[str, object]] = {"own": True}

    def __post_init__(self) -> None:
        check_share("mass", self.mass, above=True)
        check_block("block", self.block)
        check_block("samples", self.samples)
        check_flag("pooled", self.pooled)
        check_flag("own", self.own)

    def stages(self, layout: TokenLayout) -> Stages:
        return Stages(
            score=Sampled(self.samples, self.samples, seed=self.seed),
            choose=TopP(self.mass),
            force=Force(own=self.own),
            rest=PooledRest() if self.pooled else None,
            orders=("hilbert", "hilbert"),
            blocks=(self.block, self.block),
        )


@dataclass(frozen=True, eq=False)
class XAttention(BlockSelector):
    """Antidiagonals of the logits, one in every cell of ``stride`` x ``stride``, as a measure of a
    block; the smallest set with a share of the mass.

    Args:
        mass: the share; stride: of the antidiagonals, which divides blocks; block: their tokens.
        sink: keep the first block of the keys for all queries, as the code does, though its mask
            that is not causal seems to do so by accident.
        own: keep the query's own block.

    Source:
        Xu et al. (2025), "XAttention: Block Sparse Attention with Antidiagonal Scoring", arXiv
        2503.16428. Code: github.com/mit-han-lab/x-attention (commit e379887).
    Default:
        code. It is that of ``xattn_estimate(causal=False)``.
    Differences:
        - Text is kept and not scored.
        - A sequence with several grids has a first block of keys in each.
    """

    mass: float = 0.9
    stride: int = 8
    block: int = 128
    sink: bool = True
    own: bool = False
    name: ClassVar[str] = "xattention"
    before: ClassVar[dict[str, object]] = {"sink": False, "own": True}

    def __post_init__(self) -> None:
        check_share("mass", self.mass, above=True)
        check_block("stride", self.stride)
        check_block("block", self.block)
        check_flag("sink", self.sink)
        check_flag("own", self.own)

    def stages(self, layout: TokenLayout) -> Stages:
        return Stages(
            score=Antidiagonal(self.stride),
            choose=TopP(self.mass),
            force=Force(own=self.own, sink=self.sink),
            orders=("raster", "raster"),
            blocks=(self.block, self.block),
        )
