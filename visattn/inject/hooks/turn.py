"""Inside ``guide`` and ``steer`` a denoiser serves one request at a time, because they keep the
state of one request between calls. A second request gets an error before it computes anything."""

from __future__ import annotations

import asyncio
import threading
import weakref
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from visattn.inject.hooks.call_state import caller
from visattn.inject.hooks.class_swap import Next

__all__ = ["Gate", "Turn"]


class Turn:
    """Records which thread or asyncio task runs an edited denoiser. The same one may start again.

    Args:
        role: name of the denoiser in its pipeline.
    """

    def __init__(self, role: str) -> None:
        self.role = role
        self._lock = threading.Lock()
        self._holder: weakref.ref[Any] | None = None
        self._runs = 0  # running blocks of ``taken``, such as calls of the pipeline
        self._calls = False  # whether a call of the denoiser is running

    def __deepcopy__(self, memo: object) -> Turn:
        return Turn(self.role)

    def __reduce__(self) -> tuple[type[Turn], tuple[str]]:
        return Turn, (self.role,)

    def check(self) -> None:
        """Raise RuntimeError if another thread or task runs the denoiser."""
        holder = None if self._holder is None else self._holder()
        busy = self._calls or self._runs > 0
        if busy and holder is not None and holder is not caller() and _is_alive(holder):
            raise RuntimeError(
                f"another thread or asyncio task runs the {self.role} now, which is inside guide, "
                "steer or the like and keeps the state of one request; run one request at a time, "
                "or make a copy of the denoiser for each (copy.deepcopy)"
            )

    @contextmanager
    def taken(self) -> Iterator[None]:
        """Reserve the denoiser for this thread or task inside the block."""
        with self._lock:
            self._take()
            self._runs += 1
        try:
            yield
        finally:
            with self._lock:
                if self._is_held_by_caller():
                    self._runs -= 1
                    self._calls = False  # an interrupted call does not report its end

    def call(self) -> None:
        """Record that a call of the denoiser begins."""
        with self._lock:
            self._take()
            self._calls = True

    def done(self) -> None:
        """Record that the call has ended."""
        with self._lock:
            if self._is_held_by_caller():
                self._calls = False

    def _take(self) -> None:
        self.check()
        if not self._is_held_by_caller():
            self._holder, self._runs, self._calls = weakref.ref(caller()), 0, False

    def _is_held_by_caller(self) -> bool:
        return self._holder is not None and self._holder() is caller()


class Gate:
    """A handler of calls of a pipeline: each call reserves all denoisers of the pipeline."""

    outermost = True  # it must run before handlers that change their state

    def __init__(self, turns: Sequence[Turn]) -> None:
        self.turns = turns

    def __call__(self, _: Any, inner: Next, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        with ExitStack() as stack:
            for turn in self.turns:
                stack.enter_context(turn.taken())
            return inner(*args, **kwargs)


def _is_alive(holder: Any) -> bool:
    return not holder.done() if isinstance(holder, asyncio.Task) else bool(holder.is_alive())
