"""Means over clips with their confidence intervals."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import NamedTuple

__all__ = ["Interval", "interval"]

# The 97.5 % quantiles of Student's t distribution with 1 to 30 degrees of freedom.
T = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228),
    *(2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086),
    *(2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042),
)
NORMAL = 1.96  # the same quantile of the normal distribution


class Interval(NamedTuple):
    """A mean with its 95 % confidence interval; both ends are the mean if there is one value."""

    mean: float
    low: float
    high: float


def interval(values: Sequence[float]) -> Interval:
    """Return the mean of independent values and its interval by Student's t distribution.

    Raises:
        ValueError: there is no value, or one is not finite.
    """
    if not values or not all(map(math.isfinite, values)):
        raise ValueError(f"values={list(values)} must be finite numbers, at least one")
    mean = statistics.fmean(values)
    freedom = len(values) - 1
    if not freedom:
        return Interval(mean, mean, mean)
    t = T[freedom - 1] if freedom <= len(T) else NORMAL + 2.42 / freedom
    half = t * statistics.stdev(values) / math.sqrt(len(values))
    return Interval(mean, mean - half, mean + half)
