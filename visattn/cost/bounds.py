"""How fast a pattern can be at all, from the tiles that its queries touch."""

from __future__ import annotations

from typing import NamedTuple

import torch

from visattn.geometry.layout import Grid, on_cpu
from visattn.geometry.orders import Triple
from visattn.patterns.base.boxes import AxisPattern

__all__ = ["Bounds", "end_to_end", "tile_bounds"]


class Bounds(NamedTuple):
    """Speedups over dense attention, were every tile to cost the same: ``mean`` when rows of tiles
    share the machine evenly, ``worst`` when each takes as long as the longest."""

    mean: float
    worst: float


@on_cpu
def tile_bounds(pattern: AxisPattern, grid: Grid, q_tile: Triple, k_tile: Triple) -> Bounds:
    """Count the key tiles that each query tile touches, tiles lying where they lie.

    Args:
        pattern: of the kinds that act axis by axis, without dilation.
        q_tile, k_tile: tokens of a tile along (frames, height, width).

    On an axis a query tile touches the key tiles between the least and the greatest key of its
    queries; touched tiles multiply over the axes. ``worst`` is what NATTEN's simulator reports
    (Hassani et al. 2025, Generalized Neighborhood Attention, arXiv 2504.16922, section 3.3).

    Raises:
        ValueError: the pattern is dilated, so that its tiles are not runs of an axis.
    """
    mean = worst = 1.0
    for axis, (length, q_side, k_side) in enumerate(zip(grid.shape, q_tile, k_tile, strict=True)):
        rule = pattern.axis_rule(axis, grid)
        if rule.modulus > 1:
            raise ValueError(
                f"pattern={pattern} is dilated along axis {axis}, where its keys are no run of "
                "tiles; bound the same pattern without dilation on one residue class"
            )
        tile = torch.arange(length) // q_side
        count = int(tile[-1]) + 1
        low = torch.full((count,), length).scatter_reduce(0, tile, rule.low, "amin")
        high = torch.full((count,), -1).scatter_reduce(0, tile, rule.high, "amax")
        touched = (high // k_side - low // k_side + 1).double()
        everything = -(-length // k_side)
        mean *= everything / float(touched.mean())
        worst *= everything / float(touched.max())
    return Bounds(mean, worst)


def end_to_end(speedup: float, share: float) -> float:
    """Speedup of a whole step when attention, ``share`` of its time, is ``speedup`` times as fast
    (Amdahl 1967).

    Raises:
        ValueError: share is not between 0 and 1, or speedup is not above 0.
    """
    if not 0 <= share <= 1:
        raise ValueError(f"share={share} must be between 0 and 1, the attention's part of the time")
    if not speedup > 0:
        raise ValueError(f"speedup={speedup} must be above 0")
    return 1 / (1 - share + share / speedup)
