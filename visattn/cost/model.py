"""The predicted attention time of a layer under a plan.

A row of blocks takes ``r + full f + partial p``; the rows of all heads share the ``slots`` of a
device::

    layer = launches l + moved m + max(sum of rows / slots, longest row)

``mean`` ignores the longest row. ``worst`` assumes that every row takes as long as the longest;
measured neighborhood kernels of NATTEN come close to it (Hassani et al. 2025, Generalized
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
    """The predicted time of a layer's attention.

    Attributes:
        seconds: predicted.
        mean: predicted from the mean row of blocks.
        worst: predicted if all rows took as long as the longest.
        dense: of the same layer when all heads are dense.

    Example:
        >>> from visattn.cost import LayerCost
        >>> LayerCost(seconds=0.5, mean=0.4, worst=0.8, dense=2.0).speedup
        4.0
    """

    seconds: float
    mean: float
    worst: float
    dense: float

    @property
    def speedup(self) -> float:
        """The dense time divided by the predicted time."""
        return self.dense / self.seconds


def layer_cost(
    patterns: Sequence[Pattern], layout: TokenLayout, calibration: Calibration, *, batch: int = 1
) -> LayerCost:
    """Predict the attention time of a layer.

    Args:
        patterns: static patterns, one per head; heads with ``Dense()`` run the pipeline's dense
            attention.
        layout: of queries and keys.
        calibration: of the device, dtype and head size.
        batch: the batch size.

    Raises:
        ValueError: ``patterns`` is empty or has a dynamic pattern, whose work depends on the call.

    Example:
        >>> from visattn import Grid, TokenLayout
        >>> from visattn.cost import Calibration, layer_cost
        >>> from visattn.patterns import Dense, Neighborhood
        >>> calibration = Calibration(
        ...     device="CPU", backend="blockwise", dtype="float32", head_size=64, block=(128, 128),
        ...     slots=1, launch=1e-4, row=1e-6, full=4e-5, partial=5e-5, broad=4e-5, moved=1e-9,
        ...     dense=2e-9,
        ... )
        >>> layout = TokenLayout(Grid(4, 32, 32))
        >>> layer_cost([Dense(), Neighborhood((1, 9, 9))], layout, calibration).speedup > 1
        True
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
    if dense_heads and counts:  # the heads of the layer are split and concatenated
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
    """Return the predicted seconds of a call that does all of ``parts``."""
    rows = _rows(parts, calibration) / calibration.slots
    return _fixed(parts, calibration) + max(rows, _longest(parts, calibration))


def crossover(calibration: Calibration, tokens: int) -> float:
    """Return the block density up to which sparse attention is no slower than dense attention.

    Args:
        calibration: of the device, dtype and head size.
        tokens: of a head in raster order.

    Returns:
        The share of full blocks, from 0 to 1.

    Example:
        >>> from visattn.cost import Calibration, crossover
        >>> calibration = Calibration(
        ...     device="CPU", backend="blockwise", dtype="float32", head_size=64, block=(128, 128),
        ...     slots=1, launch=1e-4, row=1e-6, full=4e-5, partial=5e-5, broad=4e-5, moved=1e-9,
        ...     dense=2e-9,
        ... )
        >>> round(crossover(calibration, tokens=4096), 3)
        0.818
    """
    block_q, block_k = calibration.block
    rows = -(-tokens // block_q) * calibration.row / calibration.slots
    blocks = -(-tokens // block_q) * -(-tokens // block_k) * calibration.full / calibration.slots
    return min(1.0, max(0.0, (calibration.dense * tokens**2 - rows) / blocks))


def step_speedup(layers: Iterable[LayerCost], share: float) -> float:
    """Return the predicted speedup of a denoising step.

    Args:
        layers: the costs of all attention layers.
        share: of attention in the time of a dense step, 0 to 1 (``visattn bench pipeline``
            measures it).

    Example:
        >>> from visattn.cost import LayerCost, step_speedup
        >>> step_speedup([LayerCost(0.5, 0.4, 0.8, dense=2.0)], share=0.5)
        1.6
    """
    costs = list(layers)
    return end_to_end(sum(x.dense for x in costs) / sum(x.seconds for x in costs), share)


def _longest(parts: Sequence[Work], calibration: Calibration) -> float:
    """Return the seconds of the longest row, 0 if the work does not list its rows."""
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
