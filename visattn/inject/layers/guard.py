"""No plan makes a layer slower: heads that would take longer than dense attention run dense."""

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
        heads: with ``Dense()`` in place of patterns that would be slower.
        limit: seconds that a call must not exceed, if the prediction is right: those of the layer's
            dense attention where something sparse runs, and those that were predicted for the plan
            where all of it runs dense. None where a dynamic pattern leaves it unknown.
    """

    heads: tuple[HeadPattern, ...]
    limit: float | None


def guards(wanted: bool | None, plan: Plan, device: torch.device) -> bool:
    """Whether heads are guarded: as wanted, or if that is None unless ``VISATTN_GUARD=0``, or the
    plan was measured on such a device, which says more than a prediction."""
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
    """The heads of a layer, with ``Dense()`` in place of static patterns that the calibration of
    the device predicts to take longer than dense attention; each is told once.

    Args:
        q: ``[B, ..., D]``, of the device and dtype that they run on.
        dense_attention: what the pipeline runs where a head is dense.
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
    # what parting the heads costs is more than they save, or none of them saves anything
    planned = layer_cost(_static(heads), layout, calibration, batch=batch)
    return Verdict((DENSE,) * len(heads), margin * planned.seconds)


@plain_torch()
def measure_again(q: torch.Tensor, dense_attention: DenseAttention) -> bool:
    """Measure the device anew, since a call contradicts what is kept; False where this process has
    done so before."""
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
        "runs it all the same"
    )
    return True
