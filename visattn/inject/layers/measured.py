"""What the dynamic patterns of a layer, and its audited calls, have measured."""

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
    """Share of the keys that a dynamic pattern has had computed, the mean of its last choices; None
    before the first."""
    found = [
        memory.density[pattern]
        for memory in layer.memories.values()
        if isinstance(pattern, Selector) and pattern in memory.density
    ]
    return float(torch.stack(found).mean()) if found else None


def missed(layer: Layer, patterns: Heads) -> tuple[float, float] | None:
    """Mean dropped mass and error of the heads with some patterns in the last audited calls of the
    size that ran last; None before the first. The mass is NaN where it is not known."""
    found = [
        (own.dropped[:, n].mean(), own.error[:, n].mean())
        for key, memory in layer.memories.items()
        if memory.audited is not None and key[:2] == layer.memories.latest
        for heads, own in [memory.audited]
        for n, pattern in enumerate(heads)
        if pattern in patterns
    ]
    if not found:
        return None
    dropped, error = (float(torch.stack(own).mean()) for own in zip(*found, strict=True))
    return dropped, error
