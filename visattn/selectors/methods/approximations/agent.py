"""Agent attention: a few mean queries link the queries to the keys."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from visattn._arguments import is_number
from visattn.geometry.layout import TokenLayout, valid_keys
from visattn.geometry.orders import BoxOrder
from visattn.geometry.padding import set_aside, without_padding
from visattn.patterns.base.head_pattern import HeadPattern
from visattn.selectors.stages.blocks import block_means, partition_by_order

__all__ = ["Agent"]

EXPONENT = 0.3  # AgentSD's k_scale2


@dataclass(frozen=True, eq=False)
class Agent(HeadPattern):
    """Agent attention: a few agent tokens pass information from the keys to the queries.

    ``softmax(q A^T s2) [softmax(A k^T s) v] + c v``, with the agents A pooled from the queries.
    Both softmaxes have size ``tokens x agents``. The result has low rank and is not block-sparse,
    so this pattern is computed by an operator of its own.

    Args:
        box: sides of the box of queries whose mean is one agent, (frames, height, width) in tokens.
        second: ``s2``, as a factor of the scale ``s``; None is ``s2 = s^0.3``, the ``k_scale2=0.3``
            of AgentSD. Models that were trained with agents need ``second=1.0``.
        shortcut: ``c``, the share of the values that is added to the output.

    Example:
        >>> import torch
        >>> from visattn import Grid, TokenLayout, sparse_attention
        >>> from visattn.selectors import Agent
        >>> layout = TokenLayout(Grid(2, 8, 8))
        >>> q, k, v = torch.randn(3, 1, 2, layout.length, 16)
        >>> sparse_attention(q, k, v, Agent(box=(1, 4, 4)), layout).shape
        torch.Size([1, 2, 128, 16])

    Source:
        Han et al. (2023), "Agent Attention: On the Integration of Softmax and Linear Attention",
        ECCV 2024, arXiv 2312.08874. Code: github.com/LeapLabTHU/Agent-Attention (commit 207ce3e).
    Default:
        code. It is that of AgentSD, for models that were not trained with agents.
    Differences:
        - Agents are the means of boxes of queries, on any grid; AgentSD merges like tokens of an
          image.
        - Text tokens are agents themselves.
    """

    box: tuple[int, int, int] = (1, 4, 4)
    second: float | None = None
    shortcut: float = 0.075
    name: ClassVar[str] = "agent"
    family: ClassVar[str] = "dynamic"
    color: ClassVar[str] = "#a5678a"
    example: ClassVar[str] = "agent((1, 3, 3))"

    def __post_init__(self) -> None:
        BoxOrder(self.box)
        for name in ("second", "shortcut"):
            if name == "second" and self.second is None:
                continue
            value = getattr(self, name)
            if not is_number(value):
                raise TypeError(f"{name}={value!r} must be a number")

    def run(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        layout: TokenLayout,
        text_lengths: torch.Tensor | None,
        scale: float,
    ) -> torch.Tensor:
        """Compute the output ``[B, H, L, D]``; arguments as in ``sparse_attention``.

        k and v must be finite beyond the end of a text. Text tokens beyond its length are neither
        agents nor keys.
        """
        acc_dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
        q, wrong = set_aside(q)
        orders = tuple(BoxOrder(self.box) for _ in layout.grids)
        size = self.box[0] * self.box[1] * self.box[2]
        boxes = partition_by_order(layout, orders, size, q.device)
        grid_boxes = boxes.of_grid
        agents = block_means(boxes.take(q), boxes.exists).index_select(2, grid_boxes)
        text = [
            torch.arange(begin, begin + segment.length, device=q.device)
            for begin, segment in zip(layout.starts, layout.segments, strict=True)
            if segment.grid is None
        ]
        text_q = q if text_lengths is None else without_padding(q, layout, text_lengths)
        text_agents = [text_q.index_select(2, tokens).to(acc_dtype) for tokens in text]
        agents = torch.cat([agents, *text_agents], 2)
        share = q.shape[1] // k.shape[1]
        keys, values = (x.to(acc_dtype).repeat_interleave(share, 1) for x in (k, v))
        second = scale**EXPONENT if self.second is None else scale * self.second
        first = q.to(acc_dtype) @ agents.mT * second
        last = agents @ keys.mT * scale
        if text_lengths is not None:
            valid = valid_keys(text_lengths, layout)[:, None, None]
            last = last.masked_fill(~valid, -torch.inf)
            there = [valid[..., tokens] for tokens in text]
            ones = valid.new_ones(*valid.shape[:3], len(grid_boxes))
            first = first.masked_fill(~torch.cat([ones, *there], 3), -torch.inf)
        out = first.softmax(-1) @ (last.softmax(-1) @ values)
        return (out + self.shortcut * values + wrong[..., None]).to(q.dtype)
