"""Measurements of the dynamic patterns and of the audited calls of a layer."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from visattn.inject.layers.head_groups import Heads
from visattn.patterns import HeadPattern
from visattn.selectors import Selector

if TYPE_CHECKING:
    from visattn.inject.layers.layer import Layer

__all__ = ["executed", "missed"]


def executed(layer: Layer, pattern: HeadPattern) -> float | None:
    """Return the density of a dynamic pattern, the mean of its last choices; None before the first
    call."""
    densities = [
        memory.density[pattern]
        for memory in layer.memories.values()
        if isinstance(pattern, Selector) and pattern in memory.density
    ]
    return float(torch.stack(densities).mean()) if densities else None


def missed(layer: Layer, patterns: Heads) -> tuple[float, float] | None:
    """Return the mean dropped mass and the mean error of the heads with some patterns, in the last
    audited calls of the last size; None before the first. An unknown mass is NaN."""
    pairs = [
        (result.dropped[:, n].mean(), result.error[:, n].mean())
        for key, memory in layer.memories.items()
        if memory.audited is not None and key[:2] == layer.memories.latest
        for heads, result in [memory.audited]
        for n, pattern in enumerate(heads)
        if pattern in patterns
    ]
    if not pairs:
        return None
    dropped, error = (float(torch.stack(values).mean()) for values in zip(*pairs, strict=True))
    return dropped, error
