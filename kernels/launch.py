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

# where Triton's interpreter runs the kernels
INTERPRETED = Launch(32, 32, 4, 1)
INTERPRETED_BACKWARD = ((32, 32), (16, 8), 4, 1)


def interpreting() -> bool:
    """Whether Triton interprets kernels on the CPU (``TRITON_INTERPRET``), as tests do."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on")


def on_device(function: Callable[P, T]) -> Callable[P, T]:
    """``function`` with the device of its first tensor as the current one: Triton launches on the
    current device, wherever the tensors are."""

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> T:
        first = next(item for item in args if isinstance(item, torch.Tensor))
        with torch.cuda.device_of(first):
            return function(*args, **kwargs)

    return run


def launch_of(q: torch.Tensor) -> Launch:
    """How the forward kernels are launched, from the launch table."""
    if q.device.type == "cpu":
        return INTERPRETED
    return launch_settings(target_of(q.device), q.dtype, q.shape[3])


def backward_launch_of(
    q: torch.Tensor, *, spare: bool = False
) -> tuple[tuple[int, int], tuple[int, int], int, int]:
    """Queries and keys of a block, queries of a part and of a masked part of it, warps and stages,
    from the launch table of gradients; ``spare`` for the kernels that hold more."""
    if q.device.type == "cpu":
        return INTERPRETED_BACKWARD
    own = backward_settings(target_of(q.device), q.dtype, q.shape[3])
    own = own.spared() if spare else own
    return (own.block_q, own.block_k), (own.queries, own.masked), own.warps, own.stages
