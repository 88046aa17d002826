"""The time of a layer under a plan, predicted.

A row takes ``r + full f + partial p``; the rows of all heads share the ``slots`` of a device::

    layer = launches l + moved m + max(sum of rows / slots, longest row)

``mean`` leaves the longest row out, and ``worst`` has every row take as long as the longest, which
is what measured neighborhood kernels of others come near (NATTEN: Hassani et al. 2025, Generalized
Neighborhood Attention, arXiv 2504.16922, section 3.3).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from visattn.attention.lowering import lower_cached
from visattn.cost.bounds import end_to_end
from visattn.cost.calibration import Calibration
from visattn.cost.work import Work, work_of
from visattn.geometry.layout import TokenLayout
from visattn.patterns import Dense, Pattern

__all__ = ["LayerCost", "crossover", "layer_cost", "seconds_of", "step_speedup"]


class LayerCost(NamedTuple):
    """Seconds of a layer's attention: predicted; by the mean row and by the worst (see above); and
    of the same layer when all heads are dense."""

    seconds: float
    mean: float
    worst: float
    dense: float

    @property
    def speedup(self) -> float:
        """Dense over predicted."""
        return self.dense / self.seconds


def layer_cost(
    patterns: Sequence[Pattern], layout: TokenLayout, calibration: Calibration, *, batch: int = 1
) -> LayerCost:
    """Predict a layer's attention.

    Args:
        patterns: static, one per head; heads with ``Dense()`` run the pipeline's own attention.
        layout: of queries and keys.
        calibration: of the device, dtype and head size.

    Raises:
        ValueError: patterns is empty, or has a dynamic one, whose work is known at a call only.
    """
    if not patterns:
        raise ValueError("patterns=() is empty; a layer has one pattern per head")
    for pattern in patterns:
        if not isinstance(pattern, Pattern):
            raise ValueError(
                f"patterns has {pattern}, which chooses its blocks at every call; the cost model "
                "predicts static patterns, visattn bench selection measures dynamic ones"
            )
    counts = Counter(patterns)
    one_head = calibration.dense * layout.length**2 * batch
    dense_heads = counts.pop(Dense(), 0)
    outside = dense_heads * one_head
    if dense_heads and counts:  # the heads of a layer are taken apart and put together again
        outside += calibration.moved * 4 * layout.length * calibration.head_size * len(patterns)
    parts = []
    for pattern, count in counts.items():
        block_map = lower_cached(pattern, layout, None, *calibration.block)
        parts.append(
            work_of(block_map, calibration.backend, count * batch, calibration.head_size)
        )
    seconds = outside + seconds_of(parts, calibration)
    rows = sum(work.rows for work in parts)
    fixed = outside + _fixed(parts, calibration)
    worst = max(_rows(parts, calibration), rows * _longest(parts, calibration))
    return LayerCost(
        seconds,
        fixed + _rows(parts, calibration) / calibration.slots,
        fixed + worst / calibration.slots,
        len(patterns) * one_head,
    )


def seconds_of(parts: Sequence[Work], calibration: Calibration) -> float:
    """Predicted seconds of a call that does all of some work."""
    rows = _rows(parts, calibration) / calibration.slots
    return _fixed(parts, calibration) + max(rows, _longest(parts, calibration))


def crossover(calibration: Calibration, tokens: int) -> float:
    """The share of full blocks, between 0 and 1, up to which a head in raster order takes no longer
    than dense attention of as many tokens; a head that executes more had better be dense."""
    block_q, block_k = calibration.block
    rows = -(-tokens // block_q) * calibration.row / calibration.slots
    blocks = -(-tokens // block_q) * -(-tokens // block_k) * calibration.full / calibration.slots
    return min(1.0, max(0.0, (calibration.dense * tokens**2 - rows) / blocks))


def step_speedup(layers: Iterable[LayerCost], share: float) -> float:
    """How many times as fast a step becomes whose attention layers these are all.

    Args:
        share: of attention in the time of a dense step, 0 to 1 (``visattn bench pipeline``).
    """
    found = list(layers)
    return end_to_end(sum(x.dense for x in found) / sum(x.seconds for x in found), share)


def _longest(parts: Sequence[Work], calibration: Calibration) -> float:
    """Of the rows, 0 where they are not told apart."""
    shapes = {shape for work in parts for shape in work.shapes}
    times = [calibration.row + f * calibration.full + p * calibration.partial for f, p in shapes]
    return max(times, default=0.0)


def _rows(parts: Sequence[Work], calibration: Calibration) -> float:
    return sum(
        work.full * calibration.full
        + work.partial * calibration.partial
        + work.broad * calibration.broad
        + work.rows * calibration.row
        for work in parts
    )


def _fixed(parts: Sequence[Work], calibration: Calibration) -> float:
    launches = len(parts) if calibration.backend == "blockwise" else bool(parts)
    return launches * calibration.launch + calibration.moved * sum(work.moved for work in parts)
