"""A selector that skips blocks after they had little mass once."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch

from visattn._arguments import check_block, check_count, check_share, check_word
from visattn.geometry.layout import TokenLayout
from visattn.selectors.selector import ORDERS, Selector, Stages
from visattn.selectors.stages.choose import TopK
from visattn.selectors.stages.history import SelectorState
from visattn.selectors.stages.scores import Pooled
from visattn.selectors.stages.selection import Selection

__all__ = ["SkipList", "packed", "unpacked"]


@dataclass(frozen=True, eq=False)
class SkipList(Selector):
    """Skip key blocks that had little mass at an earlier step.

    The first two steps see all blocks. Afterwards a query block sees the key blocks in which some
    query had a key with enough mass, and its own block. The attention kernel records the largest
    logit of each tile. The list of skipped blocks only grows.

    Args:
        least: a block is skipped if no key of it reaches this share of the mass of any query.
        every: number of steps after which the list starts again.
        block: tokens of a block.
        order: order in which tokens are cut into blocks: ``"hilbert"``, ``"tiles"`` or
            ``"raster"``.

    It needs the steps of a pipeline with a plan; elsewhere it computes dense attention.

    Example:
        >>> import torch
        >>> from visattn import Grid, TokenLayout, sparse_attention
        >>> from visattn.selectors import SkipList
        >>> layout = TokenLayout(Grid(2, 8, 8))
        >>> q, k, v = torch.randn(3, 1, 2, layout.length, 16)
        >>> sparse_attention(q, k, v, SkipList(least=0.01, block=16), layout).shape
        torch.Size([1, 2, 128, 16])

    Source:
        Shmilovich et al. (2025), "LiteAttention: A Temporal Sparse Attention for Diffusion
        Transformers", arXiv 2511.11062.
    Default:
        own. The published rule depends on the order in which a CUDA kernel visits the tiles.
    Differences:
        - The largest logit is compared with the LSE that the queries had one step before; theirs
          with the running maximum. ``least`` is thus a probability.
        - The own block is never skipped.
        - ``every`` begins a new list.
    """

    least: float = 1e-3
    every: int = 1000
    block: int = 64
    order: str = "hilbert"
    name: ClassVar[str] = "skip_list"
    color: ClassVar[str] = "#b5e4d4"
    example: ClassVar[str] = "skip_list(0.01, block=8)"
    reusable: ClassVar[bool] = False  # each call adds to the list

    def __post_init__(self) -> None:
        check_share("least", self.least, above=True)
        check_count("every", self.every, 1)
        check_block("block", self.block)
        check_word("order", self.order, ORDERS)

    @property
    def learns(self) -> bool:
        return True

    @property
    def records(self) -> bool:
        return True

    def select(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        layout: TokenLayout,
        scale: float,
        *,
        kernels: bool = False,
        past: SelectorState | None = None,
    ) -> Selection:
        stages = Stages(
            Pooled(), TopK(), orders=(self.order, self.order), blocks=(self.block, self.block)
        )
        sides = stages.sides(layout, q.device)
        forced = stages.forced(layout, q.device)
        shape = (*q.shape[:2], len(sides[0]), len(sides[1]))
        kept = torch.ones(shape, dtype=torch.bool, device=q.device)
        if past is not None:
            if past.calls % self.every == 0:
                past.skipped = past.lse = None
            past.calls += 1
            if past.skipped is not None:
                kept = ~unpacked(past.skipped, shape[3]) | forced
        return Selection.of(*sides, kept.to(torch.uint8))

    def learn(self, past: SelectorState, lse: torch.Tensor, highest: torch.Tensor | None) -> None:
        past.lse = lse
        if highest is not None:  # minus infinity for blocks that are already skipped
            past.skipped = packed(highest < math.log(self.least))


def packed(mask: torch.Tensor) -> torch.Tensor:
    """Pack eight flags of a row into a byte: bool ``[..., N]`` to uint8 ``[..., ceil(N / 8)]``."""
    octets = torch.nn.functional.pad(mask, (0, -mask.shape[-1] % 8)).unflatten(-1, (-1, 8))
    powers = 1 << torch.arange(8, device=mask.device, dtype=torch.uint8)
    out: torch.Tensor = (octets * powers).sum(-1, dtype=torch.uint8)
    return out


def unpacked(bits: torch.Tensor, count: int) -> torch.Tensor:
    """Return the flags that ``packed`` packed, bool ``[..., count]``."""
    places = torch.arange(8, device=bits.device, dtype=torch.uint8)
    return ((bits[..., None] >> places) & 1).flatten(-2)[..., :count].bool()
