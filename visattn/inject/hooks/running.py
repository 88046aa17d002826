"""Which pipeline runs, where pipelines do not say where they stand: their calls are announced."""

from __future__ import annotations

import inspect
import threading
import weakref
from collections.abc import Mapping
from typing import Any

import torch

from visattn.inject.hooks.class_swap import Next, handlers_of, kind_of
from visattn.runtime.private_names import step_index, uses_current_timestep

__all__ = ["Announced", "Calls", "Run", "is_announced", "is_stock", "run_of", "says_where"]


class Run:
    """A call of a pipeline that is under way.

    Args:
        pipe: the pipeline; args, kwargs: of its call.
    """

    def __init__(self, pipe: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        self.pipe = weakref.ref(pipe)
        parameters = inspect.signature(kind_of(pipe).__call__).parameters
        names = list(parameters)[1:]
        self.given = {name: parameters[name].default for name in names}
        self.given |= dict(zip(names, args, strict=False)) | dict(kwargs)

    def guided(self) -> bool:
        """Whether the pipeline may run an unconditional pass now. Pipelines whose model is told
        ``guidance_scale`` have ``true_cfg_scale``, or no guidance."""
        if "true_cfg_scale" in self.given:
            scale = self.given["true_cfg_scale"]
            negative = any(
                value is not None
                for name, value in self.given.items()
                if name.startswith("negative_prompt")
            )
            return negative and not (isinstance(scale, (int, float)) and scale <= 1)
        return bool(getattr(self.pipe(), "do_classifier_free_guidance", False))


class _Running(threading.local):
    """The calls that are under way in this thread, the innermost last."""

    runs: tuple[Run, ...] = ()


_running = _Running()


class Announced:
    """A handler of calls of a pipeline: inside them it is known that the pipeline runs."""

    def __call__(
        self, pipe: Any, inner: Next, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        before = _running.runs
        _running.runs = (*before, Run(pipe, args, kwargs))
        try:
            return inner(*args, **kwargs)
        finally:
            _running.runs = before


def is_announced(pipe: Any) -> bool:
    """Whether the calls of a pipeline are announced."""
    return any(isinstance(one, Announced) for one in handlers_of(pipe))


def run_of(pipe: Any) -> Run | None:
    """The call of a pipeline that is under way in this thread, unless another one runs inside."""
    last = _running.runs[-1] if _running.runs else None
    return last if last is not None and last.pipe() is pipe else None


def says_where(pipe: Any, batched: bool) -> bool:
    """Whether a pipeline says its step and its passes by the code of its call, or is called by
    nobody. ``batched``: its passes are one batch, so that it has no names for them."""
    if not callable(pipe):
        return True
    names = getattr(_call_of(pipe), "__code__", None)
    known: tuple[str, ...] = () if names is None else names.co_names
    return uses_current_timestep(known) and (batched or "cache_context" in known)


def is_stock(pipe: Any) -> bool:
    """Whether a pipeline runs code of diffusers, whose order of passes is known."""
    return getattr(_call_of(pipe), "__module__", "").startswith("diffusers.pipelines.")


def _call_of(pipe: Any) -> Any:
    kind: Any = kind_of(pipe)
    return inspect.unwrap(kind.__call__) if callable(pipe) else None


class Calls:
    """The pass of calls that a pipeline makes one after the other and does not name, by the text
    that the denoiser gets: each pass has its own, and the first step has them in a known order. A
    text that comes later belongs to no pass that is known."""

    def __init__(self) -> None:
        self._run: Run | None = None
        self._at: object = None
        self._texts: tuple[weakref.ref[torch.Tensor], ...] = ()

    def __deepcopy__(self, memo: object) -> Calls:
        return Calls()

    def __reduce__(self) -> tuple[type[Calls], tuple[()]]:
        return Calls, ()

    def note(self, run: Run, scheduler: Any, text: torch.Tensor) -> None:
        """Take note of a call that begins, and gets a text."""
        at = step_index(scheduler, "not counted")
        if run is not self._run:
            self._run, self._at, self._texts = run, at, ()
        new = self._number(text) is None
        if new and (not self._texts or (at == self._at and at != "not counted")):
            self._texts = (*self._texts, weakref.ref(text))

    def pass_of(
        self, run: Run, text: torch.Tensor | None, order: tuple[str, ...]
    ) -> str | None:
        """The pass of a call with a text, where it is known."""
        number = None if text is None or run is not self._run else self._number(text)
        return None if number is None or number >= len(order) else order[number]

    def _number(self, text: torch.Tensor) -> int | None:
        return next((n for n, one in enumerate(self._texts) if one() is text), None)
