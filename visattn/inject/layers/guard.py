"""The guard: heads that would take longer than dense attention run dense."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from visattn.cost import (
    Calibration,
    DenseAttention,
    calibration_of,
    device_name,
    layer_cost,
    measured_again,
)
from visattn.geometry.layout import TokenLayout
from visattn.patterns import Dense, HeadPattern, Pattern
from visattn.plan import Plan
from visattn.runtime.torch_settings import plain_torch

__all__ = ["Verdict", "guards", "measure_again", "worthwhile"]

DENSE = Dense()


class Verdict(NamedTuple):
    """What the heads of a layer run under the guard.

    Attributes:
        heads: the patterns of the heads, with ``Dense()`` instead of patterns that would be slower.
        limit: time in seconds that a call does not exceed if the prediction is right: the time of
            dense attention if some head is sparse, and the predicted time of the plan if all heads
            run dense. None if a dynamic pattern makes it unknown.
    """

    heads: tuple[HeadPattern, ...]
    limit: float | None


def guards(wanted: bool | None, plan: Plan, device: torch.device) -> bool:
    """Return whether heads are guarded.

    Args:
        wanted: the choice of the user. None: they are guarded, unless the environment has
            ``VISATTN_GUARD=0`` or the plan was measured on such a device. A measurement is better
            than a prediction.
        plan: the plan.
        device: the device of the denoiser.
    """
    if wanted is not None:
        return wanted
    if os.environ.get("VISATTN_GUARD", "1") == "0":
        return False
    measured = plan.evidence.get("measured_on")
    return measured is None or measured != device_name(device)


@plain_torch()
def worthwhile(
    heads: tuple[HeadPattern, ...],
    q: torch.Tensor,
    layout: TokenLayout,
    tell: Callable[[str], None],
    dense_attention: DenseAttention,
) -> Verdict:
    """Return the heads of a layer, with ``Dense()`` instead of static patterns that the calibration
    of the device predicts to take longer than dense attention.

    Args:
        heads: the patterns of the heads.
        q: queries ``[B, ..., D]``, on the device and with the dtype of the layer.
        layout: the layout of the tokens.
        tell: logs a text once; called for each slow pattern.
        dense_attention: the attention that the pipeline runs for a dense head.
    """
    calibration = calibration_of(q.device, q.dtype, q.shape[-1], dense_attention)
    batch = q.shape[0]
    slow = {
        pattern
        for pattern, count in Counter(heads).items()
        if isinstance(pattern, Pattern)
        and pattern != DENSE
        and _slower(pattern, count, layout, batch, calibration, tell)
    }
    kept = tuple(DENSE if pattern in slow else pattern for pattern in heads)
    if not all(isinstance(pattern, Pattern) for pattern in kept):
        return Verdict(kept, None)
    cost = layer_cost(_static(kept), layout, calibration, batch=batch)
    margin = 1 + calibration.spread
    if set(kept) - {DENSE} and cost.seconds < cost.dense:
        return Verdict(kept, margin * cost.dense)
    # splitting the heads costs more than they save, or no head saves time
    planned = layer_cost(_static(heads), layout, calibration, batch=batch)
    return Verdict((DENSE,) * len(heads), margin * planned.seconds)


@plain_torch()
def measure_again(q: torch.Tensor, dense_attention: DenseAttention) -> bool:
    """Measure the device again, because calls contradict the stored calibration. Return False if
    this process has already done so."""
    return measured_again(q.device, q.dtype, q.shape[-1], dense_attention)


def _static(heads: Sequence[HeadPattern]) -> list[Pattern]:
    return [pattern for pattern in heads if isinstance(pattern, Pattern)]


def _slower(
    pattern: Pattern,
    heads: int,
    layout: TokenLayout,
    batch: int,
    calibration: Calibration,
    tell: Callable[[str], None],
) -> bool:
    cost = layer_cost([pattern] * heads, layout, calibration, batch=batch)
    if cost.seconds < cost.dense:
        return False
    tell(
        f"{pattern} runs dense at {layout}: for {heads} heads it is predicted to take "
        f"{1e3 * cost.seconds:.3g} ms on {calibration.device}, and dense attention "
        f"({calibration.dense_by}) takes {1e3 * cost.dense:.3g} ms; guard=False or VISATTN_GUARD=0 "
        "runs it anyway"
    )
    return True
