"""Rectified sparse attention: the pooled softmax corrects what the sparse one leaves out."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from visattn.selectors.methods.top_p.jenga import Jenga
from visattn.selectors.stages.blocks import block_means
from visattn.selectors.stages.inputs import Inputs
from visattn.selectors.stages.selection import Selection

__all__ = ["Rectified"]


@dataclass(frozen=True, eq=False)
class Rectified(Jenga):
    """Jenga with a correction for the dropped blocks.

    The sparse output is scaled by the mass that the pooled softmax gives to the kept blocks. The
    mean values of the dropped blocks are added with their pooled probabilities, if the gain of a
    block is above the error of its mean.

    If the pooled softmax is a poor estimate of the absolute mass, the correction can be worse than
    dropping the blocks; ``TopBlocks(rest="pooled")`` computes one softmax over tokens and means
    instead.

    Args:
        mass: as in Jenga.
        keep: as in Jenga.
        block: as in Jenga.

    Example:
        >>> import torch
        >>> from visattn import Grid, TokenLayout, sparse_attention
        >>> from visattn.selectors import Rectified
        >>> layout = TokenLayout(Grid(2, 8, 8))
        >>> q, k, v = torch.randn(3, 1, 2, layout.length, 16)
        >>> sparse_attention(q, k, v, Rectified(mass=0.3, keep=0.25, block=16), layout).shape
        torch.Size([1, 2, 128, 16])

    Source:
        Liu et al. (2025), "Rectified SpaAttn: Revisiting Attention Sparsity for Efficient Video
        Generation", arXiv 2511.19835. Code: github.com/BienLuky/Rectified-SpaAttn (commit 4b0aa10).
    Default:
        code
    Differences:
        - The first blocks of the curve, as many as a frame has, do not all see each other, as they
          do in the code for Wan.
        - Text is no part of the pooled softmax; its keys are kept, and weigh by the sparse output
          alone.
        - A Hilbert curve in the enclosing cube, cut to the grid.
    """

    mass: float = 0.3
    name: ClassVar[str] = "rectified"
    color: ClassVar[str] = "#d7a3c4"
    example: ClassVar[str] = "rectified(0.3, 0.1, 8)"
    row_independent: ClassVar[bool] = False  # the correction needs the whole call
    reusable: ClassVar[bool] = False  # the correction holds values of the call

    def finished(self, selection: Selection, scores: torch.Tensor, inputs: Inputs) -> Selection:
        chooses = inputs.pairs.any(-1)  # text queries have no score
        share = scores.softmax(-1).masked_fill(~chooses[..., None], 0)
        seen = (selection.levels > 0) | self._gated(inputs)
        values = inputs.for_heads(block_means(inputs.v_blocks, inputs.k_side.exists))
        factor = torch.where(chooses, (share * seen).sum(-1), 1)
        extra = (share * ~seen).to(values) @ values
        return replace(selection, correction=(factor, extra))

    def _gated(self, inputs: Inputs) -> torch.Tensor:
        """Return the blocks whose mean is too coarse: gain <= error."""
        q_mean, k_mean = inputs.q_mean, inputs.k_mean
        q_apart = (inputs.q_blocks - q_mean[..., None, :]).abs()
        k_apart = (inputs.for_heads(inputs.k_blocks) - k_mean[..., None, :]).abs()
        q_spread = block_means(q_apart, inputs.q_side.exists)
        k_spread = block_means(k_apart, inputs.k_side.exists)
        gain = (q_mean @ k_mean.mT).abs()
        return gain <= (q_spread @ k_mean.mT).abs() + (q_mean @ k_spread.mT).abs()
