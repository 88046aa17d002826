"""Times of functions that are called in turn, so that a slower machine slows down all of them."""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from visattn.cost.clock import seconds_of, stopwatch, wall

__all__ = ["Time", "take_turns"]


class Time(NamedTuple):
    """Seconds, or a ratio of seconds.

    Attributes:
        median: the median of the samples.
        low: the lower quartile.
        high: the upper quartile.
        samples: all samples, in the order of their rounds.
    """

    median: float
    low: float
    high: float
    samples: tuple[float, ...]

    @staticmethod
    def of(samples: Sequence[float]) -> Time:
        """Return the statistics of one sample or more."""
        low, median, high = (
            statistics.quantiles(samples, n=4, method="inclusive")
            if len(samples) > 1
            else list(samples) * 3
        )
        return Time(median, low, high, tuple(samples))


def take_turns(
    functions: Sequence[Callable[[], object]],
    repeats: int,
    device: torch.device,
    *,
    whole: bool = False,
) -> list[Time]:
    """Time functions in rounds, each function once a round.

    On a CPU a sample is the wall time of one call. On a GPU a sample of a short call is the mean
    device time over a slice of calls with a cold L2 cache (``visattn.cost.clock``).

    Args:
        functions: what is timed; first calls are not counted.
        repeats: number of rounds.
        device: the device that they run on.
        whole: measure one call by the wall clock on a GPU too, so that the host's work counts: for
            whole denoising steps and generations.

    Returns:
        The times of each function.
    """
    if whole or device.type != "cuda":
        for function in functions:
            function()
        watches: list[Callable[[], float]] = [
            functools.partial(seconds_of, function, device, clock=wall) for function in functions
        ]
    else:
        watches = [stopwatch(function, device, wall) for function in functions]
    samples: list[list[float]] = [[] for _ in functions]
    for _ in range(repeats):
        for seconds, watch in zip(samples, watches, strict=True):
            seconds.append(watch())
    return [Time.of(seconds) for seconds in samples]
