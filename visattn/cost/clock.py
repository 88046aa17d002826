"""Timing of functions that is robust against other load on the machine.

On a CPU the clock is the CPU time of the calling thread: the thread takes part in every parallel
region, and time in which other processes use its core does not count. On a GPU short calls are
timed by ``triton.testing.do_bench``: device time, with the L2 cache flushed before each call. Calls
of a slice or longer, for which neither the cache nor the launch counts, are timed by the wall clock
after synchronisation. Functions are called in alternating slices of about equal length, so that a
disturbance affects all of them alike.
"""

from __future__ import annotations

import functools
import importlib.util
import statistics
import time
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch

__all__ = ["Timing", "interleaved", "now", "seconds_of", "stopwatch", "wall"]

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


def wall(device: torch.device) -> float:
    """Return the seconds on the wall clock, on a GPU after all of its work is completed."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter()


def seconds_of(
    function: Callable[[], object],
    device: torch.device,
    count: int = 1,
    clock: Callable[[torch.device], float] = wall,
) -> float:
    """Return the mean seconds of ``count`` calls in a row.

    Args:
        function: what is timed.
        device: the device that it runs on.
        count: number of calls.
        clock: returns the seconds of a device.
    """
    begin = clock(device)
    for _ in range(count):
        function()
    return (clock(device) - begin) / count


def stopwatch(
    function: Callable[[], object],
    device: torch.device,
    clock: Callable[[torch.device], float] = now,
) -> Callable[[], float]:
    """Call a function twice, and return what measures the mean seconds of a call over a slice.

    Args:
        function: what is timed.
        device: the device that it runs on.
        clock: returns the seconds of a device; for short calls on a GPU ``do_bench`` has its own.
    """
    function()  # compiles and fills caches
    once = max(seconds_of(function, device, clock=clock), 1e-7)
    if device.type == "cuda" and once < SLICE and importlib.util.find_spec("triton") is not None:
        return functools.partial(_device_seconds, function, device)
    return functools.partial(seconds_of, function, device, max(1, round(SLICE / once)), clock)


def _device_seconds(function: Callable[[], object], device: torch.device) -> float:
    from triton.testing import do_bench

    with torch.cuda.device(device):
        milliseconds: list[float] = do_bench(
            function, warmup=1, rep=SLICE * 1e3, return_mode="all"
        )
    return statistics.fmean(milliseconds) / 1e3


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
    watches = {name: stopwatch(function, device, clock) for name, function in functions.items()}
    samples: dict[str, list[float]] = {name: [] for name in functions}
    end = time.perf_counter() + seconds
    for number in range(MOST_ROUNDS):
        if number >= LEAST_ROUNDS and time.perf_counter() >= end:
            break
        for name, watch in watches.items():
            samples[name].append(watch())
    return {name: Timing.of(seconds) for name, seconds in samples.items()}
