"""Inside ``guide`` and ``steer`` a denoiser is for one request at a time: what they keep from call
to call is that of one. A second request is refused before it computes anything."""

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
    """Which thread or asyncio task runs an edited denoiser now. The same one may begin again.

    Args:
        role: of the denoiser.
    """

    def __init__(self, role: str) -> None:
        self.role = role
        self._lock = threading.Lock()
        self._holder: weakref.ref[Any] | None = None
        self._runs = 0  # of pipelines, and of what makes several calls of the denoiser
        self._calls = False  # whether a call of the denoiser is under way

    def __deepcopy__(self, memo: object) -> Turn:
        return Turn(self.role)

    def __reduce__(self) -> tuple[type[Turn], tuple[str]]:
        return Turn, (self.role,)

    def check(self) -> None:
        """Raise RuntimeError where another thread or task runs the denoiser."""
        holder = None if self._holder is None else self._holder()
        busy = self._calls or self._runs > 0
        if busy and holder is not None and holder is not caller() and _lives(holder):
            raise RuntimeError(
                f"another thread or asyncio task runs the {self.role} now, which is inside guide, "
                "steer or the like and keeps the state of one request; run one request at a time, "
                "or make a copy of the denoiser for each (copy.deepcopy)"
            )

    @contextmanager
    def taken(self) -> Iterator[None]:
        """Inside, the denoiser is run by this thread or task."""
        with self._lock:
            self._take()
            self._runs += 1
        try:
            yield
        finally:
            with self._lock:
                if self._mine():
                    self._runs -= 1
                    self._calls = False  # one that an interruption has ended says nothing

    def call(self) -> None:
        """A call of the denoiser begins."""
        with self._lock:
            self._take()
            self._calls = True

    def done(self) -> None:
        """It has ended."""
        with self._lock:
            if self._mine():
                self._calls = False

    def _take(self) -> None:
        self.check()
        if not self._mine():
            self._holder, self._runs, self._calls = weakref.ref(caller()), 0, False

    def _mine(self) -> bool:
        return self._holder is not None and self._holder() is caller()


class Gate:
    """A handler of calls of a pipeline: each has the turn of all its denoisers."""

    outermost = True  # other handlers change what they keep

    def __init__(self, turns: Sequence[Turn]) -> None:
        self.turns = turns

    def __call__(self, _: Any, inner: Next, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        with ExitStack() as stack:
            for turn in self.turns:
                stack.enter_context(turn.taken())
            return inner(*args, **kwargs)


def _lives(holder: Any) -> bool:
    return not holder.done() if isinstance(holder, asyncio.Task) else bool(holder.is_alive())
