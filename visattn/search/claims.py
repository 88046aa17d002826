"""The claims of a receipt: what a search should reach, and whether this search reached it."""

from __future__ import annotations

from typing import Any

from visattn.search.clip_statistics import PLANNED, ClipStatistics
from visattn.search.measure.statistics import Interval
from visattn.search.solve.evaluated_plan import EvaluatedPlan

__all__ = ["BEST_DYNAMIC", "BEST_STATIC", "claims"]

BEST_STATIC, BEST_DYNAMIC = "best static", "best dynamic"  # names of plans among the clips
FLIPS_OF_60 = 2  # verdicts that may differ from dense
SPEED_TOLERANCE = 0.07  # relative difference of measured and predicted speed
LEAST_GAIN = 1.0  # dB over the best uniform static family
AS_FAST = 0.97  # least share of the chosen plan's speed at which a dynamic rule is "as fast"


def claims(
    clips: ClipStatistics,
    chosen: EvaluatedPlan,
    static: EvaluatedPlan | None,
    dynamic: EvaluatedPlan | None,
    predicted: float,
    fastest: EvaluatedPlan | None,
) -> list[dict[str, Any]]:
    """Return each claim with the measured numbers and, if it does not hold, the cause.

    Args:
        clips: statistics of the validation.
        chosen: the plan of the search.
        static: the best uniform static plan at its speed, ``BEST_STATIC`` among the clips.
        dynamic: the dynamic rule to compare with, ``BEST_DYNAMIC`` among the clips.
        predicted: the predicted speedup of the chosen plan.
        fastest: the dynamic rule that is predicted to be the fastest.
    """
    rows = []
    if static is not None:
        rows.append(_above_static(clips, chosen, static))
    if dynamic is not None:
        rows.append(_not_below_dynamic(clips, chosen, dynamic, fastest))
    if clips.flips(PLANNED)[1]:
        rows.append(_few_flips(clips))
    rows.append(_as_predicted(clips, predicted))
    return rows


def _above_static(
    clips: ClipStatistics, chosen: EvaluatedPlan, static: EvaluatedPlan
) -> dict[str, Any]:
    gain = clips.psnr_gain(PLANNED, BEST_STATIC)
    holds = gain.mean >= LEAST_GAIN and gain.low > 0
    return {
        "text": f"The plan is at least {LEAST_GAIN:g} dB over the best uniform static family at "
        f"its speed, {static.name}",
        "holds": holds,
        "figures": _decibels(gain),
        "cause": None
        if holds
        else "the error of the model output, by which plans are chosen, differs too "
        f"little: {chosen.error:.4f} against {static.error:.4f}",
    }


def _not_below_dynamic(
    clips: ClipStatistics,
    chosen: EvaluatedPlan,
    dynamic: EvaluatedPlan,
    fastest: EvaluatedPlan | None,
) -> dict[str, Any]:
    gain = clips.psnr_gain(PLANNED, BEST_DYNAMIC)
    cause = None
    if dynamic.predicted is not None and dynamic.predicted < AS_FAST * (chosen.predicted or 1):
        cause = (
            f"no dynamic rule is as fast here: {dynamic.name} is compared at its actual speed, "
            f"{clips.speed(BEST_DYNAMIC)[0]:.2f}x"
        )
        if fastest is not None and fastest.predicted is not None:
            cause += f"; the fastest, {fastest.name}, is predicted at {fastest.predicted:.2f}x"
    return {
        "text": "The plan is not below the best uniform dynamic rule",
        "holds": gain.high >= 0,
        "figures": _decibels(gain),
        "cause": cause,
    }


def _few_flips(clips: ClipStatistics) -> dict[str, Any]:
    differ, total = clips.flips(PLANNED)
    holds = differ <= FLIPS_OF_60 * total / 60
    return {
        "text": f"At most {FLIPS_OF_60} of 60 verdicts on the clips differ from dense",
        "holds": holds,
        "figures": f"{differ} of {total}",
        "cause": None if holds else clips.why_flips(PLANNED),
    }


def _as_predicted(clips: ClipStatistics, predicted: float) -> dict[str, Any]:
    speed, low, high = clips.speed(PLANNED)
    holds = abs(speed / predicted - 1) <= SPEED_TOLERANCE
    return {
        "text": f"The measured speed is within {SPEED_TOLERANCE:.0%} of the predicted",
        "holds": holds,
        "figures": f"{speed:.3f}x [{low:.3f}, {high:.3f}] against {predicted:.3f}x",
        "cause": None if holds else "the machine's speed changed between the two measurements",
    }


def _decibels(value: Interval) -> str:
    return f"{value.mean:+.2f} dB [{value.low:+.2f}, {value.high:+.2f}]"
