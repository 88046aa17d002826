"""Global settings of torch that a caller may have changed (autocast, inference mode, the default
device), and how the package computes independently of them."""

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
    """Switch off ``torch.autocast`` and set the default device to the CPU, in a ``with`` block or,
    as the decorator ``plain_torch()``, in a function. Not for generator functions."""
    with ExitStack() as stack:
        for kind in _autocast_on():
            stack.enter_context(torch.autocast(kind, enabled=False))
        if torch.get_default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))
        yield


def callers_autocast() -> Callable[[], AbstractContextManager[None]]:
    """Return a context manager that restores the present autocast, for code of the caller that runs
    inside ``plain_torch``."""
    states = [(kind, torch.get_autocast_dtype(kind)) for kind in _autocast_on()]

    @contextmanager
    def again() -> Iterator[None]:
        with ExitStack() as stack:
            for kind, dtype in states:
                stack.enter_context(torch.autocast(kind, dtype=dtype))
            yield

    return again


def cast_for_attention(*tensors: Cast) -> tuple[Cast, ...]:
    """Cast the tensors of an attention call to the dtype of autocast if it is on, as torch's
    ``scaled_dot_product_attention`` does: all floating-point dtypes except float64."""
    return tuple(_cast(x) for x in tensors)


def _cast(x: Cast) -> Cast:
    if x is None or not x.is_floating_point() or x.dtype == torch.float64:
        return x
    kind = x.device.type
    if kind not in KINDS or not torch.is_autocast_enabled(kind):
        return x
    return x.to(torch.get_autocast_dtype(kind))


def lasting(function: Callable[P, T]) -> Callable[P, T]:
    """Run a function outside of ``torch.inference_mode``, so that the tensors that it makes can be
    kept for later calls. Tensors made in inference mode cannot be used with gradients or written
    to outside of it."""

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> T:
        if not torch.is_inference_mode_enabled():
            return function(*args, **kwargs)
        with torch.inference_mode(False), torch.no_grad():
            return function(*args, **kwargs)

    return run
