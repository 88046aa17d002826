"""Agent attention: a few mean queries stand between the queries and the keys."""

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
    """Attention through agents; two softmaxes of ``tokens x agents``:
    ``softmax(q A^T s2) [softmax(A k^T s) v] + c v`` with agents A pooled from the queries. Low-rank
    and not block-sparse, so it is an operator of its own.

    Args:
        box: sides of the box of queries whose mean is an agent, (frames, height, width).
        second: ``s2`` as a factor of the scale ``s``; None is ``s2 = s^0.3``, AgentSD's
            ``k_scale2=0.3``.
        shortcut: ``c``, the share of the values that is added. Models that are trained with agents
            want ``second=1.0``.

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
        """Output ``[B, H, L, D]``; arguments as ``sparse_attention``, k and v finite past the end
        of a text. Text tokens beyond their length are no agents and no keys."""
        wide = torch.float64 if q.dtype == torch.float64 else torch.float32
        q, wrong = set_aside(q)
        orders = tuple(BoxOrder(self.box) for _ in layout.grids)
        size = self.box[0] * self.box[1] * self.box[2]
        boxes = partition_by_order(layout, orders, size, q.device)
        own = boxes.of_grid
        agents = block_means(boxes.take(q), boxes.exists).index_select(2, own)
        text = [
            torch.arange(begin, begin + segment.length, device=q.device)
            for begin, segment in zip(layout.starts, layout.segments, strict=True)
            if segment.grid is None
        ]
        own_q = q if text_lengths is None else without_padding(q, layout, text_lengths)
        agents = torch.cat([agents, *(own_q.index_select(2, at).to(wide) for at in text)], 2)
        share = q.shape[1] // k.shape[1]
        keys, values = (x.to(wide).repeat_interleave(share, 1) for x in (k, v))
        second = scale**EXPONENT if self.second is None else scale * self.second
        first = q.to(wide) @ agents.mT * second
        last = agents @ keys.mT * scale
        if text_lengths is not None:
            valid = valid_keys(text_lengths, layout)[:, None, None]
            last = last.masked_fill(~valid, -torch.inf)
            there = [valid[..., at] for at in text]
            ones = valid.new_ones(*valid.shape[:3], len(own))
            first = first.masked_fill(~torch.cat([ones, *there], 3), -torch.inf)
        out = first.softmax(-1) @ (last.softmax(-1) @ values)
        return (out + self.shortcut * values + wrong[..., None]).to(q.dtype)
