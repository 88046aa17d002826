"""Calls of a denoiser: their arguments by rows of the batch, and the prediction that they give."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

__all__ = ["Rows", "part_of", "sample_of", "with_sample"]

SHARED = ("image_rotary_emb", "img_ids", "txt_ids")  # inputs that have no batch
Rows = slice | Sequence[int] | None


def sample_of(out: Any) -> torch.Tensor:
    """The prediction in what a denoiser gives."""
    found = out[0] if isinstance(out, tuple) else getattr(out, "sample", out)
    assert isinstance(found, torch.Tensor)
    return found


def with_sample(out: Any, new: torch.Tensor) -> Any:
    """What a denoiser gives with another prediction."""
    if isinstance(out, tuple):
        return (new, *out[1:])
    return new if isinstance(out, torch.Tensor) else type(out)(sample=new)


def part_of(name: str, value: Any, batch: int, rows: Rows) -> Any:
    """Rows of an input of a denoiser, and of tensors in it, where it has a batch; None: all."""
    if rows is None or name in SHARED:
        return value
    if isinstance(value, dict):
        return {key: part_of(key, x, batch, rows) for key, x in value.items()}
    if isinstance(value, (list, tuple)):  # what a control net adds to blocks
        return type(value)(part_of(name, x, batch, rows) for x in value)
    if not isinstance(value, torch.Tensor):
        return value
    return value[rows] if value.ndim and value.shape[0] == batch else value
