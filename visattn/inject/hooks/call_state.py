"""The state of the running call of a denoiser. Each thread and each asyncio task has its own state,
so two requests can use one denoiser at the same time."""

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

__all__ = ["CallInputs", "CallState", "Held", "States", "caller"]

# the timestep of a call, its text, and whether the pipeline makes a separate perturbed call
CallInputs = tuple[torch.Tensor | None, torch.Tensor | None, bool]


def _nothing() -> None:
    """Return None, as a weak reference to a freed object does."""


class Held(NamedTuple):
    """What is known of a call, for a part of it that runs again later.

    Attributes:
        step: the denoising step; None if it is not known.
        steps: the number of steps; None if it is not known.
        passes: the passes in the batch; None if they are not known.
        size: samples of the batch.
    """

    step: int | None
    steps: int | None
    passes: tuple[str, ...] | None
    size: int


@dataclass
class CallState:
    """What belongs to the running call of a denoiser in one thread or task.

    Attributes:
        slot: a number that is unique among the living threads and tasks of this denoiser.
        tokens: the tokens of the attention; empty before the first call.
        context: what the pipeline passed to ``cache_context`` for the call.
        timestep_ref: weak reference to the timestep.
        text_ref: weak reference to the text.
        text_length: number of text tokens.
        aside: whether this is a separate perturbed call of the pipeline.
        batch: finds the passes in the batch over the calls of a schedule.
        calls: finds the passes of calls without a name over those of a run.
        last: the step and the number of steps of the previous call, if they were computed.
        held: what is known of the call, if a part of it runs again.
        step: the step and the number of steps, once computed. This may wait for the device.
        runs: whether the pipeline makes the call, once computed. This may wait for the device.
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

    def note(self, inputs: CallInputs) -> None:
        """Begin a call."""
        timestep, text, self.aside = inputs
        self.step = self.runs = None
        self.timestep_ref = _nothing if timestep is None else weakref.ref(timestep)
        self.text_ref = _nothing if text is None else weakref.ref(text)
        self.text_length = None if text is None else text.shape[1]


class States:
    """The states of the calls of one denoiser, one for each calling thread or task. A state is
    freed with its thread or task. A copy has no states."""

    def __init__(self) -> None:
        self._states: weakref.WeakKeyDictionary[Any, CallState] = weakref.WeakKeyDictionary()
        self._lock = threading.Lock()

    def here(self) -> CallState:
        """Return the state of the calling thread or task."""
        thread_or_task = caller()
        state = self._states.get(thread_or_task)
        if state is None:
            with self._lock:
                taken = {other.slot for other in self._states.values()}
                slot = next(n for n in range(len(taken) + 1) if n not in taken)
                state = self._states[thread_or_task] = CallState(slot)
        return state

    @contextmanager
    def resumed(self, state: CallState) -> Iterator[None]:
        """Inside the block this thread or task continues the call of a state."""
        thread_or_task, before = caller(), self.here()
        self._states[thread_or_task] = state
        try:
            yield
        finally:
            self._states[thread_or_task] = before

    def __deepcopy__(self, memo: object) -> States:
        return States()


def caller() -> object:
    """Return the running asyncio task, or else the thread."""
    try:
        return asyncio.current_task() or threading.current_thread()
    except RuntimeError:  # no loop runs in this thread
        return threading.current_thread()
