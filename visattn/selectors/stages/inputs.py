"""What the scores of a selector are made from: tensors, their blocks, and summaries of these."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

from visattn.geometry.layout import TokenLayout
from visattn.selectors.stages.blocks import Side

__all__ = ["Inputs", "block_means", "block_parts"]


def block_means(blocks: torch.Tensor, exists: torch.Tensor) -> torch.Tensor:
    """Mean of the tokens that are there: ``[..., N, size, D]`` and bool ``[..., N, size]`` to
    ``[..., N, D]``, in float32 (float64 for float64), 0 for an empty block."""
    wide = torch.float64 if blocks.dtype == torch.float64 else torch.float32
    count = exists.sum(-1, keepdim=True).clamp(min=1)
    return (blocks.to(wide) * exists[..., None]).sum(-2) / count


def block_parts(
    blocks: torch.Tensor, exists: torch.Tensor, part: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Means of every ``part`` tokens of a block: ``[..., N, parts, D]``, and how many there are,
    int64 ``[..., N, parts]``."""
    size = blocks.shape[-2]
    parts = -(-size // part)
    pad = parts * part - size
    blocks = torch.nn.functional.pad(blocks, (0, 0, 0, pad))
    exists = torch.nn.functional.pad(exists, (0, pad))
    blocks = blocks.unflatten(-2, (parts, part))
    exists = exists.unflatten(-1, (parts, part))
    return block_means(blocks, exists), exists.sum(-1)


@dataclass(frozen=True, eq=False)
class Inputs:
    """A call as the selection sees it.

    Args:
        q: ``[B, H, L, D]``; k, v: ``[B, Hk, L, D]``, ``Hk`` dividing ``H``.
        layout: what the tokens are; scale: of the logits.
        q_side, k_side: their blocks.
        kernels: whether the Triton kernels compute what they can.
        whole: the call, where these are some of its query blocks.
        lse: of the last call, ``[B, H, L]``, for scores that use it; None where there is none.
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    layout: TokenLayout
    scale: float
    q_side: Side
    k_side: Side
    kernels: bool = False
    lse: torch.Tensor | None = None
    whole: Inputs | None = None

    @property
    def heads(self) -> int:
        return self.q.shape[1]

    def for_heads(self, x: torch.Tensor) -> torch.Tensor:
        """Something of each key head, repeated for the query heads that share it."""
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

    def _means(self, x: torch.Tensor, side: Side) -> torch.Tensor:
        from visattn.selectors.attend.dynamic_triton import summary

        return summary(x, side, max(x.shape[1], side.tokens.shape[1]))

    @functools.cached_property
    def pairs(self) -> torch.Tensor:
        """Block pairs that are chosen among: grid queries and grid keys that are not empty, bool
        ``[G, G', Nq, Nk]``."""
        q_some = (self.q_side.length > 0) & self.q_side.grid
        k_some = (self.k_side.length > 0) & self.k_side.grid
        return q_some[..., :, None] & k_some[..., None, :]
