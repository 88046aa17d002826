"""Inputs and outputs of denoiser calls: rows of the batch, and the prediction."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

__all__ = ["Rows", "part_of", "sample_of", "with_sample"]

SHARED = ("image_rotary_emb", "img_ids", "txt_ids")  # inputs that have no batch
Rows = slice | Sequence[int] | None


def sample_of(output: Any) -> torch.Tensor:
    """Return the prediction in the output of a denoiser.

    Args:
        output: a tensor, a tuple, or an output class of diffusers.
    """
    sample = output[0] if isinstance(output, tuple) else getattr(output, "sample", output)
    assert isinstance(sample, torch.Tensor)
    return sample


def with_sample(output: Any, sample: torch.Tensor) -> Any:
    """Return the output of a denoiser with another prediction.

    Args:
        output: as of ``sample_of``.
        sample: the other prediction.
    """
    if isinstance(output, tuple):
        return (sample, *output[1:])
    return sample if isinstance(output, torch.Tensor) else type(output)(sample=sample)


def part_of(name: str, value: Any, batch: int, rows: Rows) -> Any:
    """Return some rows of an input of a denoiser, and of the tensors in it. Values without a batch
    are returned as they are.

    Args:
        name: of the input.
        value: a tensor, a dict, a list or something else.
        batch: batch size of the call.
        rows: of the batch; None means all.
    """
    if rows is None or name in SHARED:
        return value
    if isinstance(value, dict):
        return {key: part_of(key, item, batch, rows) for key, item in value.items()}
    if isinstance(value, (list, tuple)):  # what a control net adds to blocks
        return type(value)(part_of(name, item, batch, rows) for item in value)
    if not isinstance(value, torch.Tensor):
        return value
    return value[rows] if value.ndim and value.shape[0] == batch else value
