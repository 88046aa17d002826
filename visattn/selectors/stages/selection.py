"""What a selector has chosen for a call: the levels of all block pairs, and what becomes of the
rest."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from visattn.selectors.stages.blocks import BlockPartition
from visattn.selectors.stages.choose import BLOCK

__all__ = ["PooledRest", "SampledRest", "Selection", "not_finite"]


@dataclass(frozen=True)
class PooledRest:
    """Blocks that are not kept are seen as one mean key and value of weight ``n``: the logit has
    + ln n, without which a mean of many keys counts as one.

    Args:
        variance: also + 1/2 sum_c (scale q_c)^2 var_c, the second order of the logarithm of the
            block's mass, with the variances of each component of its keys.
        first_order: also the first order of the values, ``scale / N * q . H`` with ``H`` the sum
            over all N grid keys of (key - its block's mean) x value (PISA, arXiv 2602.01077).
    """

    variance: bool = False
    first_order: bool = False


@dataclass(frozen=True)
class SampledRest:
    """Of the keys that are not kept, those of a sample are seen, each with the weight ``n / m`` of
    the n keys that m sampled ones stand for (Han et al. 2023, HyperAttention, arXiv 2310.05869).

    Args:
        count: grid keys that are drawn, the same for all rows and heads; seed: of the draw.
    """

    count: int = 256
    seed: int = 0


def not_finite(scores: torch.Tensor) -> torch.Tensor:
    """Whether some score of a head ``[B, H, Nq, Nk]`` has no place in an order, bool ``[B, H, 1,
    1]``; minus infinity has the last."""
    return (scores.isnan() | (scores == torch.inf)).flatten(2).any(2)[..., None, None]


@dataclass(frozen=True, eq=False)
class Selection:
    """Which key blocks each query block sees, and how finely.

    Attributes:
        q_side, k_side: the blocks.
        levels: uint8 ``[B, H, Nq, Nk]``: 0 is not seen, 1 token by token, a larger value by means
            of so many tokens with + ln of their number, BLOCK by one mean.
        values: the levels above 0 that may occur, ascending.
        rest: what becomes of the blocks at level 0; None drops them.
        variance: pooled logits have the term of PooledRest.
        weights: of the tokens of a block in its one mean at level BLOCK, ``[B, H, Nk, block_k]``
            that add up to 1; the logit then has + their entropy in the place of ln n. None: equal
            ones.
        broken: bool ``[B, H, 1, 1]``: whether scores of a head were not finite, so that it sees
            everything; None where there are none. Reading it waits for the device.
        correction: ``(factor [B, H, Nq], extra [B, H, Nq, D])``: the output of a block's queries
            is multiplied by the one, and then has the other added.
    """

    q_side: BlockPartition
    k_side: BlockPartition
    levels: torch.Tensor
    values: tuple[int, ...] = (1,)
    rest: PooledRest | SampledRest | None = None
    variance: bool = False
    weights: torch.Tensor | None = None
    correction: tuple[torch.Tensor, torch.Tensor] | None = None
    broken: torch.Tensor | None = None

    @staticmethod
    def of(
        q_side: BlockPartition,
        k_side: BlockPartition,
        levels: torch.Tensor,
        values: tuple[int, ...] = (1,),
        rest: PooledRest | SampledRest | None = None,
        variance: bool = False,
    ) -> Selection:
        """With a PooledRest, blocks at level 0 are at BLOCK."""
        if isinstance(rest, PooledRest):
            some = (q_side.length > 0)[..., :, None] & (k_side.length > 0)[..., None, :]
            levels = levels.masked_fill((levels == 0) & some, BLOCK)
            values = tuple(sorted({*values, BLOCK}))
            variance = variance or rest.variance
        return Selection(q_side, k_side, levels, values, rest, variance)

    def guarded(self, scores: torch.Tensor) -> Selection:
        """The selection, or everything in heads with a score that is NaN or infinite: what has no
        order cannot be chosen among."""
        return self.guarded_by(not_finite(scores))

    def guarded_by(self, broken: torch.Tensor) -> Selection:
        """The selection, or everything where ``broken``, bool ``[B, H, 1, 1]``."""
        there = (self.q_side.length > 0)[..., :, None] & (self.k_side.length > 0)[..., None, :]
        levels = torch.where(broken, there.to(torch.uint8), self.levels)
        correction = self.correction
        if correction is not None:
            factor, extra = correction
            correction = factor.masked_fill(broken[..., 0], 1), extra.masked_fill(broken, 0)
        return replace(self, levels=levels, correction=correction, broken=broken)

    @property
    def nbytes(self) -> int:
        return self.levels.numel()

    def block_density(self) -> torch.Tensor:
        """Executed keys over those of dense attention, of each head, float32 ``[B, H]``; a pooled
        block counts its means. On the device of the levels."""
        size = self.k_side.size
        cost = torch.zeros(256, device=self.levels.device)
        for value in self.values:
            cost[value] = 1.0 if value == 1 else -(-size // min(value, size)) / size
        some = (self.q_side.length > 0)[..., :, None] & (self.k_side.length > 0)[..., None, :]
        weight = cost[self.levels.long()] * some
        return weight.sum((-1, -2)) / some.sum((-1, -2)).clamp(min=1)
