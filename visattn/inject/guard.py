"""No plan makes a layer slower: heads that would take longer than dense attention run dense."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable

import torch

from visattn.cost import Calibration, calibration_of, device_name, layer_cost
from visattn.layout import TokenLayout
from visattn.patterns import Dense, HeadPattern, Pattern
from visattn.plan import Plan

__all__ = ["guards", "worthwhile"]

DENSE = Dense()


def guards(wanted: bool | None, plan: Plan, device: torch.device) -> bool:
    """Whether heads are guarded: as wanted, or if that is None unless ``VISATTN_GUARD=0``, or the
    plan was measured on such a device, which says more than a prediction."""
    if wanted is not None:
        return wanted
    if os.environ.get("VISATTN_GUARD", "1") == "0":
        return False
    measured = plan.evidence.get("measured_on")
    return measured is None or measured != device_name(device)


def worthwhile(
    heads: tuple[HeadPattern, ...],
    q: torch.Tensor,
    layout: TokenLayout,
    tell: Callable[[str], None],
) -> tuple[HeadPattern, ...]:
    """The heads of a layer, with ``Dense()`` in place of static patterns that the calibration of
    the device predicts to take longer than dense attention; each is told once.

    Args:
        q: ``[B, ..., D]``, of the device and dtype that they run on.
    """
    calibration = calibration_of(q.device, q.dtype, q.shape[-1])
    slow = {
        pattern
        for pattern, count in Counter(heads).items()
        if isinstance(pattern, Pattern)
        and pattern != DENSE
        and _slower(pattern, count, layout, q.shape[0], calibration, tell)
    }
    kept = tuple(DENSE if pattern in slow else pattern for pattern in heads)
    if all(isinstance(pattern, Pattern) for pattern in kept) and set(kept) - {DENSE}:
        static = [pattern for pattern in kept if isinstance(pattern, Pattern)]
        cost = layer_cost(static, layout, calibration, batch=q.shape[0])
        if cost.seconds >= cost.dense:  # what parting the heads costs is more than they save
            return (DENSE,) * len(heads)
    return kept


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
        f"{1e3 * cost.seconds:.3g} ms on {calibration.device}, and dense attention takes "
        f"{1e3 * cost.dense:.3g} ms; guard=False or VISATTN_GUARD=0 runs it all the same"
    )
    return True
