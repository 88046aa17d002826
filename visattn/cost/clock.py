"""Seconds of functions, such that what else a machine does counts as little as possible.

A CPU counts the CPU time of the calling thread: that thread takes its share of every parallel
region, and the time for which another process has its core is not counted. A GPU counts the time
until its work is done. Functions take turns in slices of about equal length, so that whatever
disturbs the machine meets all of them alike.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch

__all__ = ["Timing", "interleaved", "now"]

LEAST_ROUNDS, MOST_ROUNDS = 3, 100
SLICE = 0.02  # seconds of a slice, where a call does not take longer


class Timing(NamedTuple):
    """Seconds of a call: the least over the rounds, and by which share the median is above it."""

    seconds: float
    spread: float

    @staticmethod
    def of(samples: list[float]) -> Timing:
        """The timing of the rounds of a function."""
        least = min(samples)
        return Timing(least, statistics.median(samples) / max(least, 1e-12) - 1)


def now(device: torch.device) -> float:
    """Seconds on the clock of a device; on a GPU after all of its work is done."""
    if device.type == "cpu":
        return time.thread_time()
    torch.accelerator.synchronize(device)
    return time.perf_counter()


def interleaved(
    functions: Mapping[str, Callable[[], object]],
    device: torch.device,
    seconds: float,
    clock: Callable[[torch.device], float] = now,
) -> dict[str, Timing]:
    """Time functions that take turns.

    Args:
        functions: to be called, by name.
        device: that they run on.
        seconds: for all of them together, about; each function has three rounds at least.
        clock: the seconds of a device.

    Returns:
        The timing of each function, by name.
    """
    counts = {}
    for name, function in functions.items():
        function()  # what it does once, it does here
        begin = clock(device)
        function()
        once = max(clock(device) - begin, 1e-7)
        counts[name] = max(1, round(SLICE / once))
    samples: dict[str, list[float]] = {name: [] for name in functions}
    end = time.perf_counter() + seconds
    for number in range(MOST_ROUNDS):
        if number >= LEAST_ROUNDS and time.perf_counter() >= end:
            break
        for name, function in functions.items():
            begin = clock(device)
            for _ in range(counts[name]):
                function()
            samples[name].append((clock(device) - begin) / counts[name])
    return {name: Timing.of(own) for name, own in samples.items()}
