"""Timing of functions that is robust against other load on the machine.

On a CPU the clock is the CPU time of the calling thread: the thread takes part in every parallel
region, and time in which other processes use its core does not count. On a GPU the clock is wall
time after synchronisation. Functions are called in alternating slices of about equal length, so
that a disturbance affects all of them alike.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch

__all__ = ["Timing", "interleaved", "now"]

LEAST_ROUNDS, MOST_ROUNDS = 3, 100
SLICE = 0.02  # seconds of a slice, or one call if that takes longer


class Timing(NamedTuple):
    """The time of a call.

    Attributes:
        seconds: the smallest over all rounds.
        spread: the median over the rounds divided by the smallest, minus 1.

    Example:
        >>> from visattn.cost import Timing
        >>> Timing.of([2.0, 2.5, 3.0])
        Timing(seconds=2.0, spread=0.25)
    """

    seconds: float
    spread: float

    @staticmethod
    def of(samples: list[float]) -> Timing:
        """Return the timing of a function from the seconds of its rounds."""
        least = min(samples)
        return Timing(least, statistics.median(samples) / max(least, 1e-12) - 1)


def now(device: torch.device) -> float:
    """Return the seconds on the clock of a device.

    Args:
        device: on a GPU all of its work is completed first.

    Example:
        >>> import torch
        >>> from visattn.cost import now
        >>> begin = now(torch.device("cpu"))
        >>> now(torch.device("cpu")) >= begin
        True
    """
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
    """Time functions in alternating slices.

    Args:
        functions: by name.
        device: the device that they run on.
        seconds: approximate time for all functions together; each runs at least three rounds.
        clock: returns the seconds of a device.

    Returns:
        The timing of each function, by name.

    Example:
        >>> import torch
        >>> from visattn.cost import interleaved
        >>> x = torch.ones(64, 64)
        >>> timings = interleaved({"sum": x.sum}, torch.device("cpu"), seconds=0.01)
        >>> timings["sum"].seconds < 1
        True
    """
    counts = {}
    for name, function in functions.items():
        function()  # compiles and fills caches
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
    return {name: Timing.of(seconds) for name, seconds in samples.items()}
