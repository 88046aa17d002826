"""Adaptive block-sparse attention: a few drawn tokens score a block."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from visattn._arguments import check_block, check_flag, check_share
from visattn.geometry.layout import TokenLayout
from visattn.selectors.selector import BlockSelector, Stages
from visattn.selectors.stages.always_kept import AlwaysKept
from visattn.selectors.stages.choose import TopP
from visattn.selectors.stages.scores import Sampled
from visattn.selectors.stages.selection import PooledRest

__all__ = ["ASA"]


@dataclass(frozen=True, eq=False)
class ASA(BlockSelector):
    """Adaptive block-sparse attention: blocks are scored by a few sampled tokens of each.

    The score of a block is the largest probability among its sampled keys. The smallest set of
    blocks that holds a share of the mass is kept.

    Args:
        mass: the share of the mass.
        block: tokens of a block.
        samples: sampled tokens of each block.
        pooled: see the other blocks as their means, instead of dropping them.
        seed: seed of the sample.
        own: always keep the query's own block.

    Example:
        >>> import torch
        >>> from visattn import Grid, TokenLayout, sparse_attention
        >>> from visattn.selectors import ASA
        >>> layout = TokenLayout(Grid(2, 8, 8))
        >>> q, k, v = torch.randn(3, 1, 2, layout.length, 16)
        >>> sparse_attention(q, k, v, ASA(mass=0.6, block=16, samples=4), layout).shape
        torch.Size([1, 2, 128, 16])

    Source:
        Gu et al. (2025), "BLADE: Block-Sparse Attention Meets Step Distillation for Efficient
        Video Generation", arXiv 2508.10774. Code: github.com/xiaolong-li1/VIDEO-BLADE (commit
        9d5680e).
    Default:
        paper. The released code keeps fixed shares of the blocks at several levels, as Pyramid
        does, and not a share of the mass.
    Differences:
        - The same places are drawn in all blocks, once.
        - A Hilbert curve instead of Gilbert's.
    """

    mass: float = 0.95
    block: int = 128
    samples: int = 16
    pooled: bool = False
    seed: int = 0
    own: bool = False
    name: ClassVar[str] = "asa"
    color: ClassVar[str] = "#7a3562"
    example: ClassVar[str] = "asa(0.6, 8, 3)"
    row_independent: ClassVar[bool] = True
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
            always_kept=AlwaysKept(own_block=self.own),
            rest=PooledRest() if self.pooled else None,
            orders=("hilbert", "hilbert"),
            blocks=(self.block, self.block),
        )
