"""The first stage of SpargeAttn: blocks of similar tokens by their means, all other blocks kept."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from visattn._arguments import check_block, check_flag, check_share, check_word, is_number
from visattn.geometry.layout import TokenLayout
from visattn.patterns.base.head_pattern import HeadPattern
from visattn.selectors.selector import (
    ORDERS,
    SEARCHED_MASSES,
    BlockSelector,
    Stages,
)
from visattn.selectors.stages.always_kept import AlwaysKept
from visattn.selectors.stages.choose import TopP
from visattn.selectors.stages.inputs import Inputs
from visattn.selectors.stages.scores import Pooled

__all__ = ["Sparge"]


@dataclass(frozen=True, eq=False)
class Sparge(BlockSelector):
    """The best self-similar blocks up to a share of the pooled softmax, and all other blocks.

    A block is self-similar if the mean cosine of all pairs of its tokens is high; its mean then
    represents its tokens well. The mean of all keys is subtracted from the keys first. The softmax
    runs over the means of self-similar key blocks. Blocks that are not self-similar are always
    kept.

    Args:
        mass: the share of the pooled softmax.
        similar: self-similarity that a block must exceed, -1 to 1.
        block_q: tokens of a query block.
        block_k: tokens of a key block.
        order: order in which tokens are cut into blocks: ``"raster"``, ``"tiles"`` or
            ``"hilbert"``.
        crossing: also keep the block with which the share is reached, as in the paper. The code
            stops before it, but keeps at least one block.
        own: always keep the query's own blocks.

    Example:
        >>> import torch
        >>> from visattn import Grid, TokenLayout, sparse_attention
        >>> from visattn.selectors import Sparge
        >>> layout = TokenLayout(Grid(2, 8, 8))
        >>> q, k, v = torch.randn(3, 1, 2, layout.length, 16)
        >>> pattern = Sparge(mass=0.6, similar=0.2, block_q=16, block_k=16)
        >>> sparse_attention(q, k, v, pattern, layout).shape
        torch.Size([1, 2, 128, 16])

    Source:
        Zhang et al. (2025), "SpargeAttention: Accurate and Training-free Sparse Attention
        Accelerating Any Model Inference", ICML 2025, arXiv 2502.18137. Code:
        github.com/thu-ml/SpargeAttn (commit bfd980b).
    Default:
        code
    Differences:
        - The second stage, which skips products of values inside the kernel, is not here.
        - Nothing is quantised.
        - Text is kept and not scored; the code scores it with the rest.
        - The blocks follow a Hilbert curve; the code leaves the order to the caller.
    """

    mass: float = 0.98
    similar: float = 0.6
    block_q: int = 128
    block_k: int = 64
    order: str = "hilbert"
    crossing: bool = False
    own: bool = False
    name: ClassVar[str] = "sparge"
    color: ClassVar[str] = "#8a3f6f"
    example: ClassVar[str] = "sparge(0.6, 0.2, 8, 4)"
    before: ClassVar[dict[str, object]] = {"crossing": True, "own": True}

    def __post_init__(self) -> None:
        check_share("mass", self.mass, above=True)
        if not is_number(self.similar):
            raise TypeError(f"similar={self.similar!r} must be a number from -1 to 1")
        if not -1 <= self.similar <= 1:
            raise ValueError(f"similar={self.similar} must be from -1 to 1")
        check_block("block_q", self.block_q)
        check_block("block_k", self.block_k)
        check_word("order", self.order, ORDERS)
        check_flag("crossing", self.crossing)
        check_flag("own", self.own)

    @classmethod
    def search_budgets(cls, block: int) -> dict[str, list[HeadPattern]]:
        return {"self-similar": [cls(mass, 0.0, block, block) for mass in SEARCHED_MASSES]}

    def stages(self, layout: TokenLayout) -> Stages:
        return Stages(
            score=Pooled(log_size=False),
            choose=TopP(self.mass, crossing=self.crossing),
            always_kept=AlwaysKept(own_block=self.own),
            orders=(self.order, self.order),
            blocks=(self.block_q, self.block_k),
        )

    def scores(self, stages: Stages, inputs: Inputs) -> torch.Tensor:
        scores = super().scores(stages, inputs)
        return scores.masked_fill(~self._alike(inputs)[1][:, :, None], -torch.inf)

    def widened(
        self, forced: torch.Tensor, scores: torch.Tensor, inputs: Inputs
    ) -> torch.Tensor:
        q_alike, k_alike = self._alike(inputs)
        return forced | (inputs.pairs & (~q_alike[..., None] | ~k_alike[:, :, None]))

    def _alike(self, inputs: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
        """Return which query and which key blocks are self-similar, bool ``[B, H, N]`` each."""
        begin = inputs.k.mean(2, keepdim=True)
        keys = (inputs.k_blocks - begin[:, :, None]).to(inputs.q_mean)
        k_similarity = _self_similarity(keys, inputs.k_side.exists)
        q_similarity = _self_similarity(inputs.q_blocks.to(inputs.q_mean), inputs.q_side.exists)
        return q_similarity > self.similar, inputs.for_heads(k_similarity > self.similar)


def _self_similarity(blocks: torch.Tensor, exists: torch.Tensor) -> torch.Tensor:
    """Return the mean cosine of all pairs of tokens of a block, ``[B, H, N]``; 1 if it is empty."""
    unit = torch.nn.functional.normalize(blocks, dim=-1) * exists[..., None]
    count = exists.sum(-1)
    pairs = unit.sum(-2).square().sum(-1) / count.clamp(min=1).square()
    return torch.where(count > 0, pairs, 1)
