"""Pyramid sparse attention: finer and coarser means of the keys.

Source: PSA (Li et al. 2025, arXiv 2512.04025): key blocks are seen token by token, by means of 2, 4
or 8 tokens, or not at all, by where they stand in the order of their importance; the means' logits
have + ln of the number of tokens, in one softmax with the others.

Differences: importance is the mass that the block's mean query leaves among raw keys (the published
one, the largest ratio among random tokens, is ``score="sampled"``, with the same drawn places in
all calls); the smallest prefix that reaches an end is taken, without rounding to multiples of a
level; any block and pool sizes; the number of tokens is the true one in blocks that end early. The
similarity cap compares tokens at distance 1, 3 and 7 for means of 2, 4 and 8.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from visattn.layout import TokenLayout
from visattn.patterns.sizes import check_flag
from visattn.selectors.inputs import Inputs
from visattn.selectors.scores import Representative, Sampled, Score
from visattn.selectors.selection import PooledRest
from visattn.selectors.selector import (
    ORDERS,
    BlockSelector,
    Stages,
    check_block,
    check_keep,
    check_share,
    check_word,
)
from visattn.selectors.selects import Levels

__all__ = ["Pyramid"]

POOLS = (1, 2, 4, 8)


@dataclass(frozen=True, eq=False)
class Pyramid(BlockSelector):
    """Levels 1, 2, 4, 8 and none down the order of importance.

    Args:
        ends: where each level ends, not decreasing shares of the mass, or of the blocks.
        by: ``"mass"`` or ``"count"``: what ``ends`` are shares of.
        block: tokens of a block; order: ``"hilbert"``, ``"tiles"`` or ``"raster"``.
        least: blocks of a row at the first level at least, or the share of them.
        similar: mean cosines of neighbouring keys from which a block may be seen by means of 2, 4
            and 8; None for no cap. Published: ``(0.7, 0.65, 0.6)``.
        score: ``"representative"`` or ``"sampled"``.
        pooled: see the blocks beyond the last end as one mean each.
    """

    ends: tuple[float, float, float, float] = (0.4, 0.5, 0.6, 0.8)
    by: str = "mass"
    block: int = 128
    order: str = "hilbert"
    least: int | float = 0.06
    similar: tuple[float, float, float] | None = None
    score: str = "representative"
    pooled: bool = False
    name: ClassVar[str] = "pyramid"

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
        check_flag("pooled", self.pooled)

    def stages(self, layout: TokenLayout) -> Stages:
        count = max(1, self.block // 4)
        score: Score = Representative()
        if self.score == "sampled":
            score = Sampled(count, count, reduce="max")
        return Stages(
            score=score,
            choose=Levels(
                self.ends, POOLS, "mass" if self.by == "mass" else "count", self.least
            ),
            rest=PooledRest() if self.pooled else None,
            orders=(self.order, self.order),
            blocks=(self.block, self.block),
        )

    def adjusted(self, levels: torch.Tensor, inputs: Inputs) -> torch.Tensor:
        if self.similar is None:
            return levels
        cap = torch.ones_like(inputs.k_side.length.expand(*inputs.k_blocks.shape[:3]))
        open_ = torch.ones_like(cap, dtype=torch.bool)
        for pool, least in zip(POOLS[1:], self.similar, strict=True):
            open_ = open_ & (_similarity(inputs, pool - 1) > least)
            cap = cap.masked_fill(open_, pool)
        cap = inputs.for_heads(cap)[:, :, None].to(torch.uint8)
        return torch.minimum(levels, cap)


def _similarity(inputs: Inputs, distance: int) -> torch.Tensor:
    """Mean cosine of the keys of a block at a distance in its order, ``[B, Hk, Nk]``; 1 where there
    are none."""
    keys = torch.nn.functional.normalize(inputs.k_blocks.to(inputs.q_mean), dim=-1)
    there = inputs.k_side.exists
    if distance >= keys.shape[3]:
        return torch.ones_like(keys[..., 0, 0])
    both = there[..., distance:] & there[..., :-distance]
    cosine = (keys[..., distance:, :] * keys[..., :-distance, :]).sum(-1) * both
    count = both.sum(-1)
    return torch.where(count > 0, cosine.sum(-1) / count.clamp(min=1), 1)
