"""Memory of a CPU that is used again: the first touch of new memory takes several times as long as
what is copied into it."""

from __future__ import annotations

import math
import threading

import torch

from visattn.runtime.torch_settings import lasting

__all__ = ["workspace"]

KEPT = 1 << 26  # bytes of a tensor that is kept for the next call, at most


class _Kept(threading.local):
    """The tensors of a thread, by name."""

    def __init__(self) -> None:
        self.tensors: dict[str, torch.Tensor] = {}


_KEPT = _Kept()


@lasting
def workspace(name: str, like: torch.Tensor, *shape: int) -> torch.Tensor:
    """A tensor of any values on the CPU, in the dtype of ``like``, in the memory that the last one
    of this name and thread had."""
    size = math.prod(shape) * like.element_size()
    own = _KEPT.tensors.get(name)
    if own is None or own.numel() < size:
        own = torch.empty(size, dtype=torch.uint8, device="cpu")
        if size <= KEPT:
            _KEPT.tensors[name] = own
    return own[:size].view(like.dtype).view(shape)
