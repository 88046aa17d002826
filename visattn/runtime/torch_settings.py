"""What a caller has set for all of torch, and how our own computation is kept apart from it:
autocast, inference mode, the default device."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import ParamSpec, TypeVar

import torch

__all__ = ["callers_autocast", "cast_for_attention", "lasting", "plain_torch"]

KINDS = ("cpu", "cuda", "mps", "xpu")  # types of devices that have an autocast

P = ParamSpec("P")
T = TypeVar("T")
Cast = TypeVar("Cast", torch.Tensor, torch.Tensor | None)


def _autocast_on() -> list[str]:
    return [kind for kind in KINDS if torch.is_autocast_enabled(kind)]


@contextmanager
def plain_torch() -> Iterator[None]:
    """Inside, and in a function that is decorated with ``plain_torch()``, torch computes in the
    dtypes that the code names, and tensors for which it names no device are on the CPU, whatever
    ``torch.autocast`` and ``torch.set_default_device`` say outside. Not for generators."""
    with ExitStack() as stack:
        for kind in _autocast_on():
            stack.enter_context(torch.autocast(kind, enabled=False))
        if torch.get_default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))
        yield


def callers_autocast() -> Callable[[], AbstractContextManager[None]]:
    """What brings back the autocast that is on now, for what is the caller's own inside
    ``plain_torch``."""
    states = [(kind, torch.get_autocast_dtype(kind)) for kind in _autocast_on()]

    @contextmanager
    def again() -> Iterator[None]:
        with ExitStack() as stack:
            for kind, dtype in states:
                stack.enter_context(torch.autocast(kind, dtype=dtype))
            yield

    return again


def cast_for_attention(*tensors: Cast) -> tuple[Cast, ...]:
    """Tensors of an attention call in the dtype of autocast, where that is on, as torch's own
    attention takes them: floating-point ones, but for float64."""
    return tuple(_cast(x) for x in tensors)


def _cast(x: Cast) -> Cast:
    if x is None or not x.is_floating_point() or x.dtype == torch.float64:
        return x
    kind = x.device.type
    if kind not in KINDS or not torch.is_autocast_enabled(kind):
        return x
    return x.to(torch.get_autocast_dtype(kind))


def lasting(function: Callable[P, T]) -> Callable[P, T]:
    """Let a function make tensors that are kept for later calls: tensors that are made in
    ``torch.inference_mode`` could not be used with gradients, or written to, outside of it."""

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> T:
        if not torch.is_inference_mode_enabled():
            return function(*args, **kwargs)
        with torch.inference_mode(False), torch.no_grad():
            return function(*args, **kwargs)

    return run
