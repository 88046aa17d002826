"""Times the first calls of a guarded layer, to compare them with the prediction."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

__all__ = ["Watch"]

CALLS = 5


class Watch:
    """Times the first calls of a layer.

    On a CPU it measures the CPU time of the calling thread. On a GPU it measures the time between
    two events. A later call reads them when they are done, so nothing waits for the device.

    Args:
        limit: time in seconds; if all first calls take longer, the prediction is wrong.
        sparse: whether some head is sparse.
        last: whether the device has been measured again already.
    """

    def __init__(self, limit: float, sparse: bool, last: bool) -> None:
        self.limit, self.sparse, self.last = limit, sparse, last
        self.seconds: list[float] = []
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self._lock = threading.Lock()  # several threads may run the layer

    @property
    def done(self) -> bool:
        """Whether enough calls have been timed."""
        return len(self.seconds) >= CALLS

    @property
    def contradicts(self) -> bool:
        """Whether all timed calls took longer than the limit."""
        return self.done and min(self.seconds) > self.limit

    @contextmanager
    def call(self, device: torch.device) -> Iterator[None]:
        """Time what runs inside, unless enough calls have been timed."""
        if self.done:
            yield
        elif device.type == "cpu":
            begin = time.thread_time()
            yield
            self.seconds.append(time.thread_time() - begin)
        else:
            self._collect()
            stream = torch.cuda.current_stream(device)  # which may not be the current device
            pair = (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True))
            pair[0].record(stream)
            yield
            pair[1].record(stream)
            self._events.append(pair)

    def _collect(self) -> None:
        """Read the events of calls that have ended."""
        with self._lock:
            while self._events and self._events[0][1].query():
                begin, end = self._events.pop(0)
                self.seconds.append(begin.elapsed_time(end) / 1e3)
