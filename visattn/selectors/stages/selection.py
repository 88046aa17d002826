"""The result of a selector for a call: levels of all block pairs, and how the rest is treated."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from visattn.selectors.stages.blocks import BlockPartition
from visattn.selectors.stages.choose import BLOCK

__all__ = ["PooledRest", "SampledRest", "Selection", "not_finite"]


@dataclass(frozen=True)
class PooledRest:
    """Each unselected block is seen as one mean key and value with the weight of its n tokens.

    The logit of the mean key is increased by ln n, so that the mean counts as n keys, not as one.

    Args:
        variance: also add 1/2 sum_c (scale q_c)^2 var_c to the logit, the second-order term of the
            logarithm of the block's mass; var_c is the variance of component c of its keys.
        first_order: also add the first-order term of the values to the output,
            ``scale / N * q . H``; ``H`` is the sum over all N grid keys of
            (key - mean of its block) x value (PISA, arXiv 2602.01077).

    Example:
        >>> from visattn.selectors import PooledRest
        >>> PooledRest(variance=True)
        PooledRest(variance=True, first_order=False)
    """

    variance: bool = False
    first_order: bool = False


@dataclass(frozen=True)
class SampledRest:
    """A random sample of the unselected keys is seen, weighted to represent all of them.

    If m of the n unselected keys are sampled, each has the weight ``n / m``. Source: Han et al.
    2023, HyperAttention, arXiv 2310.05869.

    Args:
        count: number of grid keys in the sample, which is the same for all rows and heads.
        seed: seed of the sample.

    Example:
        >>> from visattn.selectors import SampledRest
        >>> SampledRest(count=64)
        SampledRest(count=64, seed=0)
    """

    count: int = 256
    seed: int = 0


def not_finite(scores: torch.Tensor) -> torch.Tensor:
    """Return whether a head has a score that is NaN or plus infinity, bool ``[B, H, 1, 1]``.

    Such scores cannot be ranked; minus infinity can, as the lowest. Scores are ``[B, H, Nq, Nk]``.
    """
    return (scores.isnan() | (scores == torch.inf)).flatten(2).any(2)[..., None, None]


@dataclass(frozen=True, eq=False)
class Selection:
    """Which key blocks each query block sees, and how finely.

    Attributes:
        q_side: the query blocks.
        k_side: the key blocks.
        levels: how finely each pair is seen, uint8 ``[B, H, Nq, Nk]``. 0: not at all. 1: token by
            token. n > 1: by means of n tokens each, with ln n added to the logit. 255: by one mean
            of the whole block.
        values: the levels above 0 that may occur, ascending.
        rest: treatment of the blocks at level 0; None drops them.
        variance: whether the logits of means have the variance term of PooledRest.
        weights: weights of the tokens in the mean of a block at level 255,
            ``[B, H, Nk, block_k]``; they add up to 1, and their entropy replaces ln n in the logit.
            None: equal weights.
        correction: ``(factor [B, H, Nq], extra [B, H, Nq, D])``: the output of each query block is
            multiplied by ``factor``, then ``extra`` is added.
        broken: whether a head had scores that are not finite, so that it sees everything, bool
            ``[B, H, 1, 1]``; None if the selector has no scores. Reading it waits for the device.

    Example:
        >>> import torch
        >>> from visattn import Grid, TokenLayout
        >>> from visattn.selectors import TopBlocks
        >>> q, k, v = torch.randn(3, 1, 2, 32, 16).unbind()
        >>> layout = TokenLayout(Grid(2, 4, 4))
        >>> selection = TopBlocks(keep=2, block=8).select(q, k, v, layout, scale=0.25)
        >>> selection.levels.shape
        torch.Size([1, 2, 4, 4])
        >>> selection.block_density()
        tensor([[0.5000, 0.5000]])
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
        """Return a selection; with a PooledRest, level 0 becomes BLOCK for blocks with tokens."""
        if isinstance(rest, PooledRest):
            some = (q_side.length > 0)[..., :, None] & (k_side.length > 0)[..., None, :]
            levels = levels.masked_fill((levels == 0) & some, BLOCK)
            values = tuple(sorted({*values, BLOCK}))
            variance = variance or rest.variance
        return Selection(q_side, k_side, levels, values, rest, variance)

    def guarded(self, scores: torch.Tensor) -> Selection:
        """Return the selection, with everything kept in heads that have NaN or infinite scores."""
        return self.guarded_by(not_finite(scores))

    def guarded_by(self, broken: torch.Tensor) -> Selection:
        """Return the selection, with everything kept where ``broken``, bool ``[B, H, 1, 1]``."""
        there = (self.q_side.length > 0)[..., :, None] & (self.k_side.length > 0)[..., None, :]
        levels = torch.where(broken, there.to(torch.uint8), self.levels)
        correction = self.correction
        if correction is not None:
            factor, extra = correction
            correction = factor.masked_fill(broken[..., 0], 1), extra.masked_fill(broken, 0)
        return replace(self, levels=levels, correction=correction, broken=broken)

    @property
    def nbytes(self) -> int:
        """Bytes of the levels."""
        return self.levels.numel()

    def block_density(self) -> torch.Tensor:
        """Return the executed share of the keys of dense attention, float32 ``[B, H]``.

        A pooled block counts as its number of means. The result is on the device of the levels.
        """
        size = self.k_side.size
        cost = torch.zeros(256, device=self.levels.device)
        for value in self.values:
            cost[value] = 1.0 if value == 1 else -(-size // min(value, size)) / size
        some = (self.q_side.length > 0)[..., :, None] & (self.k_side.length > 0)[..., None, :]
        weight = cost[self.levels.long()] * some
        return weight.sum((-1, -2)) / some.sum((-1, -2)).clamp(min=1)
