"""How kernels are launched for a tensor: the device, tiles, warps and stages."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

from visattn.kernels.targets import Launch, backward_settings, launch_settings, target_of

__all__ = ["backward_launch_of", "interpreting", "launch_of", "on_device"]

P = ParamSpec("P")
T = TypeVar("T")

# settings for Triton's interpreter
INTERPRETED = Launch(32, 32, 4, 1)
INTERPRETED_BACKWARD = ((32, 32), (16, 8), 4, 1)


def interpreting() -> bool:
    """Return whether Triton interprets kernels on the CPU (``TRITON_INTERPRET``), as in tests."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on")


def on_device(function: Callable[P, T]) -> Callable[P, T]:
    """Decorate a function, so that the device of its first tensor is the current device while it
    runs. Triton launches on the current device, even if the tensors are on another."""

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> T:
        first = next(item for item in args if isinstance(item, torch.Tensor))
        with torch.cuda.device_of(first):
            return function(*args, **kwargs)

    return run


def launch_of(q: torch.Tensor) -> Launch:
    """Return the launch settings of the forward kernels from the launch table."""
    if q.device.type == "cpu":
        return INTERPRETED
    return launch_settings(target_of(q.device), q.dtype, q.shape[3])


def backward_launch_of(
    q: torch.Tensor, *, spare: bool = False
) -> tuple[tuple[int, int], tuple[int, int], int, int]:
    """Return the launch settings of the gradient kernels from the launch table.

    Args:
        q: queries ``[B, H, Lq, D]``.
        spare: return the settings for kernels that need more registers or shared memory.

    Returns:
        (queries, keys) of a block, (queries of a part, queries of a masked part), warps, stages.
    """
    if q.device.type == "cpu":
        return INTERPRETED_BACKWARD
    settings = backward_settings(target_of(q.device), q.dtype, q.shape[3])
    settings = settings.spared() if spare else settings
    block, queries = (settings.block_q, settings.block_k), (settings.queries, settings.masked)
    return block, queries, settings.warps, settings.stages
