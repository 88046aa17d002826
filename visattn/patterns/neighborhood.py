"""Neighborhood attention: a window of fixed size around each query, per axis."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import torch

from visattn._arguments import check_flag, check_sizes
from visattn.blocks.predicates import AxisRule, Places
from visattn.geometry.layout import Grid
from visattn.geometry.orders import Triple
from visattn.patterns.base.boxes import NO_UNIT, AxisPattern
from visattn.patterns.base.pattern import SearchMembers
from visattn.patterns.base.sizes import Sizes, per_axis, to_tokens


@dataclass(frozen=True)
class AxisWindow:
    """The parameters on one axis, in tokens."""

    length: int
    window: int
    stride: int
    dilation: int
    causal: bool

    def allows(self, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        """Return which pairs of coordinates are kept.

        Tokens of one residue class modulo the dilation form a separate axis. The window around the
        query's leader is moved inward at the borders and keeps its size; a causal window ends at
        the query.
        """
        group = q % self.dilation
        inner, key = q // self.dilation, k // self.dilation
        length = self.length // self.dilation + (group < self.length % self.dilation).long()
        if self.causal:
            leader = torch.minimum(inner // self.stride * self.stride + self.stride - 1, length - 1)
            inside = (key >= leader - self.window + 1) & (key <= inner)
        else:
            left, right = self.window // 2, self.window // 2 + self.window % 2 - 1
            leader = torch.minimum(
                inner // self.stride * self.stride + self.stride // 2, length - 1
            )
            center = torch.minimum(leader.clamp(min=left), length - 1 - right)
            inside = (key >= center - left) & (key <= center + right)
        return inside & (k % self.dilation == group)

    def bounds(self) -> AxisRule:
        """Return the same rule as bounds over the query's coordinate."""
        low, high = [], []
        for x in range(self.length):
            inner, group = divmod(x, self.dilation)
            length = len(range(group, self.length, self.dilation))
            base = inner - inner % self.stride
            if self.causal:
                first = max(0, min(base + self.stride, length) - self.window)
                last = inner
            else:
                first = min(base + self.stride // 2, length - 1) - self.window // 2
                first = max(0, min(first, length - self.window))
                last = first + self.window - 1
            low.append(first * self.dilation + group)
            high.append(last * self.dilation + group)
        return AxisRule(torch.tensor(low), torch.tensor(high), self.dilation)


@dataclass(frozen=True, eq=False)
class Neighborhood(AxisPattern):
    """Each query sees ``window`` keys per axis around it, as NATTEN defines it.

    Args:
        window: keys per axis, one size for all axes or ``(frames, height, width)``; an even window
            has one key more on the left. ``1.0`` is the whole axis. ``window * dilation`` fits in
            the axis.
        stride: queries that share a window, 1 to ``window``; ``stride=window`` is block attention.
        dilation: distance of neighbouring keys in the window.
        causal: no key after the query on that axis, one flag for all or one per axis.

    Raises:
        TypeError, ValueError: a parameter has a wrong type or value, or does not fit the grid.

    Example:
        >>> from visattn import Grid, TokenLayout
        >>> from visattn.patterns import Neighborhood
        >>> pattern = Neighborhood((3, 5, 5))
        >>> round(pattern.density(TokenLayout(Grid(6, 8, 8))), 3)
        0.195

    Source:
        Hassani et al. (2025), "Generalized Neighborhood Attention: Multi-dimensional Sparse
        Attention at the Speed of Light", arXiv 2504.16922 (window, stride, dilation, causal); the
        first form: Hassani et al. (2023), "Neighborhood Attention Transformer", arXiv 2204.07143;
        dilated: arXiv 2209.15001.
    Default:
        paper
    Differences:
        none
    """

    window: Sizes
    stride: Sizes = 1
    dilation: Sizes = 1
    causal: bool | tuple[bool, ...] = False
    name: ClassVar[str] = "neighborhood"
    family: ClassVar[str] = "boxes"
    color: ClassVar[str] = "#56b4e9"
    example: ClassVar[str] = "neighborhood((3, 5, 5))"

    def __post_init__(self) -> None:
        for name in ("window", "stride", "dilation"):
            check_sizes(name, getattr(self, name))
        if isinstance(self.causal, tuple):
            if not 1 <= len(self.causal) <= 3:
                raise ValueError(f"causal={self.causal} must be one flag or a tuple of up to three")
            for flag in self.causal:
                check_flag("causal", flag)
        else:
            check_flag("causal", self.causal)

    @classmethod
    def search_members(cls, grid: Grid, block: int) -> dict[str, SearchMembers]:
        return {
            "neighborhood": lambda share: Neighborhood((share, share, share)),
            "neighborhood in the frame": lambda share: Neighborhood((1, share, share)),
            "neighborhood along time": lambda share: Neighborhood((1.0, share, share)),
            "neighborhood of frames": lambda share: Neighborhood((share, 1.0, 1.0)),
        }

    def windows(self, grid: Grid) -> tuple[AxisWindow, AxisWindow, AxisWindow]:
        """Return the parameters of each axis, in tokens."""
        window, stride = (
            per_axis("window", self.window, grid, 1),
            per_axis("stride", self.stride, grid, 1),
        )
        dilation, causal = (
            per_axis("dilation", self.dilation, grid, 1),
            per_axis("causal", self.causal, grid, False),
        )
        axes = []
        for axis, length in enumerate(grid.shape):
            given = window[axis]
            at_least = (
                given if isinstance(given, int) else to_tokens("window", given, length, axis)
            )
            step = to_tokens("dilation", dilation[axis], length, axis, max(1, length // at_least))
            size = to_tokens("window", given, length, axis, length // step)
            share = to_tokens("stride", stride[axis], length, axis, size)
            axes.append(AxisWindow(length, size, share, step, causal[axis]))
        return axes[0], axes[1], axes[2]

    def keeps(self, q: Places, k: Places, grid: Grid) -> torch.Tensor:
        kept = [w.allows(a, b) for w, a, b in zip(self.windows(grid), q, k, strict=True)]
        return kept[0] & kept[1] & kept[2]

    def axis_rules(self, grid: Grid) -> Iterator[AxisRule]:
        return map(_bounds, self.windows(grid))

    def cuts(self, grid: Grid) -> tuple[Triple, Triple, Triple]:
        t, h, w = (window.dilation for window in self.windows(grid))
        return NO_UNIT, NO_UNIT, (t, h, w)


@lru_cache(maxsize=64)
def _bounds(window: AxisWindow) -> AxisRule:
    return window.bounds()
