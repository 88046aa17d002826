"""Bands along the diagonal of the attention map, in raster order or across frames."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch

from visattn._arguments import check_size
from visattn.blocks.predicates import Band, Places, Predicate, line_weights, linear_form
from visattn.geometry.layout import Grid
from visattn.geometry.orders import LineOrder, Order, axis_permutation
from visattn.patterns.base.pattern import Pattern, SearchMembers
from visattn.patterns.base.sizes import Size


def band_pairs(length: int, width: int) -> int:
    """Return the number of pairs with ``|a - b| <= width`` among ``length`` places."""
    width = min(width, length - 1)
    return length * (2 * width + 1) - width * (width + 1)


@dataclass(frozen=True, eq=False)
class Diagonal(Pattern):
    """``|p_q - p_k| <= width`` in the raster index ``p``.

    Args:
        width: half-width of the band in tokens, at least 0 and below the grid's tokens; a float is
            a fraction of the grid's tokens (of the sequence axis), rounded down.

    Raises:
        TypeError, ValueError: ``width`` is not such a size.

    Example:
        >>> from visattn import Grid, TokenLayout
        >>> from visattn.patterns import Diagonal
        >>> pattern = Diagonal(48)
        >>> round(pattern.density(TokenLayout(Grid(6, 8, 8))), 3)
        0.237

    Source:
        Xi et al. (2025), "Sparse VideoGen: Accelerating Video Diffusion Transformers with
        Spatial-Temporal Sparsity", arXiv 2502.01776, spatial heads. Code:
        github.com/svg-project/Sparse-VideoGen (commit 5ce7b01). Also Sparse-vDiT (arXiv
        2506.03065), mode M2, and with text kept the arrow of DiTFastAttnV2 (arXiv 2503.22796).
    Default:
        code
    Differences:
        - The code rounds the width to blocks of 128 tokens, up for Wan and down for HunyuanVideo,
          and has a first-frame sink for Wan; the presets write both out.
    """

    width: Size
    name: ClassVar[str] = "diagonal"
    family: ClassVar[str] = "bands"
    color: ClassVar[str] = "#e69f00"
    example: ClassVar[str] = "diagonal(48)"
    axes: ClassVar[str] = "thw"

    def __post_init__(self) -> None:
        check_size("width", self.width, minimum=0)

    @classmethod
    def search_members(cls, grid: Grid, block: int) -> dict[str, SearchMembers]:
        # imported here, so that the order of PATTERNS doesn't depend on it
        from visattn.patterns.axis_order import AxisOrder, distinct_orders

        def in_order(order: str) -> SearchMembers:
            return lambda share: AxisOrder(Diagonal(share), order)

        return {"band": Diagonal} | {
            f"band {order}": in_order(order) for order in distinct_orders(grid) if order != "thw"
        }

    def tokens(self, grid: Grid) -> int:
        """Return ``width`` in tokens."""
        if isinstance(self.width, float):
            return math.floor(min(self.width * grid.numel, grid.numel - 1))
        if self.width >= grid.numel:
            raise ValueError(
                f"width={self.width} must be below the {grid.numel} tokens of grid {grid}; "
                "use a float as a fraction of them, or Dense()"
            )
        return self.width

    def keeps(self, q: Places, k: Places, grid: Grid) -> torch.Tensor:
        weights = line_weights(grid, axis_permutation(self.axes))
        return (linear_form(weights, q) - linear_form(weights, k)).abs() <= self.tokens(grid)

    def pairs(self, grid: Grid) -> int:
        return band_pairs(grid.numel, self.tokens(grid))

    def predicates(self, grid: Grid) -> tuple[Predicate, ...]:
        width = self.tokens(grid)
        return (Band(line_weights(grid, axis_permutation(self.axes)), -width, width),)

    def orders(self, grid: Grid, block_q: int, block_k: int) -> tuple[Order, Order]:
        return LineOrder(self.axes), LineOrder(self.axes)


@dataclass(frozen=True, eq=False)
class MultiDiagonal(Diagonal):
    """The band in ``(h, w, t)`` order, where the tokens of one place in all frames are neighbours.

    On the raster map this shows as one diagonal per frame distance: a temporal head.

    Args:
        width: as for ``Diagonal``, in the reordered index.

    Example:
        >>> from visattn import Grid, TokenLayout
        >>> from visattn.patterns import MultiDiagonal
        >>> pattern = MultiDiagonal(21)
        >>> round(pattern.density(TokenLayout(Grid(6, 8, 8))), 3)
        0.109

    Source:
        Xi et al. (2025), "Sparse VideoGen: Accelerating Video Diffusion Transformers with
        Spatial-Temporal Sparsity", arXiv 2502.01776, temporal heads. Code:
        github.com/svg-project/Sparse-VideoGen (commit 5ce7b01). Also Sparse-vDiT (arXiv
        2506.03065), mode M3.
    Default:
        code
    Differences:
        - As for ``Diagonal``; the sink of the code is in the order of the band.
    """

    name: ClassVar[str] = "multi_diagonal"
    family: ClassVar[str] = "bands"
    color: ClassVar[str] = "#d55e00"
    example: ClassVar[str] = "multi_diagonal(21)"
    axes: ClassVar[str] = "hwt"

    @classmethod
    def search_members(cls, grid: Grid, block: int) -> dict[str, SearchMembers]:
        return {"bands across frames": MultiDiagonal}
