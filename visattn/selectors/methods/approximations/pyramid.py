"""Pyramid sparse attention: finer and coarser means of the keys."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from visattn._arguments import check_block, check_flag, check_keep, check_share, check_word
from visattn.geometry.layout import TokenLayout
from visattn.selectors.selector import ORDERS, BlockSelector, Stages, grid_blocks
from visattn.selectors.stages.always_kept import AlwaysKept
from visattn.selectors.stages.choose import Levels
from visattn.selectors.stages.inputs import Inputs
from visattn.selectors.stages.scores import Representative, Sampled, Score
from visattn.selectors.stages.selection import PooledRest

__all__ = ["Pyramid"]

POOLS = (1, 2, 4, 8)


@dataclass(frozen=True, eq=False)
class Pyramid(BlockSelector):
    """Key blocks at several resolutions, by importance.

    The most important blocks are seen token by token, the next ones by means of 2, 4 or 8 tokens,
    and the last ones not at all. The logit of a mean of n tokens is increased by ln n, and one
    softmax covers tokens and means.

    Args:
        ends: cumulative share of the mass, or of the blocks, at which each level ends; must not
            decrease.
        by: whether ``ends`` are shares of the ``"mass"`` or of the ``"count"`` of blocks; a count
            is rounded down.
        block: tokens of a block.
        order: order in which tokens are cut into blocks: ``"hilbert"``, ``"tiles"`` or
            ``"raster"``.
        least: least number of blocks of a row at the first level, or the share of them; with
            ``by="count"`` it is one.
        similar: mean cosines of keys above which a block may be seen by means of 2, 4 and 8; None
            for no limit. Published: None and ``(0.7, 0.65, 0.6)``. The cosine compares the first
            and the last key of each group of 2, 4 or 8; the largest level whose threshold is
            exceeded is the limit.
        score: ``"representative"``: the mass that the mean query of a block gives to all keys of a
            block. ``"sampled"``: the published score, the largest ratio of exponentials among
            sampled tokens.
        pooled: see the blocks beyond the last end as one mean each, instead of dropping them.
        nested: another form of the limit: a level also needs the thresholds of all finer levels,
            and the cosines compare all pairs at the same distance in the block.
        own: always see the query's own block token by token.

    Example:
        >>> import torch
        >>> from visattn import Grid, TokenLayout, sparse_attention
        >>> from visattn.selectors import Pyramid
        >>> layout = TokenLayout(Grid(2, 8, 8))
        >>> q, k, v = torch.randn(3, 1, 2, layout.length, 16)
        >>> sparse_attention(q, k, v, Pyramid(block=16, pooled=True), layout).shape
        torch.Size([1, 2, 128, 16])

    Source:
        Li et al. (2025), "PSA: Pyramid Sparse Attention for Efficient Video Understanding and
        Generation", arXiv 2512.04025. Code: github.com/ziplab/Pyramid-Sparse-Attention (commit
        be122cf).
    Default:
        own. Only the score is: the published one costs 1/16 of dense attention, draws anew at each
        call, and has so many equal values that the order of its sort decides.
    Differences:
        - ``score="sampled"`` draws the same places in all blocks and calls; equal scores go to the
          lower index.
        - The smallest prefix that reaches an end is taken, without rounding the number of blocks
          of a level to a multiple.
        - A share ``least`` of the blocks is rounded up; theirs is one more than it rounded down.
        - A Hilbert curve instead of Gilbert's.
        - In blocks that end early the means count the tokens that are there.
        - Text is kept and not scored; the code scores it with the rest.
    """

    ends: tuple[float, float, float, float] = (0.4, 0.5, 0.6, 0.8)
    by: str = "mass"
    block: int = 128
    order: str = "hilbert"
    least: int | float = 0.06
    similar: tuple[float, float, float] | None = None
    score: str = "representative"
    pooled: bool = False
    nested: bool = False
    own: bool = False
    name: ClassVar[str] = "pyramid"
    color: ClassVar[str] = "#a8588a"
    example: ClassVar[str] = "pyramid(block=8, pooled=True)"
    before: ClassVar[dict[str, object]] = {"nested": True, "own": True}

    def __post_init__(self) -> None:
        if not isinstance(self.ends, tuple) or len(self.ends) != len(POOLS):
            raise TypeError(f"ends={self.ends!r} must be four shares, one for each level")
        for end in self.ends:
            check_share("ends", end)
        if any(a > b for a, b in zip(self.ends, self.ends[1:], strict=False)):
            raise ValueError(f"ends={self.ends} must not decrease")
        check_word("by", self.by, ("mass", "count"))
        check_block("block", self.block)
        check_word("order", self.order, ORDERS)
        check_keep("least", self.least)
        if self.similar is not None and (
            not isinstance(self.similar, tuple) or len(self.similar) != 3
        ):
            raise TypeError(f"similar={self.similar!r} must be three cosines or None")
        check_word("score", self.score, ("representative", "sampled"))
        for name in ("pooled", "nested", "own"):
            check_flag(name, getattr(self, name))

    def stages(self, layout: TokenLayout) -> Stages:
        count = max(1, self.block // 4)
        score: Score = Representative()
        if self.score == "sampled":
            score = Sampled(count, count, reduce="max")
        return Stages(
            score=score,
            choose=self._levels(layout),
            always_kept=AlwaysKept(own_block=self.own),
            rest=PooledRest() if self.pooled else None,
            orders=(self.order, self.order),
            blocks=(self.block, self.block),
        )

    def _levels(self, layout: TokenLayout) -> Levels:
        if self.by == "mass":
            return Levels(self.ends, POOLS, "mass", self.least)
        total = grid_blocks(layout, self.order, self.block)
        ends = tuple(int(end * total) / max(1, total) for end in self.ends)
        return Levels(ends, POOLS, "count", 1)

    def adjusted(self, levels: torch.Tensor, inputs: Inputs) -> torch.Tensor:
        if self.similar is None:
            return levels
        cap = torch.ones_like(inputs.k_side.length.expand(*inputs.k_blocks.shape[:3]))
        finer = torch.ones_like(cap, dtype=torch.bool)
        for pool, least in zip(POOLS[1:], self.similar, strict=True):
            may = _similarity(inputs, pool - 1, 1 if self.nested else pool) > least
            if self.nested:
                may = finer = finer & may
            cap = cap.masked_fill(may, pool)
        cap = inputs.for_heads(cap)[:, :, None].to(torch.uint8)
        return torch.minimum(levels, cap)


def _similarity(inputs: Inputs, distance: int, step: int) -> torch.Tensor:
    """Return the mean cosine of keys of a block at a distance in its order, ``[B, Hk, Nk]``.

    It is 1 for blocks without such a pair.

    Args:
        inputs: the call.
        distance: places between the two keys of a pair.
        step: the first key of a pair is at a multiple of this place.
    """
    keys = torch.nn.functional.normalize(inputs.k_blocks.to(inputs.q_mean), dim=-1)
    there = inputs.k_side.exists
    if distance >= keys.shape[3]:
        return torch.ones_like(keys[..., 0, 0])
    last = slice(distance, None, step)
    first = slice(0, keys.shape[3] - distance, step)
    both = there[..., last] & there[..., first]
    cosine = (keys[..., last, :] * keys[..., first, :]).sum(-1) * both
    count = both.sum(-1)
    return torch.where(count > 0, cosine.sum(-1) / count.clamp(min=1), 1)
