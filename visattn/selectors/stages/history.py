"""State of a selector after its last call in the same generation."""

from __future__ import annotations

from dataclasses import dataclass

import torch

__all__ = ["SelectorState"]


@dataclass
class SelectorState:
    """State that a selector carries from call to call; empty at the first step of a generation.

    Attributes:
        lse: LSE of the last call, ``[B, H, L]``, for selectors that learn.
        skipped: block pairs that are skipped from now on, one bit each, uint8
            ``[B, H, Nq, Nk / 8]``.
        calls: number of calls so far.
        centres: means of query and key clusters.
    """

    lse: torch.Tensor | None = None
    skipped: torch.Tensor | None = None
    calls: int = 0
    centres: tuple[torch.Tensor, torch.Tensor] | None = None
