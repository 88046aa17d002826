"""A pattern seen in another nesting of the axes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from visattn.blocks.predicates import Places, Predicate
from visattn.geometry.layout import Grid
from visattn.geometry.orders import Order, axis_permutation
from visattn.patterns.base.pattern import Pattern

ORDERS = ("thw", "twh", "htw", "hwt", "wth", "wht")


@dataclass(frozen=True, eq=False)
class AxisOrder(Pattern):
    """``pattern`` on the grid with its axes reordered: ``"hwt"`` puts height in the place of
    frames.

    Args:
        pattern: any static pattern; its per-axis parameters count for the reordered axes.
        order: the letters t, h, w, slowest axis first.

    Raises:
        TypeError, ValueError: ``pattern`` is no static pattern, or ``order`` no order of t, h, w.

    Example:
        >>> from visattn import Grid, TokenLayout
        >>> from visattn.patterns import AxisOrder, Diagonal
        >>> pattern = AxisOrder(Diagonal(40), "twh")
        >>> round(pattern.density(TokenLayout(Grid(6, 8, 8))), 3)
        0.2

    Source:
        Zhao et al. (2025), "PAROAttention: Pattern-Aware ReOrdering for Efficient Sparse and
        Quantized Attention in Visual Generation Models", arXiv 2506.16054.
    Default:
        paper
    Differences:
        - The order is a parameter; the paper picks one of the six for each head.
        - Nothing is quantised.
    """

    pattern: Pattern
    order: str = "hwt"
    name: ClassVar[str] = "axis_order"
    family: ClassVar[str] = "composed"
    color: ClassVar[str] = "#57c4a2"
    example: ClassVar[str] = "axis_order(diagonal(40), 'twh')"

    def __post_init__(self) -> None:
        if not isinstance(self.pattern, Pattern):
            raise TypeError(f"pattern={self.pattern!r} must be a pattern, for example Diagonal(64)")
        axis_permutation(self.order)

    @property
    def outside(self) -> bool:  # type: ignore[override]
        return self.pattern.outside

    def keeps(self, q: Places, k: Places, grid: Grid) -> torch.Tensor:
        a, b, c = axis_permutation(self.order)
        return self.pattern.keeps((q[a], q[b], q[c]), (k[a], k[b], k[c]), grid.permuted((a, b, c)))

    def pairs(self, grid: Grid) -> int:
        return self.pattern.on(grid.permuted(axis_permutation(self.order))).pairs

    def covered(self, grid: Grid) -> torch.Tensor | bool:
        axes = axis_permutation(self.order)
        inner = grid.permuted(axes)
        covered = self.pattern.on(inner).covered
        if isinstance(covered, bool):
            return covered
        back = [axes.index(axis) for axis in range(3)]
        return covered.view(inner.shape).permute(back).reshape(-1)

    def predicates(self, grid: Grid) -> tuple[Predicate, ...]:
        axes = axis_permutation(self.order)
        inner = self.pattern.on(grid.permuted(axes))
        return tuple(predicate.permuted(axes) for predicate in inner.predicates)

    def orders(self, grid: Grid, block_q: int, block_k: int) -> tuple[Order, Order]:
        axes = axis_permutation(self.order)
        q_order, k_order = self.pattern.on(grid.permuted(axes)).orders(block_q, block_k)
        return q_order.permuted(axes, grid), k_order.permuted(axes, grid)


def distinct_orders(grid: Grid) -> list[str]:
    """Return the orders of the axes that arrange the tokens of a grid differently.

    Axes of one token do not count: ``["thw", "twh"]`` for a grid of one frame.
    """
    shape = dict(zip("thw", grid.shape, strict=True))
    orders: dict[str, str] = {}
    for order in ORDERS:
        orders.setdefault("".join(axis for axis in order if shape[axis] > 1), order)
    return list(orders.values())
