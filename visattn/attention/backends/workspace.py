"""Reused CPU memory. The first write to newly allocated memory takes several times as long as a
copy into memory that was used before."""

from __future__ import annotations

import math
import threading

import torch

from visattn.runtime.torch_settings import lasting

__all__ = ["workspace"]

KEPT = 1 << 26  # limit of the bytes of a tensor that is kept for the next call


class _Kept(threading.local):
    """The tensors of a thread, by name."""

    def __init__(self) -> None:
        self.tensors: dict[str, torch.Tensor] = {}


_KEPT = _Kept()


@lasting
def workspace(name: str, like: torch.Tensor, *shape: int) -> torch.Tensor:
    """Return an uninitialised CPU tensor with the dtype of ``like``. It uses the memory of the last
    tensor of this name and thread, if that is large enough."""
    size = math.prod(shape) * like.element_size()
    memory = _KEPT.tensors.get(name)
    if memory is None or memory.numel() < size:
        memory = torch.empty(size, dtype=torch.uint8, device="cpu")
        if size <= KEPT:
            _KEPT.tensors[name] = memory
    return memory[:size].view(like.dtype).view(shape)
