"""What a selector knows of its last call in the same generation."""

from __future__ import annotations

from dataclasses import dataclass

import torch

__all__ = ["Past"]


@dataclass
class Past:
    """Empty at the first step of a generation.

    Attributes:
        lse: of the last call, ``[B, H, L]``, and highest: the largest logit less the LSE of the
            call before, of each block pair, ``[B, H, Nq, Nk]``; for selectors that learn.
        skipped: block pairs that are not seen any more, bool ``[B, H, Nq, Nk]``; calls: so many
            were made.
        centres: of query and key clusters.
    """

    lse: torch.Tensor | None = None
    highest: torch.Tensor | None = None
    skipped: torch.Tensor | None = None
    calls: int = 0
    centres: tuple[torch.Tensor, torch.Tensor] | None = None
