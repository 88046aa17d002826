"""Records which pipeline runs, for pipelines that do not expose their present step and pass."""

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
    """A running call of a pipeline.

    Args:
        pipe: the pipeline.
        args: the positional arguments of its call.
        kwargs: the keyword arguments of its call.
    """

    def __init__(self, pipe: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        self.pipe = weakref.ref(pipe)
        parameters = inspect.signature(kind_of(pipe).__call__).parameters
        names = list(parameters)[1:]
        self.given = {name: parameters[name].default for name in names}
        self.given |= dict(zip(names, args, strict=False)) | dict(kwargs)

    def guided(self) -> bool:
        """Return whether the pipeline may run an unconditional pass now. Pipelines whose model gets
        ``guidance_scale`` as an input have ``true_cfg_scale``, or no guidance."""
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
    """The running calls of this thread, the innermost last."""

    runs: tuple[Run, ...] = ()


_running = _Running()


class Announced:
    """A handler that announces the calls of a pipeline, so that ``run_of`` returns them."""

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
    """Return whether the calls of a pipeline are announced."""
    return any(isinstance(handler, Announced) for handler in handlers_of(pipe))


def run_of(pipe: Any) -> Run | None:
    """Return the running call of a pipeline in this thread; None if another one runs inside it."""
    last = _running.runs[-1] if _running.runs else None
    return last if last is not None and last.pipe() is pipe else None


def says_where(pipe: Any, batched: bool) -> bool:
    """Return whether the code of a pipeline exposes its step and passes, or it is not callable.

    Args:
        pipe: the pipeline.
        batched: whether its passes are one batch, so that it gives them no names.
    """
    if not callable(pipe):
        return True
    names = getattr(_call_of(pipe), "__code__", None)
    known: tuple[str, ...] = () if names is None else names.co_names
    return uses_current_timestep(known) and (batched or "cache_context" in known)


def is_stock(pipe: Any) -> bool:
    """Return whether a pipeline runs code of diffusers, whose order of passes is known."""
    return getattr(_call_of(pipe), "__module__", "").startswith("diffusers.pipelines.")


def _call_of(pipe: Any) -> Any:
    kind: Any = kind_of(pipe)
    return inspect.unwrap(kind.__call__) if callable(pipe) else None


class Calls:
    """Finds the passes of separate calls to which a pipeline gives no names, by their text.

    Each pass has its own text, and the first step has the passes in a known order. The pass of a
    text that is new in a later step is not known.
    """

    def __init__(self) -> None:
        self._run: Run | None = None
        self._first_index: object = None
        self._texts: tuple[weakref.ref[torch.Tensor], ...] = ()

    def __deepcopy__(self, memo: object) -> Calls:
        return Calls()

    def __reduce__(self) -> tuple[type[Calls], tuple[()]]:
        return Calls, ()

    def note(self, run: Run, scheduler: Any, text: torch.Tensor) -> None:
        """Record the text of a call that begins."""
        index = step_index(scheduler, "not counted")
        if run is not self._run:
            self._run, self._first_index, self._texts = run, index, ()
        new = self._number(text) is None
        first_step = index == self._first_index and index != "not counted"
        if new and (not self._texts or first_step):
            self._texts = (*self._texts, weakref.ref(text))

    def pass_of(
        self, run: Run, text: torch.Tensor | None, order: tuple[str, ...]
    ) -> str | None:
        """Return the pass of a call with a text; None if it is not known."""
        number = None if text is None or run is not self._run else self._number(text)
        return None if number is None or number >= len(order) else order[number]

    def _number(self, text: torch.Tensor) -> int | None:
        return next((n for n, ref in enumerate(self._texts) if ref() is text), None)
