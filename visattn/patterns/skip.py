"""A skipped head: no pair is kept, the output is zero."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from visattn.blocks.predicates import Places, Predicate
from visattn.geometry.layout import Grid
from visattn.geometry.orders import LineOrder, Order
from visattn.patterns.base.pattern import Pattern


@dataclass(frozen=True, eq=False)
class Skip(Pattern):
    """No query sees any key, text included: output 0, LSE minus infinity.

    Example:
        >>> from visattn import Grid, TokenLayout
        >>> from visattn.patterns import Skip
        >>> pattern = Skip()
        >>> round(pattern.density(TokenLayout(Grid(6, 8, 8))), 3)
        0.0

    Source:
        Chen et al. (2025), "Sparse-vDiT: Unleashing the Power of Sparse Attention to Accelerate
        Video Diffusion Transformers", arXiv 2506.03065, mode M1.
    Default:
        paper
    Differences:
        none
    """

    name: ClassVar[str] = "skip"
    family: ClassVar[str] = "plain"
    color: ClassVar[str] = "#c9ced3"
    example: ClassVar[str] = "skip()"
    outside: ClassVar[bool] = False

    def keeps(self, q: Places, k: Places, grid: Grid) -> torch.Tensor:
        return (q[0] != q[0]) & (k[0] != k[0])

    def pairs(self, grid: Grid) -> int:
        return 0

    def predicates(self, grid: Grid) -> tuple[Predicate, ...]:
        return ()

    def orders(self, grid: Grid, block_q: int, block_k: int) -> tuple[Order, Order]:
        return LineOrder(), LineOrder()
