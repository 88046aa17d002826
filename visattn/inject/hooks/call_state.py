"""The state of the running call of a denoiser. Each thread, and each asyncio task, has its own, so
that two requests at once over one denoiser do not meet."""

from __future__ import annotations

import asyncio
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from visattn.geometry.layout import Tokens
from visattn.inject.hooks.run_state import Batch, Context
from visattn.inject.hooks.running import Calls

__all__ = ["CallState", "Held", "States", "Told", "caller"]

# the timestep of a call, its text, and whether the pipeline makes a perturbed call of its own
Told = tuple[torch.Tensor | None, torch.Tensor | None, bool]


def _nothing() -> None:
    """What a weak reference gives whose object is gone."""


class Held(NamedTuple):
    """Where a call stood, for a part of it that runs again: its step, the number of steps, the
    passes in its batch, where they are known, and the samples of that."""

    step: int | None
    steps: int | None
    passes: tuple[str, ...] | None
    size: int


@dataclass
class CallState:
    """What belongs to the running call of a denoiser in one thread or task.

    Attributes:
        slot: a number that no other living thread or task has for this denoiser.
        tokens: of the attention; empty before the first call.
        context: what the pipeline has said of the call.
        timestep_ref, text_ref: give the timestep and the text, which they do not keep alive.
        text_length: of the text.
        aside: whether the pipeline makes a perturbed call of its own.
        batch: the passes in the batch, over the calls of a schedule.
        calls: the passes of calls without a name, over those of a run.
        last: the step and the number of steps of the call before, where they were asked for.
        held: of a call a part of which runs again.
        step, runs: the step and the number of steps, and whether the pipeline is the one that runs,
            once they have been asked for: finding out may wait for the device.
    """

    slot: int
    tokens: Tokens = ()
    context: Context | None = None
    timestep_ref: Callable[[], torch.Tensor | None] = _nothing
    text_ref: Callable[[], torch.Tensor | None] = _nothing
    text_length: int | None = None
    aside: bool = False
    batch: Batch = field(default_factory=Batch)
    calls: Calls = field(default_factory=Calls)
    last: tuple[int, int] | None = None
    held: Held | None = None
    step: tuple[int | None, int | None] | None = None
    runs: bool | None = None

    def note(self, told: Told) -> None:
        """A call begins."""
        timestep, text, self.aside = told
        self.step = self.runs = None
        self.timestep_ref = _nothing if timestep is None else weakref.ref(timestep)
        self.text_ref = _nothing if text is None else weakref.ref(text)
        self.text_length = None if text is None else text.shape[1]


class States:
    """The states of the calls of one denoiser, by who calls. A state is dropped with its thread or
    task; a copy has none."""

    def __init__(self) -> None:
        self._states: weakref.WeakKeyDictionary[Any, CallState] = weakref.WeakKeyDictionary()
        self._lock = threading.Lock()

    def here(self) -> CallState:
        """The state of whoever asks."""
        own = caller()
        state = self._states.get(own)
        if state is None:
            with self._lock:
                taken = {one.slot for one in self._states.values()}
                slot = next(n for n in range(len(taken) + 1) if n not in taken)
                state = self._states[own] = CallState(slot)
        return state

    @contextmanager
    def resumed(self, state: CallState) -> Iterator[None]:
        """Inside, the call of a state runs in this thread or task, whatever ran last."""
        own, before = caller(), self.here()
        self._states[own] = state
        try:
            yield
        finally:
            self._states[own] = before

    def __deepcopy__(self, memo: object) -> States:
        return States()


def caller() -> object:
    """The running task of asyncio, or else the thread."""
    try:
        return asyncio.current_task() or threading.current_thread()
    except RuntimeError:  # no loop runs in this thread
        return threading.current_thread()
