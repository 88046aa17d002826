"""Times of functions that take turns, so that a machine that slows down slows them all."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

__all__ = ["Time", "take_turns"]


class Time(NamedTuple):
    """Seconds, or a ratio of them: the median, the quartiles around it, and all."""

    median: float
    low: float
    high: float
    samples: tuple[float, ...]

    @staticmethod
    def of(samples: Sequence[float]) -> Time:
        """The statistics of one sample or more."""
        low, median, high = (
            statistics.quantiles(samples, n=4, method="inclusive")
            if len(samples) > 1
            else list(samples) * 3
        )
        return Time(median, low, high, tuple(samples))


def take_turns(
    functions: Sequence[Callable[[], object]], repeats: int, device: torch.device
) -> list[Time]:
    """Time functions, ``repeats`` times each after a first call that is not counted.

    On a GPU a call is timed until its work is done.
    """
    for function in functions:
        function()
    seconds: list[list[float]] = [[] for _ in functions]
    for _ in range(repeats):
        for own, function in zip(seconds, functions, strict=True):
            _wait(device)
            begin = time.perf_counter()
            function()
            _wait(device)
            own.append(time.perf_counter() - begin)
    return [Time.of(own) for own in seconds]


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
