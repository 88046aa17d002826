"""Progress of a search for heads, and the time that it still takes."""

from __future__ import annotations

import time
from dataclasses import dataclass

from visattn.runtime.progress import Progress

__all__ = ["SearchProgress"]


@dataclass
class SearchProgress:
    """Counts generations and reports them to a callback.

    Args:
        callback: called as ``callback(stage, done, total, seconds_left)``, or None.
        num_processes: how many processes share the generations.
        stage: name of the present part of the search.
        done: generations that are finished or no longer needed.
        total: ``done``, and the generations that are still planned.
        seconds: time of the generations that were timed.
        num_timed: how many generations were timed.
        started: start of the timing that runs, in seconds of ``time.perf_counter``.
    """

    callback: Progress | None
    num_processes: int
    stage: str = "without the heads"
    done: int = 0
    total: int = 0
    seconds: float = 0.0
    num_timed: int = 0
    started: float = 0.0

    def plan(self, num_left: int) -> None:
        """Set how many generations are left."""
        self.total = self.done + num_left

    def start_timing(self) -> None:
        """Start to time generations."""
        self.started = time.perf_counter()

    def stop_timing(self, count: int) -> None:
        """Stop the timing of ``count`` generations."""
        self.seconds += time.perf_counter() - self.started
        self.num_timed += count

    def advance(self, count: int) -> None:
        """Count generations that are finished or no longer needed, and call the callback."""
        self.done += count
        if self.callback is None:
            return
        seconds_left = None
        if self.num_timed:
            num_left = self.total - self.done
            seconds_left = self.seconds / self.num_timed * num_left / self.num_processes
        self.callback(self.stage, self.done, self.total, seconds_left)
