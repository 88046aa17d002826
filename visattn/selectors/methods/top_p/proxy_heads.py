"""ProxyAttn: groups of heads rank the blocks together."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from visattn._arguments import check_block, check_count, check_flag, check_share, check_word
from visattn.geometry.layout import TokenLayout
from visattn.selectors.selector import ORDERS, BlockSelector, Stages
from visattn.selectors.stages.always_kept import AlwaysKept
from visattn.selectors.stages.choose import TopK
from visattn.selectors.stages.inputs import Inputs
from visattn.selectors.stages.prefix import top_count, top_mass
from visattn.selectors.stages.scores import Pooled, row_parts

__all__ = ["ProxyHeads"]


@dataclass(frozen=True, eq=False)
class ProxyHeads(BlockSelector):
    """Groups of heads rank the blocks together, and each head keeps as many as its mass needs.

    The ranks come from the mean queries and keys of the group.

    Args:
        mass: share of a head's own pooled softmax that its number of blocks must hold, on average
            over its rows.
        groups: number of groups of neighbouring heads; must divide the number of heads that run
            this pattern.
        stride: the ranks use every ``stride``-th token of a block.
        block: tokens of a block.
        order: order in which tokens are cut into blocks: ``"tiles"``, ``"hilbert"`` or
            ``"raster"``.
        own: always keep the query's own block.

    Example:
        >>> import torch
        >>> from visattn import Grid, TokenLayout, sparse_attention
        >>> from visattn.selectors import ProxyHeads
        >>> layout = TokenLayout(Grid(2, 8, 8))
        >>> q, k, v = torch.randn(3, 1, 2, layout.length, 16)
        >>> sparse_attention(q, k, v, ProxyHeads(mass=0.6, groups=1, block=16), layout).shape
        torch.Size([1, 2, 128, 16])

    Source:
        Wang et al. (2025), "ProxyAttn: Guided Sparse Attention via Representative Heads", ICLR
        2026, arXiv 2509.24745.
    Default:
        paper. The method was written for causal models, and its code was not compared.
    Differences:
        - The budget of a head is the mean over its rows; the published one is that of the last
          query block of a causal model, and 2048 tokens at least.
    """

    mass: float = 0.95
    groups: int = 1
    stride: int = 4
    block: int = 64
    order: str = "tiles"
    own: bool = False
    name: ClassVar[str] = "proxy_heads"
    color: ClassVar[str] = "#e6c1d8"
    example: ClassVar[str] = "proxy_heads(0.6, 1, 3, 8)"
    before: ClassVar[dict[str, object]] = {"own": True}

    def __post_init__(self) -> None:
        check_share("mass", self.mass, above=True)
        check_count("groups", self.groups, 1)
        check_block("stride", self.stride)
        check_block("block", self.block)
        check_word("order", self.order, ORDERS)
        check_flag("own", self.own)

    def stages(self, layout: TokenLayout) -> Stages:
        return Stages(
            score=Pooled(log_size=False),
            choose=TopK(1.0, inside=False),  # only blocks within the budget have a finite score
            always_kept=AlwaysKept(own_block=self.own),
            orders=(self.order, self.order),
            blocks=(self.block, self.block),
        )

    def scores(self, stages: Stages, inputs: Inputs) -> torch.Tensor:
        ranks = self._ranks(inputs).masked_fill(~inputs.pairs, -torch.inf)
        pooled = stages.score(inputs).masked_fill(~inputs.pairs, -torch.inf)
        count = self._budget(pooled)
        return torch.where(top_count(ranks, count), ranks, -torch.inf)

    def _ranks(self, inputs: Inputs) -> torch.Tensor:
        """Return the log of the largest probability in each block, over every stride-th token."""
        heads = inputs.heads
        if heads % self.groups:
            raise ValueError(
                f"groups={self.groups} must divide the {heads} heads that run {self.name}"
            )
        each = heads // self.groups
        q = _group_means(inputs.q_blocks[..., :: self.stride, :], self.groups)
        k = _group_means(inputs.for_heads(inputs.k_blocks)[..., :: self.stride, :], self.groups)
        there = inputs.k_side.exists[..., :: self.stride] & inputs.k_side.grid[:, None]
        flat = k.flatten(2, 3).mT[:, :, None]
        gone = ~there.flatten(-2)[..., None, None, :]
        real = inputs.q_side.exists[..., :: self.stride, None]
        ranks = []
        for rows in row_parts(q.shape[2], q.shape[0] * self.groups * q.shape[3] * flat.shape[-1]):
            logits = q[:, :, rows] @ flat * inputs.scale  # [B, G, r, queries, Nk * keys]
            logits = logits.masked_fill(gone, -torch.inf)
            best = logits.softmax(-1).unflatten(-1, k.shape[2:4]).amax(-1)
            best = best.masked_fill(~real[..., rows, :, :], 0).amax(-2)
            ranks.append(best.clamp(min=torch.finfo(torch.float32).tiny).log())
        return torch.cat(ranks, 2).repeat_interleave(each, 1).float()

    def _budget(self, pooled: torch.Tensor) -> torch.Tensor:
        """Return the number of blocks of a row for each head, int64 ``[B, H, 1, 1]``."""
        count = top_mass(pooled, self.mass).sum(-1)
        rows = (count > 0).sum(-1).clamp(min=1)
        return (-(-count.sum(-1) // rows)).clamp(min=1)[..., None, None]


def _group_means(x: torch.Tensor, groups: int) -> torch.Tensor:
    """Return the means over groups of neighbouring heads, ``[B, groups, ...]``."""
    acc_dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    out: torch.Tensor = x.to(acc_dtype).unflatten(1, (groups, -1)).mean(2)
    return out
