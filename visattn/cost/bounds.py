"""Upper bounds of the speedup of a pattern, from the tiles that its queries touch."""

from __future__ import annotations

from typing import NamedTuple

import torch

from visattn.geometry.layout import Grid, on_cpu
from visattn.geometry.orders import Triple
from visattn.patterns.base.boxes import AxisPattern

__all__ = ["Bounds", "end_to_end", "tile_bounds"]


class Bounds(NamedTuple):
    """Speedups over dense attention if all tiles cost the same.

    Attributes:
        mean: when the rows of tiles are spread evenly over the machine.
        worst: when every row takes as long as the longest one.
    """

    mean: float
    worst: float


@on_cpu
def tile_bounds(pattern: AxisPattern, grid: Grid, q_tile: Triple, k_tile: Triple) -> Bounds:
    """Count the key tiles that each query tile touches.

    On an axis a query tile touches the key tiles between the first and the last key of its
    queries; the numbers of touched tiles are multiplied over the axes. ``worst`` is what NATTEN's
    simulator reports (Hassani et al. 2025, Generalized Neighborhood Attention, arXiv 2504.16922,
    section 3.3).

    Args:
        pattern: a pattern that is a product of rules along the axes, without dilation.
        grid: the grid of tokens.
        q_tile: tokens of a query tile along (frames, height, width).
        k_tile: tokens of a key tile along (frames, height, width).

    Raises:
        ValueError: the pattern is dilated, so its keys on an axis are not contiguous.
    """
    mean = worst = 1.0
    parts = zip(pattern.rules_on(grid), grid.shape, q_tile, k_tile, strict=True)
    for axis, (rule, length, q_side, k_side) in enumerate(parts):
        if rule.modulus > 1:
            raise ValueError(
                f"pattern={pattern} is dilated along axis {axis}, so its keys are no contiguous "
                "tiles; use the same pattern without dilation on one residue class"
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
    """Return the speedup of a whole step when its attention becomes faster (Amdahl 1967).

    Args:
        speedup: of the attention.
        share: of attention in the time of the step, 0 to 1.

    Raises:
        ValueError: share is not between 0 and 1, or speedup is not above 0.
    """
    if not 0 <= share <= 1:
        raise ValueError(f"share={share} of attention in the time must be between 0 and 1")
    if not speedup > 0:
        raise ValueError(f"speedup={speedup} must be above 0")
    return 1 / (1 - share + share / speedup)
