"""What a selector knows of its last call in the same generation."""

from __future__ import annotations

from dataclasses import dataclass

import torch

__all__ = ["SelectorState"]


@dataclass
class SelectorState:
    """Empty at the first step of a generation.

    Attributes:
        lse: of the last call, ``[B, H, L]``, for selectors that learn.
        skipped: bits of block pairs that are not seen any more, uint8 ``[B, H, Nq, Nk / 8]``;
            calls: so many were made.
        centres: means of query and key clusters.
    """

    lse: torch.Tensor | None = None
    skipped: torch.Tensor | None = None
    calls: int = 0
    centres: tuple[torch.Tensor, torch.Tensor] | None = None
