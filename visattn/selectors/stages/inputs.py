"""The inputs of the scores: queries, keys and values of a call, their blocks and block means."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

from visattn.geometry.layout import TokenLayout
from visattn.selectors.stages.blocks import BlockPartition, block_means
from visattn.selectors.stages.kernels import summary

__all__ = ["Inputs"]


@dataclass(frozen=True, eq=False)
class Inputs:
    """An attention call, as the input of a selection.

    Args:
        q: queries ``[B, H, L, D]``.
        k: keys ``[B, Hk, L, D]``, ``Hk`` dividing ``H``.
        v: values ``[B, Hk, L, D]``.
        layout: the segments of the sequence.
        scale: factor of the logits.
        q_side: the blocks of the queries.
        k_side: the blocks of the keys.
        kernels: use the Triton kernels where there are any.
        lse: LSE of the last call, ``[B, H, L]``, for scores that use it; None without one.
        whole: the inputs of the whole call, if these are only some of its query blocks.
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    layout: TokenLayout
    scale: float
    q_side: BlockPartition
    k_side: BlockPartition
    kernels: bool = False
    lse: torch.Tensor | None = None
    whole: Inputs | None = None

    @property
    def heads(self) -> int:
        return self.q.shape[1]

    def for_heads(self, x: torch.Tensor) -> torch.Tensor:
        """Repeat a tensor of the key heads for the query heads that share them."""
        return x if x.shape[1] == self.heads else x.repeat_interleave(self.heads // x.shape[1], 1)

    @functools.cached_property
    def q_blocks(self) -> torch.Tensor:
        """``[B, H, Nq, block_q, D]``."""
        return self.q_side.take(self.q)

    @functools.cached_property
    def k_blocks(self) -> torch.Tensor:
        """``[B, Hk or H, Nk, block_k, D]``."""
        if self.whole is not None:
            return self.whole.k_blocks
        return self.k_side.take(self.k)

    @functools.cached_property
    def v_blocks(self) -> torch.Tensor:
        """``[B, Hk or H, Nk, block_k, D]``."""
        return self.k_side.take(self.v)

    @functools.cached_property
    def q_mean(self) -> torch.Tensor:
        """``[B, H, Nq, D]``, float32 or float64."""
        if self.kernels:
            return self._means(self.q, self.q_side)
        return block_means(self.q_blocks, self.q_side.exists)

    @functools.cached_property
    def k_mean(self) -> torch.Tensor:
        """``[B, H, Nk, D]``, float32 or float64."""
        return self.for_heads(self.own_k_mean)

    @functools.cached_property
    def own_k_mean(self) -> torch.Tensor:
        """``[B, Hk or H, Nk, D]``, float32 or float64."""
        if self.whole is not None:
            return self.whole.own_k_mean
        if self.kernels:
            return self._means(self.k, self.k_side)
        return block_means(self.k_blocks, self.k_side.exists)

    def _means(self, x: torch.Tensor, side: BlockPartition) -> torch.Tensor:
        return summary(x, side, max(x.shape[1], side.tokens.shape[1]))

    @functools.cached_property
    def pairs(self) -> torch.Tensor:
        """Pairs that can be chosen, bool ``[G, G', Nq, Nk]``: both are grid blocks with tokens."""
        q_some = (self.q_side.length > 0) & self.q_side.grid
        k_some = (self.k_side.length > 0) & self.k_side.grid
        return q_some[..., :, None] & k_some[..., None, :]
