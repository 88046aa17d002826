"""Window attention, plain and shifted: the grid is cut into boxes that attend within
themselves."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch

from visattn._arguments import check_count, check_sizes
from visattn.blocks.predicates import AxisRule, Places
from visattn.geometry.layout import Grid
from visattn.geometry.orders import Triple
from visattn.patterns.base.boxes import NO_UNIT, AxisPattern, searched_sides, searched_sizes
from visattn.patterns.base.pattern import SearchMembers
from visattn.patterns.base.sizes import Sizes, per_axis, sizes_of, to_tokens


@dataclass(frozen=True, eq=False)
class Block(AxisPattern):
    """Queries see the keys of their box; boxes at the far border may be cut.

    Args:
        size: sides of a box, one for all axes or ``(frames, height, width)``.

    Raises:
        TypeError, ValueError: a size is wrong, or larger than the grid.

    Example:
        >>> from visattn import Grid, TokenLayout
        >>> from visattn.patterns import Block
        >>> pattern = Block((3, 4, 4))
        >>> round(pattern.density(TokenLayout(Grid(6, 8, 8))), 3)
        0.125

    Source:
        Liu et al. (2021), "Swin Transformer: Hierarchical Vision Transformer using Shifted
        Windows", arXiv 2103.14030; the block half of MaxViT (arXiv 2204.01697); the
        windows of DaViT (arXiv 2204.03645).
    Default:
        paper
    Differences:
        - No trained bias of relative positions.
        - Boxes at the far border may be smaller; Swin pads the grid.
    """

    size: Sizes
    name: ClassVar[str] = "block"
    family: ClassVar[str] = "boxes"
    color: ClassVar[str] = "#8ccdf3"
    example: ClassVar[str] = "block((3, 4, 4))"

    def __post_init__(self) -> None:
        check_sizes("size", self.size)

    @classmethod
    def search_members(cls, grid: Grid, block: int) -> dict[str, SearchMembers]:
        frames, height, width = grid.shape
        sizes = searched_sizes(grid)
        return {
            "windows in the frame": [Block(size) for size in sizes if size[0] == 1],
            "windows along time": [Block(size) for size in sizes if size[0] == frames],
            "windows of frames": [Block((t, height, width)) for t in searched_sides(frames)],
            "windows": [Block(size) for size in sizes],
        }

    def boxes(self, grid: Grid) -> tuple[Triple, Triple]:
        """Return the sides of a box and the end of the first box (0: a whole side), in tokens."""
        return sizes_of("size", self.size, grid), NO_UNIT

    def keeps(self, q: Places, k: Places, grid: Grid) -> torch.Tensor:
        kept = torch.ones((), dtype=torch.bool, device=q[0].device)
        for axis, (side, shift) in enumerate(zip(*self.boxes(grid), strict=True)):
            kept = kept & ((q[axis] - shift) // side == (k[axis] - shift) // side)
        return kept

    def axis_rules(self, grid: Grid) -> Iterator[AxisRule]:
        for length, side, shift in zip(grid.shape, *self.boxes(grid), strict=True):
            coordinate = torch.arange(length)
            begin = (coordinate - shift).div(side, rounding_mode="floor") * side + shift
            yield AxisRule(begin.clamp(min=0), (begin + side - 1).clamp(max=length - 1))

    def cuts(self, grid: Grid) -> tuple[Triple, Triple, Triple]:
        size, shift = self.boxes(grid)
        return size, shift, (1, 1, 1)


@dataclass(frozen=True, eq=False)
class ShiftedBlock(Block):
    """Swin's shifted windows: boxes begin at ``shift``.

    Parts that the cyclic roll of Swin would join in one box do not see one another.

    Args:
        size: sides of a box.
        shift: tokens by which the boxes are moved, per axis, below ``size``; None is half a side.
            An axis that one box covers is not shifted, as in Swin.

    Raises:
        TypeError, ValueError: a size is wrong or does not fit.

    Example:
        >>> from visattn import Grid, TokenLayout
        >>> from visattn.patterns import ShiftedBlock
        >>> pattern = ShiftedBlock((3, 4, 4))
        >>> round(pattern.density(TokenLayout(Grid(6, 8, 8))), 3)
        0.055

    Source:
        Liu et al. (2021), "Swin Transformer: Hierarchical Vision Transformer using Shifted
        Windows", arXiv 2103.14030, section 3.2.
    Default:
        paper
    Differences:
        - As for ``Block``.
    """

    shift: Sizes | None = None
    name: ClassVar[str] = "shifted_block"
    family: ClassVar[str] = "boxes"
    color: ClassVar[str] = "#2b7fb3"
    example: ClassVar[str] = "shifted_block((3, 4, 4))"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.shift is not None:
            check_sizes("shift", self.shift, minimum=0)

    @classmethod
    def search_members(cls, grid: Grid, block: int) -> dict[str, SearchMembers]:
        sizes = [size for size in searched_sizes(grid) if size != grid.shape]
        return {"windows, shifted": [ShiftedBlock(size) for size in sizes]}

    def boxes(self, grid: Grid) -> tuple[Triple, Triple]:
        size = sizes_of("size", self.size, grid)
        shift = [side // 2 for side in size]
        if self.shift is not None:
            chosen = per_axis("shift", self.shift, grid, 0)
            shift = [
                to_tokens("shift", chosen[axis], grid.shape[axis], axis, size[axis] - 1, minimum=0)
                for axis in range(3)
            ]
        # where one box covers the axis there is nothing to shift
        t, h, w = (
            0 if side >= length else step
            for step, side, length in zip(shift, size, grid.shape, strict=True)
        )
        return size, (t, h, w)

    def for_layers(self, count: int) -> tuple[Block, ...]:
        """Return Swin's alternation: plain windows in even layers, shifted ones in odd layers."""
        check_count("count", count, 1)
        return tuple(self if layer % 2 else Block(self.size) for layer in range(count))
