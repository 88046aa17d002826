"""Keys sorted by what all queries give them, so that hot keys share blocks."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import ClassVar

import torch

from visattn._arguments import check_block, check_share, check_word
from visattn.geometry.layout import TokenLayout, on_cpu
from visattn.geometry.orders import Order
from visattn.selectors.per_head_order import (
    PerHeadSelector,
    Runs,
    even_runs,
    grid_rows,
    grid_tokens,
    order_runs,
)
from visattn.selectors.selector import ORDERS, order_of
from visattn.selectors.stages.history import SelectorState
from visattn.selectors.stages.inputs import Inputs
from visattn.selectors.stages.prefix import top_mass

__all__ = ["KeyOrder"]


@dataclass(frozen=True, eq=False)
class KeyOrder(PerHeadSelector):
    """Blocks of sorted keys, chosen until they hold a share of the pooled softmax.

    Keys are sorted by the mean softmax mass that a few queries give to them. Attention does not
    depend on the order of the keys, so the output needs no reordering.

    Args:
        mass: the share of the pooled softmax.
        queries: number of queries by which the keys are sorted.
        block: tokens of a block.
        order: order of the queries: ``"tiles"``, ``"hilbert"`` or ``"raster"``.

    Example:
        >>> import torch
        >>> from visattn import Grid, TokenLayout, sparse_attention
        >>> from visattn.selectors import KeyOrder
        >>> layout = TokenLayout(Grid(2, 8, 8))
        >>> q, k, v = torch.randn(3, 1, 2, layout.length, 16)
        >>> sparse_attention(q, k, v, KeyOrder(mass=0.6, queries=8, block=16), layout).shape
        torch.Size([1, 2, 128, 16])

    Source:
        Wang et al. (2025), "Sparser Block-Sparse Attention via Token Permutation" (PBS-Attn), arXiv
        2510.21270. Code: github.com/xinghaow99/pbs-attn (commit 8ce8e02).
    Default:
        own. The published method is causal throughout, and has no case in common with this one.
    Differences:
        - Keys are sorted over the whole grid; theirs within segments.
        - The queries that sort are spread over the grid; theirs are the last ones.
    """

    mass: float = 0.9
    queries: int = 64
    block: int = 64
    order: str = "tiles"
    name: ClassVar[str] = "key_order"
    color: ClassVar[str] = "#2f9e80"
    example: ClassVar[str] = "key_order(0.6, 9, 8)"

    def __post_init__(self) -> None:
        check_share("mass", self.mass, above=True)
        check_block("queries", self.queries)
        check_block("block", self.block)
        check_word("order", self.order, ORDERS)

    def arrange(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        layout: TokenLayout,
        scale: float,
        past: SelectorState,
    ) -> tuple[torch.Tensor, Runs, int, torch.Tensor, Runs, int]:
        acc_dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
        queries, keys = grid_tokens(q, layout).to(acc_dtype), grid_tokens(k, layout).to(acc_dtype)
        keys = keys.repeat_interleave(q.shape[1] // k.shape[1], 1)
        count = keys.shape[2]
        index = torch.arange(min(self.queries, count), device=q.device) * count
        rows = queries.index_select(2, index // min(self.queries, count))
        mass = (rows @ keys.mT * scale).softmax(-1).mean(2)
        order = mass.argsort(dim=-1, descending=True, stable=True)
        query_order = order_of(self.order, layout.grids[0][1], self.block)
        q_order = _index(layout, (query_order,), q.device).expand(*q.shape[:2], -1)
        return (
            q_order,
            order_runs(layout, query_order, self.block, q),
            self.block,
            order,
            even_runs(order, self.block),
            self.block,
        )

    def choose(self, inputs: Inputs, q_runs: Runs, k_runs: Runs) -> torch.Tensor:
        q_mean = inputs.q_mean[:, :, grid_rows(inputs.layout, inputs.q_side, q_runs)]
        k_mean = inputs.k_mean[:, :, grid_rows(inputs.layout, inputs.k_side, k_runs)]
        return top_mass((q_mean @ k_mean.mT * inputs.scale).float(), self.mass)


@functools.lru_cache(maxsize=64)
@on_cpu
def _index(layout: TokenLayout, order: tuple[Order], device: torch.device) -> torch.Tensor:
    """Return the tokens of the grid in an order; copied to the device once."""
    return order[0].index(layout.grids[0][1]).to(device)
